"""One device of several trains alone: the first one, one by its name, or the fastest."""

from __future__ import annotations

import pytest

from baselines import standalone
from harness.errors import OrreryError
from harness.simulator import simulate
from harness.workload import Workload
from tests.harness.toys import chain, cluster

LOAD = Workload("toy", "toy", num_samples=32, batch_size=32)
BOARDS = cluster(4, speeds=(1.0, 2.0, 5.0, 5.0))


@pytest.mark.parametrize(
    ("device", "trains", "speed"), [(None, "device0", 1), ("device1", "device1", 2), ("fastest", "device2", 5)]
)
def test_who_trains(device: str | None, trains: str, speed: int) -> None:
    """32 rows of 4 layers take 3 GFLOP each; devices have so many GFLOP/s. The first of the fastest is taken."""
    plan = standalone.plan(LOAD, chain(4), BOARDS, {**standalone.OPTIONS, "device": device})
    assert plan.devices == (trains,)
    assert simulate(plan, chain(4), BOARDS).total_s == pytest.approx(32 * 4 * 3 / speed, rel=1e-3)


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(OrreryError, match="no device of the testbed called 'device9'"):
        standalone.plan(LOAD, chain(4), BOARDS, {**standalone.OPTIONS, "device": "device9"})
