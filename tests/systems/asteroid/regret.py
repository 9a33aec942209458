"""How far planners are from the best plan there is, by Asteroid's equations and by the simulator.

A planner here is a function from a case to stages and the micro-batches that each keeps in flight, as every method
hands to `harness.search.plan_pipeline`: any such function can be measured. A plan that does not fit by eq. 3 is none.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from baselines import dapple, pipedream
from harness.cluster import Cluster
from harness.costs import BACKWARD, FORWARD, Affine, Costs
from harness.layer_tables import LayerTables
from harness.plan import Plan
from harness.schedules import Pipeline, Stage
from harness.search import Group, grouped_stages, stage_bytes
from harness.search import Layout as Stages
from harness.simulator import simulate
from harness.workload import Workload
from systems.asteroid.equations import Step, latency, tail
from systems.asteroid.groups import Groups, Placed
from systems.asteroid.layouts import laid_out
from systems.asteroid.planner import Layout, Planner, searched
from tests.harness.toys import cluster
from tests.systems.asteroid.oracle import Plain, every_order, scaled, uneven, with_trips

#: Of a case its rows per micro-batch.
ROWS = 8


EQUATIONS, TRIPS = "equations", "with round trips"
DUPLEX = {"simulator, half-duplex": "half", "simulator, full-duplex": "full"}
JUDGES = (EQUATIONS, TRIPS, *DUPLEX)


@dataclass(frozen=True)
class Case:
    """`count` micro-batches of `ROWS` rows on unequal devices."""

    costs: Costs
    cluster: Cluster
    count: int

    @cached_property
    def groups(self) -> Groups:
        return Groups(LayerTables(self.costs, self.cluster), ROWS, self.count)

    @property
    def workload(self) -> Workload:
        return Workload("toy", "toy", num_samples=ROWS * self.count, batch_size=ROWS * self.count)

    @cached_property
    def placed(self) -> list[tuple[Placed, ...]]:
        """All cuts, on all groups in all orders that fit by eq. 3, rows by algorithm 1: the fastest by the equations
        first."""
        return sorted(every_order(Plain(self.groups)), key=self.groups.latency)

    @cached_property
    def every(self) -> list[Stages]:
        return [laid_out(self.groups.tables, stages) for stages in self.placed]

    def by_equations(self, chosen: Stages, trips: bool = False) -> float:
        """Seconds by equations 4 to 6, whatever rows the devices have; with `trips` bounded by round trips."""
        steps: list[Step] = []
        rate = self.cluster.bandwidth
        for before, stage in itertools.pairwise((None, *chosen[0])):
            if before is not None:
                slowest = min(rate[name] for name in (*before.devices, *stage.devices))
                tensors = [self.costs.tensors[name] for name in self.costs.carried(stage.units[0])]
                back = [tensor for tensor in tensors if tensor.needs_grad]
                steps.append(Step(*(sum(t.bytes(ROWS) for t in ts) / slowest for ts in (tensors, back))))
            forward, backward = (max(self._passes(stage, direction)) for direction in (FORWARD, BACKWARD))
            size, trained = len(stage.devices), self.costs.weight_bytes(*stage.units)[1]
            reduce = 2 * (size - 1) * trained / (size * min(rate[name] for name in stage.devices))
            steps.append(Step(forward, backward, reduce))
        if trips:
            kept = [min(each, self.count) for each in chosen[1](self.count)]
            return float(tail(steps, self.count, kept).latency)
        return latency(steps, self.count)

    def fits(self, chosen: Stages) -> bool:
        """Whether all devices have memory for their stage, by eq. 3, and for what it keeps in flight."""
        return all(
            stage_bytes(self.costs, "sgd", *stage.units, last - first, min(kept, self.count))
            <= self.cluster.device(name).memory_bytes
            for stage, kept in zip(chosen[0], chosen[1](self.count), strict=True)
            for name, (first, last) in zip(stage.devices, stage.rows(ROWS), strict=True)
        )

    def simulated(self, chosen: Stages, duplex: str) -> float:
        """Seconds of one round."""
        stages, warmup = chosen
        pipeline = Pipeline(self.costs, tuple(stages))
        phase = pipeline.phase([ROWS] * self.count, warmup(self.count))
        plan = Plan("regret", len(self.costs.units), pipeline.tensors, (phase,))
        return simulate(plan, self.costs, replace(self.cluster, duplex=duplex)).phases[0].time_s

    def least(self, chosen: Stages) -> float:
        """No simulation is shorter: a device computes all its rows, after one pass of each stage in front of it."""
        in_front = longest = 0.0
        for stage in chosen[0]:
            both = [f + b for f, b in zip(*(self._passes(stage, d) for d in (FORWARD, BACKWARD)), strict=True)]
            longest = max(longest, in_front + self.count * max(both))
            in_front += min(seconds for seconds in both if seconds)
        return longest

    def _passes(self, stage: Stage, direction: str) -> list[float]:
        """Seconds of each device."""
        rows = [last - first for first, last in stage.rows(ROWS)]
        return [
            self.costs.seconds(self.cluster.device(name), *stage.units, direction, y)
            for name, y in zip(stage.devices, rows, strict=True)
        ]

    def seconds(self, chosen: Stages, judge: str) -> float:
        """What a judge says."""
        if judge in DUPLEX:
            return self.simulated(chosen, DUPLEX[judge])
        return self.by_equations(chosen, trips=judge == TRIPS)

    def best(self, judge: str) -> float:
        """Seconds of the plan for which a judge says least."""
        if judge in DUPLEX:
            return self.best_simulated(DUPLEX[judge])
        best = min(self.placed, key=partial(with_trips, self.groups)) if judge == TRIPS else self.placed[0]
        return self.seconds(laid_out(self.groups.tables, best), judge)

    def best_simulated(self, duplex: str) -> float:
        """Of all plans; those that can't be faster are left out."""
        best = float("inf")
        for chosen in self.every:
            least = self.least(chosen)
            if least < best:
                seconds = self.simulated(chosen, duplex)
                assert seconds >= least * (1 - 1e-9), chosen
                best = min(best, seconds)
        return best


Contestant = Callable[[Case], Stages | None]


def chosen_by(find: Callable[[Groups], Layout | None]) -> Contestant:
    """A planner of Asteroid's."""

    def contestant(case: Case) -> Stages | None:
        found = find(case.groups)
        return None if found is None else laid_out(case.groups.tables, found.stages)

    return contestant


def dapple_by(find: Callable[[dapple.Profile, int], list[Group]]) -> Contestant:
    """One of DAPPLE's planners."""

    def contestant(case: Case) -> Stages:
        profile = dapple.Profile.of(case.groups.tables, ROWS, case.count)
        stages = grouped_stages(case.costs, case.cluster, find(profile, len(case.cluster.devices)))
        kept = dapple.in_flight(case.workload, case.costs, case.cluster, stages, ROWS, dapple.PB)
        return stages, lambda _: kept

    return contestant


def by_pipedream(case: Case) -> Stages:
    """PipeDream's planner."""
    stages = pipedream.stages(case.workload, case.costs, case.cluster, ROWS)
    kept = pipedream.in_flight(stages)
    return stages, lambda _: kept


#: Asteroid's.
ASTEROID: dict[str, Contestant] = {
    "paper": chosen_by(lambda groups: Planner(groups).best()),
    "exact": chosen_by(lambda groups: Planner(groups, exact=True).best()),
    "search": chosen_by(searched),
}
#: Those of baselines, which take devices to be equal.
BASELINES: dict[str, Contestant] = {
    "DAPPLE": dapple_by(dapple.released),
    "DAPPLE, pivot": dapple_by(dapple.pivoted),
    "PipeDream": by_pipedream,
}
PLANNERS = ASTEROID | BASELINES


def toy(seed: int, most_layers: int = 6, most_devices: int = 4) -> Case:
    """3 to 6 layers of unequal work and size on 3 or 4 devices with unequal speed, memory and links: from links that
    cost nothing to some that cost more than all else, from room for everything to hardly enough. Of each three cases
    one has kernels that take as long as about a row, so that time is not in proportion to rows."""
    draw = random.Random(seed)
    num_layers, num_devices = draw.randint(3, most_layers), draw.randint(3, most_devices)
    costs = uneven(num_layers, seed)
    kernels = draw.choice((0, 0, 1))
    units = tuple(
        replace(
            unit,
            forward=unit.forward._replace(kernels=Affine(kernels)),
            backward=scaled(unit.backward, draw.uniform(0.7, 1.4))._replace(kernels=Affine(2 * kernels)),
        )
        for unit in costs.units
    )
    costs = replace(costs, key=f"regret {seed}", units=units)
    boards = cluster(num_devices, speeds=tuple(draw.choice((1.0, 2.0, 3.5, 5.0)) for _ in range(num_devices)))
    whole = LayerTables(costs, boards).bytes(ROWS, 1)[0, num_layers]
    tight, link = draw.choice((0.4, 0.8, 10.0)), 10 ** draw.uniform(1.3, 4)
    devices = tuple(
        replace(board, memory_bytes=int(whole * tight * draw.uniform(0.7, 2)), kernel_overhead_s=draw.uniform(0.2, 0.6))
        for board in boards.devices
    )
    bandwidth = {device.name: link * draw.choice((1, 1, 3, 10)) for device in devices}
    return Case(costs, replace(boards, devices=devices, bandwidth=bandwidth), draw.choice((4, 8)))


def toys(count: int, most_layers: int = 6, most_devices: int = 4) -> list[Case]:
    """The first so many in which anything fits."""
    every = (toy(seed, most_layers, most_devices) for seed in itertools.count())
    return list(itertools.islice((case for case in every if case.every), count))


def regrets(
    cases: Sequence[Case], planners: Mapping[str, Contestant] = PLANNERS, judges: Iterable[str] = JUDGES
) -> dict[tuple[str, str], np.ndarray]:
    """By judge and planner: how much longer its plan takes than the best one there is, as a share, of each case;
    infinite where it finds none."""
    found: dict[tuple[str, str], list[float]] = {}
    for case in cases:
        chosen = {name: planner(case) for name, planner in planners.items()}
        chosen = {name: found if found and case.fits(found) else None for name, found in chosen.items()}
        for judge in judges:
            best = case.best(judge)
            for name, stages in chosen.items():
                seconds = float("inf") if stages is None else case.seconds(stages, judge)
                found.setdefault((judge, name), []).append(seconds / best - 1)
    return {key: np.array(shares) for key, shares in found.items()}


def table(found: Mapping[tuple[str, str], np.ndarray]) -> str:
    """Cases without a plan, those with the best one, and of all with a plan how regrets are distributed."""
    lines = ["| judge | planner | no plan | best plan | median | p90 | max |", "|---|---|---:|---:|---:|---:|---:|"]
    for (judge, name), shares in found.items():
        planned = shares[np.isfinite(shares)]
        figures = ((shares < 1e-9).mean(), np.median(planned), np.quantile(planned, 0.9), planned.max())
        cells = (f"{np.isinf(shares).sum()}", *(f"{figure:.1%}" for figure in figures))
        lines.append(f"| {judge} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
