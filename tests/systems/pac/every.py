"""Every hybrid of data and pipeline parallelism there is, simulated: what a planner's choice is held against.

A plan can't be faster than its busiest device: so plans are simulated in the order of that bound, until it passes the
best one found. What is left out is thus slower for certain.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from harness.cluster import Cluster
from harness.costs import BACKWARD, FORWARD, Affine, Costs, Work
from harness.errors import OutOfMemory, Unsupported
from harness.schedules import Stage, micro_batches
from harness.search import micro_batch_sizes, plan_pipeline, stage_bytes
from harness.simulator import simulate
from harness.workload import Workload
from systems import pac
from systems.pac.planner import Profile, Split
from tests.harness.toys import chain


def uneven(work: list[int], parameters: list[int]) -> Costs:
    """A chain whose layers take `work` seconds in all and have so many parameters."""
    costs = chain(len(work))
    units = tuple(
        replace(
            unit,
            forward=Work(matmul=Affine(0, w * 1e9)),
            backward=Work(matmul=Affine(0, w * 2e9)),
        )
        for unit, w in zip(costs.units, work, strict=True)
    )
    weights = {name: replace(w, numel=n) for (name, w), n in zip(costs.parameters.items(), parameters, strict=True)}
    return replace(costs, units=units, parameters=weights)


def every_split(num_layers: int, num_devices: int) -> Iterator[Split]:
    for count in range(1, min(num_layers, num_devices) + 1):
        for cuts in itertools.combinations(range(1, num_layers), count - 1):
            for edges in itertools.combinations(range(1, num_devices), count - 1):
                layers = tuple(itertools.pairwise((0, *cuts, num_layers)))
                yield Split(layers, tuple(b - a for a, b in itertools.pairwise((0, *edges, num_devices))))


@dataclass(frozen=True)
class Best:
    """The fastest plan there is: seconds of the whole run; and how many plans there are, and were simulated."""

    seconds: float
    micro_batch: int
    split: Split
    num_plans: int
    num_simulated: int


def best_of_all(workload: Workload, costs: Costs, cluster: Cluster) -> Best | None:
    """The fastest of all cuts, groupings and sizes of micro-batches with rows shared evenly; None where none fits."""
    profile = Profile(costs, cluster, workload.optimizer)
    every = list(every_split(profile.num_layers, len(cluster.devices)))
    possible = [
        (least_seconds(workload, costs, cluster, size, pac.stages(profile, split)), size, split)
        for size in micro_batch_sizes(workload.batch_size)
        for split in every
        if max(split.groups) <= size and may_fit(workload, costs, cluster, size, pac.stages(profile, split))
    ]
    best: tuple[float, int, Split] | None = None
    simulated = 0
    for least, size, split in sorted(possible, key=lambda plan: plan[:2]):
        if best is not None and least >= best[0]:
            break
        simulated += 1
        seconds = simulated_seconds(workload, costs, cluster, size, pac.stages(profile, split))
        if seconds is not None:
            assert seconds >= least * (1 - 1e-9), (size, split)
            if best is None or seconds < best[0]:
                best = seconds, size, split
    return None if best is None else Best(*best, num_plans=len(possible), num_simulated=simulated)


def simulated_seconds(
    workload: Workload, costs: Costs, cluster: Cluster, size: int, stages: list[Stage]
) -> float | None:
    """Seconds of the whole run; None where it does not fit, or no such plan can be made."""
    warmup = [len(stages) - p for p in range(len(stages))]
    fixed = {"micro_batch_size": size}
    try:
        made = plan_pipeline("pac", workload, costs, cluster, lambda _: (stages, lambda count: warmup), fixed)
    except (OutOfMemory, Unsupported):
        return None
    return simulate(made, costs, cluster).total_s


def chosen_seconds(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> float:
    """Seconds of the whole run by PAC's own plan."""
    made = pac.plan(workload, costs, cluster, {**pac.OPTIONS, **options})
    return simulate(made, costs, cluster).total_s


def least_seconds(workload: Workload, costs: Costs, cluster: Cluster, size: int, stages: list[Stage]) -> float:
    """No run of the plan is shorter: iteration by iteration a device computes all of its rows, after a first forward
    and before a last backward pass of each stage in front of it. The first stage waits for its update in between."""
    total = 0.0
    for batch_size, repeat in workload.batches():
        in_front = longest = 0.0
        for stage in stages:
            rows = [stage.rows(count) for count in micro_batches(batch_size, size)]
            passes = [
                [
                    sum(costs.seconds(cluster.device(name), *stage.units, d, high - low) for d in (FORWARD, BACKWARD))
                    for low, high in mine
                    if high > low
                ]
                for name, mine in zip(stage.devices, zip(*rows, strict=True), strict=True)
            ]
            longest = max(longest, in_front + max(map(sum, passes)))
            in_front += min(min(its) for its in passes if its)
        total += repeat * longest
    return total


def may_fit(workload: Workload, costs: Costs, cluster: Cluster, size: int, stages: list[Stage]) -> bool:
    """Whether weights, optimizer state and what is kept in flight, without any gradient, are within each memory."""
    count = len(micro_batches(workload.batch_size, size))
    for place, stage in enumerate(stages):
        in_flight = min(count, len(stages) - place)
        _, gradients = costs.weight_bytes(*stage.units)
        for name, (low, high) in zip(stage.devices, stage.rows(size), strict=True):
            least = stage_bytes(costs, workload.optimizer, *stage.units, high - low, in_flight) - gradients
            if least > cluster.device(name).memory_bytes:
                return False
    return True
