"""Data parallelism with shares in proportion to speed, on unequal boards."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baselines import eddl
from harness.errors import OutOfMemory
from harness.plan.validate import validate
from harness.search import overflow
from harness.simulator import simulate
from harness.workload import Workload
from tests.harness.toys import SAVED, chain, cluster

LOAD = Workload("toy", "toy", num_samples=32, batch_size=32)
BY_SPEED = {**eddl.OPTIONS, "shares": "speed"}


def test_a_batch_takes_as_long_as_all_speeds_together() -> None:
    """Where links take no time: 4 layers of 3 s per row, 32 rows, and 1 + 2 + 5 rows in that time."""
    costs, boards = chain(4), cluster(3, speeds=(1.0, 2.0, 5.0), bandwidth=1e15)
    plan = eddl.plan(LOAD, costs, boards, BY_SPEED)
    validate(plan, costs)
    assert plan.summary["rows"] == [[4, 8, 20]]
    assert simulate(plan, costs, boards).total_s == pytest.approx(4 * 3 * 32 / 8)


def test_a_fast_board_with_little_memory_makes_micro_batches_small() -> None:
    """It keeps its share, 3 of 4 rows, of as many rows as fit; where one row does not, that is said of it."""
    costs, boards = chain(4, parameters=10), cluster(2, speeds=(1.0, 3.0), bandwidth=1e9)
    kept = 4 * SAVED + 3 * 4 * 16

    def with_room_for(rows: int):  # type: ignore[no-untyped-def]
        fast = replace(boards.devices[1], memory_bytes=rows * kept + kept // 2)
        return replace(boards, devices=(boards.devices[0], fast))

    tight = with_room_for(12)
    plan = eddl.plan(LOAD, costs, tight, BY_SPEED)
    assert plan.summary["micro_batch_size"] == 16 and plan.summary["rows"] == [[4, 12]]
    assert overflow(simulate(plan, costs, tight), tight) is None
    with pytest.raises(OutOfMemory, match="device1 needs"):
        eddl.plan(LOAD, costs, with_room_for(0), BY_SPEED)
