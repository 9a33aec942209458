"""What the planners leave behind the best plan there is: `regret.PLANNERS`, to which others may be added."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from baselines import eddl
from harness.layer_tables import LayerTables
from harness.search import balanced_cuts
from harness.workload import Workload
from systems import asteroid
from systems.asteroid import planner
from systems.asteroid.equations import in_flight
from systems.asteroid.families import windows
from systems.asteroid.groups import Groups, by_memory
from systems.asteroid.layouts import laid_out
from systems.asteroid.planner import Planner, searched
from tests.harness.toys import cluster
from tests.systems.asteroid.oracle import unequal, uneven
from tests.systems.asteroid.regret import ASTEROID, EQUATIONS, ROWS, TRIPS, Case, regrets, table, toy, toys

EXACT = 1e-9


def guaranteed(found: dict[tuple[str, str], np.ndarray]) -> None:
    """What theory says of Asteroid's planners, case by case: nothing is better than the best, "exact" is no worse than
    "paper", and "search" is the best with round trips. Baselines may share rows in ways that algorithm 1 does not find.
    """
    assert all(shares.min() >= -EXACT for (_, name), shares in found.items() if name in ASTEROID)
    assert (found[EQUATIONS, "exact"] <= found[EQUATIONS, "paper"] + EXACT).all()
    assert found[TRIPS, "search"].max() <= EXACT


def lowered(case: Case) -> bool:
    """Whether, in the fastest plan by the equations, a stage keeps fewer micro-batches in flight for want of memory."""
    stages, warmup = case.every[0]
    return list(warmup(case.count)) != [min(in_flight(behind), case.count) for behind in reversed(range(len(stages)))]


def test_regret_of_a_few(capsys: pytest.CaptureFixture[str]) -> None:
    found = regrets(toys(20, most_layers=4), judges=(EQUATIONS, TRIPS, "simulator, half-duplex"))
    with capsys.disabled():
        print(f"\n{table(found)}")
    guaranteed(found)


@pytest.mark.slow
def test_regret(capsys: pytest.CaptureFixture[str]) -> None:
    """200 clusters: all, and apart those in which the best plan has as much in flight as the equations take it to."""
    cases = toys(200)
    found = regrets(cases)
    short = np.array([lowered(case) for case in cases])
    with capsys.disabled():
        for title, which in (("all", short | True), ("in flight as by the rule", ~short), ("fewer in flight", short)):
            print(f"\n{title}: {which.sum()} clusters\n")
            print(table({key: shares[which] for key, shares in found.items()}))
    guaranteed(found)


@pytest.mark.slow
@pytest.mark.parametrize("width", [3, 4])
def test_regret_of_near_orders(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a search that takes devices from the next `width`, as it does with 12 or 16 of them; and of an exact plan by
    memory: 40 clusters of 8 devices, of which all orders can be looked at."""
    layers, near, exact = 14, list[float](), list[float]()
    monkeypatch.setattr(planner, "MOST_NEAR", layers * windows(range(8), range(8), width).num_pairs)
    for seed in range(40):
        boards = unequal(seed, 8)
        slower = (0.003, 0.01, 0.03, 1.0)[seed % 4]
        boards = replace(boards, bandwidth={name: rate * slower for name, rate in boards.bandwidth.items()})
        groups = Groups(LayerTables(uneven(layers, seed), boards), 16, 16)
        best, found, by_order = searched(groups), searched(groups, most_pairs=0), Planner(groups, exact=True).best()
        assert best is not None and found is not None and by_order is not None
        assert best.latency <= found.latency * (1 + EXACT) <= by_order.latency * (1 + 2 * EXACT)
        near.append(found.latency / best.latency - 1)
        exact.append(by_order.latency / best.latency - 1)
    with capsys.disabled():
        print(f"\n{table({('equations', f'next {width}'): np.array(near), ('equations', 'exact'): np.array(exact)})}")


@pytest.mark.parametrize("seed", range(5))
def test_equations_of_a_plan_are_those_that_planned_it(seed: int) -> None:
    case = toys(5, most_layers=4, most_devices=3)[seed]
    for exact in (False, True):
        layout = Planner(case.groups, exact=exact).best()
        if layout is not None:
            chosen = laid_out(case.groups.tables, layout.stages)
            assert case.by_equations(chosen) == pytest.approx(layout.latency, rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_one_stage_is_eddl_where_offloading_changes_nothing(seed: int) -> None:
    """Time in proportion to rows, and devices in the order of their speed."""
    speeds = sorted((1.0 + (seed * 7 + d * 3) % 5 for d in range(4)), reverse=True)
    costs, boards = uneven(5, seed), cluster(4, speeds=tuple(speeds), bandwidth=1e3)
    tables = LayerTables(costs, boards)
    shares = [Planner(Groups(tables, 8, 4, offload)).best(1) for offload in (False, True)]
    assert shares[0] is not None and shares[1] is not None
    load = Workload("toy", "toy", num_samples=32, batch_size=32)
    given = {"micro_batch_size": 8, "stages": 1}
    plans = [asteroid.plan(load, costs, boards, {**asteroid.OPTIONS, **given, "offload": o}) for o in (False, True)]
    replicas = eddl.plan(load, costs, boards, {**eddl.OPTIONS, "shares": "speed", "micro_batch_size": 8})
    assert plans[0].phases[0].actions == replicas.phases[0].actions
    same = shares[0].stages[0].rows == shares[1].stages[0].rows
    assert (plans[1].phases[0].actions == replicas.phases[0].actions) == same


@pytest.mark.parametrize("seed", range(6))
def test_a_device_per_stage_is_the_straight_pipeline(seed: int) -> None:
    """With links that cost nothing and rounds without end, what counts is the slowest stage: balanced cuts."""
    case = toy(seed)
    boards = cluster(3, speeds=(3.0, 1.0, 2.0), bandwidth=1e12)
    tables = LayerTables(case.costs, boards)
    count = 10**9
    layout = Planner(Groups(tables, ROWS, count), range(3), exact=True).best(3)
    cuts = balanced_cuts(case.costs, boards, boards.names, ROWS)
    assert layout is not None and cuts is not None
    slowest = max(
        sum(case.costs.seconds(boards.devices[d], *units, direction, ROWS) for direction in ("forward", "backward"))
        for d, units in enumerate(cuts)
    )
    assert layout.latency / count == pytest.approx(slowest, rel=1e-6)
    assert [stage.devices for stage in layout.stages] == [(0,), (1,), (2,)]
    roomy = Case(case.costs, boards, 4)
    straight = [
        chosen for chosen in roomy.every if [stage.devices for stage in chosen[0]] == [(n,) for n in boards.names]
    ]
    best = Planner(roomy.groups, range(3), exact=True).best(3)
    assert best is not None and best.latency == pytest.approx(min(map(roomy.by_equations, straight)), rel=1e-12)


def test_toys_differ_in_everything() -> None:
    cases = [toy(seed) for seed in range(30)]
    assert {len(case.cluster.devices) for case in cases} == {3, 4}
    assert {len(case.costs.units) for case in cases} == {3, 4, 5, 6}
    assert any(by_memory(case.groups.tables) != tuple(range(len(case.cluster.devices))) for case in cases)
    assert any(not case.every for case in cases) and any(len(case.every) > 500 for case in cases)
