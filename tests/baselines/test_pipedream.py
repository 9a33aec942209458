"""PipeDream's dynamic program against brute force by its own objective, closed forms, and what it keeps in flight."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean

import pytest

from baselines import pipedream
from harness.cluster import Cluster
from harness.costs import BACKWARD, FORWARD, Costs
from harness.errors import OrreryError, OutOfMemory, Unsupported
from harness.plan.validate import validate
from harness.schedules import Stage
from harness.search import plan_pipeline
from harness.simulator import simulate
from harness.workload import Workload
from systems.pac.planner import Split
from tests.harness.toys import SAVED, chain, cluster
from tests.systems.asteroid.test_planner import unequal, uneven
from tests.systems.pac.every import every_split
from tests.systems.pac.every import uneven as exactly

LOAD = Workload("toy", "toy", num_samples=32, batch_size=32)


def split_of(costs: Costs, stages: list[Stage]) -> Split:
    """Of stages whose layers are one unit each."""
    return Split(tuple(stage.units for stage in stages), tuple(len(stage.devices) for stage in stages))


def slowest(costs: Costs, boards: Cluster, split: Split, rows: int, transfers: bool, memory: bool) -> float:
    """The objective, written down stage by stage."""
    rate, worst = min(boards.bandwidth.values()), 0.0
    for (x, y), m, (_, taken) in zip(split.layers, split.groups, split.devices(), strict=True):
        passes = [sum(costs.seconds(board, x, y, d, rows) for d in (FORWARD, BACKWARD)) for board in boards.devices]
        weights = sum(costs.parameters[f"w{i}"].bytes for i in range(x, y))
        kept = rows * sum(SAVED + 4 * 16 * (i > 0) for i in range(x, y))
        stashes = math.ceil((len(boards.devices) - taken) / m)
        if m > rows or (memory and stashes * (weights + kept) > min(board.memory_bytes for board in boards.devices)):
            return math.inf
        worst = max(worst, (fmean(passes) + 4 * (m - 1) / m * weights / rate) / m)
        if transfers and x:
            crossing = [costs.tensors[f"h{cut - 1}"].bytes(rows) for cut in (x, y) if cut < len(costs.units)]
            worst = max(worst, 2 * max(crossing) / (rate * m))
    return worst


@pytest.mark.parametrize("transfers", [False, True])
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_no_other_stages_have_a_faster_slowest_one(seed: int, transfers: bool, memory: bool) -> None:
    costs, rows = uneven(6, seed), (16, 2)[seed % 2]
    boards = replace(
        unequal(seed, 5, memory), bandwidth=dict.fromkeys(unequal(seed, 5).names, (2e1, 1e3, 1e6)[seed % 3])
    )
    best = min(slowest(costs, boards, split, rows, transfers, memory) for split in every_split(6, 5))
    found = pipedream.stages(LOAD, costs, boards, rows, transfers, memory)
    if best == math.inf:  # what lacks is left to the simulator
        assert memory and found == pipedream.stages(LOAD, costs, boards, rows, transfers)
    else:
        assert slowest(costs, boards, split_of(costs, found), rows, transfers, memory) == pytest.approx(best)
    assert [name for stage in found for name in stage.devices] == list(boards.names)
    assert all(stage.shares == (1.0,) * len(stage.devices) for stage in found)


def grouping(costs: Costs, boards: Cluster, rows: int = 16, **options: bool) -> list[int]:
    return [len(stage.devices) for stage in pipedream.stages(LOAD, costs, boards, rows, **options)]


def test_where_layers_divide_evenly_it_never_replicates() -> None:
    """Then the slowest stage has 1/N of the time without any all-reduce, however fast that would be."""
    assert grouping(chain(8), cluster(4, bandwidth=1e15)) == [1, 1, 1, 1]
    assert grouping(chain(8, parameters=10**6), cluster(4, bandwidth=1e2)) == [1, 1, 1, 1]


def test_where_they_do_not_the_link_decides() -> None:
    """Three equal layers on two devices: 2 t against (3 t + 2 W/b) / 2, so that b = 2 W/t is where it turns."""
    costs = chain(3)  # t = 3 s per row, W = 3 * 3360 bytes
    turn = 2 * 3 * 4 * 840 / (16 * 3.0)
    assert grouping(costs, cluster(2, bandwidth=turn * 1.01)) == [2]
    assert grouping(costs, cluster(2, bandwidth=turn * 0.99)) == [1, 1]


def test_work_in_front_and_weights_behind_are_split_as_of_old() -> None:
    """As convolutions and the layers after them, for which PipeDream is known."""
    assert grouping(exactly([3, 1], [1, 10**6]), cluster(4, bandwidth=1e3)) == [3, 1]


def test_transfers_count_only_when_asked_for() -> None:
    wide, boards = chain(4, width=10**6), cluster(4, bandwidth=1e5)
    assert grouping(wide, boards) == [1, 1, 1, 1]
    assert grouping(wide, boards, transfers=True) == [4]


def test_in_flight_a_replica_has_as_many_rows_as_in_pipedream() -> None:
    """Of 2-1-1 the first two devices have 4 halves, NUM_OPT_ACTIVE_MINIBATCHES = ceil(4 / 2) whole micro-batches."""
    names = cluster(4).names

    def kept(*sizes: int) -> list[int]:
        return pipedream.in_flight([Stage((p, p + 1), names[:size], (1,) * size) for p, size in enumerate(sizes)])

    assert kept(1, 1, 1, 1) == [4, 3, 2, 1]
    assert kept(2, 1, 1) == [4, 2, 1]
    assert kept(1, 3) == [4, 3]
    assert kept(4) == [4]


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (3, 1), (4, 2, 1, 1)])
def test_that_keeps_the_pipe_full(sizes: tuple[int, ...]) -> None:
    """Where stages take equally long and links no time, M micro-batches take as long as M + P - 1 passes of one."""
    boards = cluster(sum(sizes), bandwidth=1e15)
    costs = exactly(list(sizes), [1] * len(sizes))
    taken = [sum(sizes[:p]) for p in range(len(sizes) + 1)]
    stages = [Stage((p, p + 1), boards.names[taken[p] : taken[p + 1]], (1.0,) * size) for p, size in enumerate(sizes)]
    kept, rows = pipedream.in_flight(stages), 12
    load = Workload("toy", "toy", num_samples=24 * rows, batch_size=24 * rows)
    made = plan_pipeline(
        "pipedream", load, costs, boards, lambda _: (stages, lambda _: kept), {"micro_batch_size": rows}
    )
    assert simulate(made, costs, boards).total_s == pytest.approx((24 + len(sizes) - 1) * 3 * rows, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"transfers": True}, {"memory": True}])
@pytest.mark.parametrize("seed", range(4))
def test_plans_are_valid_and_run(seed: int, options: dict[str, object]) -> None:
    costs, boards = uneven(5, seed), unequal(seed, 4)
    plan = pipedream.plan(LOAD, costs, boards, {**pipedream.OPTIONS, **options})
    validate(plan, costs)
    assert sorted(plan.devices) == sorted(boards.names)
    assert simulate(plan, costs, boards).total_s > 0


def test_what_does_not_fit_is_out_of_memory_and_what_cannot_be_is_unsupported() -> None:
    tiny = cluster(3, memory_bytes=100)
    for memory in (False, True):
        with pytest.raises(OutOfMemory, match=r"device\d needs"):
            pipedream.plan(LOAD, chain(4), tiny, {**pipedream.OPTIONS, "memory": memory})
    with pytest.raises(Unsupported, match="each device needs a row"):
        pipedream.plan(LOAD, chain(2), cluster(3), {**pipedream.OPTIONS, "micro_batch_size": 1})
    with pytest.raises(OrreryError, match=r"pipedream\.transfers"):
        pipedream.plan(LOAD, chain(4), tiny, {**pipedream.OPTIONS, "transfers": "yes"})
