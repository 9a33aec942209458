"""How far PAC's choice is from the best plan there is, found by simulating all of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest

from harness import profile
from harness.cluster import Cluster
from harness.costs import Costs
from harness.workload import Workload
from systems import pac
from systems.pac import EQUATIONS, SIMULATION
from systems.pac.planner import Profile
from testbeds import library
from tests.harness.toys import cluster
from tests.systems.pac.every import Best, best_of_all, chosen_seconds, every_split, simulated_seconds, uneven

TOY = Workload("toy", "toy", num_samples=800, batch_size=8)
#: Bytes/s at which a layer's hidden tensor takes no time, a fifth of a second a row, or a second: layers take 3 to 27.
LINKS = {"fast": 1e6, "middle": 320.0, "slow": 64.0}


def toy(seed: int, link: str, equal: bool) -> tuple[Costs, Cluster]:
    """3 to 8 layers of unequal work and weights on 2 to 4 devices."""
    draw = random.Random(seed)
    num_layers, num_devices = draw.randint(3, 8), draw.randint(2, 4)
    work, parameters = ([draw.randint(*ends) for _ in range(num_layers)] for ends in ((1, 9), (0, 3000)))
    speeds = tuple(1.0 if equal else draw.choice([0.5, 1.0, 2.0]) for _ in range(num_devices))
    return uneven(work, parameters), cluster(num_devices, bandwidth=LINKS[link], speeds=speeds)


@dataclass(frozen=True)
class Case:
    """Seconds of the whole run by PAC's plan, by what chooses the number of stages, and those of the best plan."""

    name: str
    chosen: dict[str, float]
    best: Best

    def regret(self, choice: str) -> float:
        return self.chosen[choice] / self.best.seconds - 1


def case(name: str, workload: Workload, costs: Costs, devices: Cluster) -> Case:
    best = best_of_all(workload, costs, devices)
    assert best is not None
    chosen = {choice: chosen_seconds(workload, costs, devices, {"choose": choice}) for choice in pac.CHOICES}
    return Case(name, chosen, best)


@pytest.mark.parametrize("seed", range(3))
def test_no_plan_that_is_left_out_is_faster(seed: int) -> None:
    """The search by bounds finds what simulating every single plan finds."""
    costs, devices = toy(seed, "middle", equal=False)
    found = Profile(costs, devices)
    every = (
        simulated_seconds(TOY, costs, devices, size, pac.stages(found, split))
        for size in (1, 2, 4, 8)
        for split in every_split(found.num_layers, len(devices.devices))
        if max(split.groups) <= size
    )
    best = best_of_all(TOY, costs, devices)
    assert best is not None and best.num_simulated < best.num_plans
    assert best.seconds == min(filter(None, every))


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("link", LINKS)
def test_a_choice_is_never_better_than_the_best(link: str, equal: bool) -> None:
    """Nor does more simulating make it worse; where links cost nothing, the equations find the best."""
    for seed in range(6):
        found = case(f"{link} {seed}", TOY, *toy(seed, link, equal))
        assert found.regret(EQUATIONS) >= found.regret(SIMULATION) - 1e-4 >= -2e-4
        assert found.regret(SIMULATION) >= -1e-9
        if link == "fast":
            assert found.regret(EQUATIONS) == pytest.approx(0, abs=1e-3)


def tell(title: str, cases: list[Case]) -> None:
    """One line for each choice: how its regrets are distributed, and the largest of them."""
    for choice in pac.CHOICES:
        regrets = np.array([found.regret(choice) for found in cases])
        worst = cases[int(regrets.argmax())]
        print(
            f"{title}, by {choice}: {len(cases)} cases, {(regrets < 1e-6).mean():.0%} exact, "
            f"median {np.median(regrets):.2%}, p90 {np.quantile(regrets, 0.9):.2%}, max {regrets.max():.2%} "
            f"({worst.name}: best {worst.best.split} in micro-batches of {worst.best.micro_batch})"
        )


@pytest.mark.slow
def test_regret_of_small_cases(capsys: pytest.CaptureFixture[str]) -> None:
    """40 random cases of each kind."""
    with capsys.disabled():
        print()
        for equal in (True, False):
            for link in LINKS:
                cases = [case(f"seed {seed}", TOY, *toy(seed, link, equal)) for seed in range(40)]
                tell(f"{link} links, {'equal' if equal else 'unequal'} devices", cases)
                assert min(found.regret(choice) for found in cases for choice in pac.CHOICES) >= -1e-9


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [2, 4])
@pytest.mark.parametrize("model", ["t5-base", "bart-large", "t5-large"])
def test_regret_on_nanos(model: str, num_devices: int, capsys: pytest.CaptureFixture[str]) -> None:
    """An epoch of MRPC on PAC's Nanos. Two of them can't hold T5-Large, whatever the plan."""
    workload = Workload(model, "mrpc", 3668, 16, seq_len=128, technique="parallel-adapters")
    costs, nanos = profile.count(workload, "gpu"), library.load(f"pac-nano-{num_devices}").cluster
    if (model, num_devices) == ("t5-large", 2):
        assert best_of_all(workload, costs, nanos) is None
        return
    found = case(f"{model} on {num_devices} Nanos", workload, costs, nanos)
    with capsys.disabled():
        best = found.best
        print(f"\n{found.name}: best {best.seconds:.1f} s, {best.num_simulated} of {best.num_plans} plans simulated")
        tell(found.name, [found])
    assert -1e-9 <= found.regret(SIMULATION) <= found.regret(EQUATIONS) + 1e-4
