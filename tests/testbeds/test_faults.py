"""Devices that crash or hang, for real: the others go on, and what is trained is what no failure leaves.

Of the grid of faults a seeded dozen runs always, the
rest with the slow tests.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from harness import runner
from harness.engine import Execution
from harness.errors import Broken, OrreryError
from harness.experiment import one
from harness.faults import CRASH, HANG
from harness.resume import COMMITTED
from systems import asteroid
from testbeds import emulated, library
from tests.testbeds.faults import ASKED, Bed, check, grid, marked, opened, plan_of
from tests.testbeds.processes import nothing_left, own_folders

__all__ = ["own_folders"]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc"),
    pytest.mark.usefixtures("own_folders"),
]


@pytest.fixture(scope="module")
def bed(own_folders: Path) -> Iterator[Bed]:
    with nothing_left(own_folders), emulated.opened(library.load("local-4")) as execute:
        yield opened("local-4", execute)


@pytest.fixture(scope="module")
def undisturbed(bed: Bed) -> Execution:
    found = bed.run()
    assert not found.recoveries and found.max_rel_error is not None and found.max_rel_error < 1e-5
    return found


@pytest.mark.parametrize("fault", marked(grid((CRASH, HANG)), 9))
def test_the_others_go_on(fault: str, bed: Bed, undisturbed: Execution) -> None:
    check(bed.run(fault), undisturbed, fault)


def test_two_are_lost_one_after_the_other(bed: Bed, undisturbed: Execution) -> None:
    found = bed.run("crash device1 at step 4; crash device3 at step 8 during backward")
    first, second = found.recoveries
    assert (first["back_to_round"], second["back_to_round"]) == (3, 6)
    assert found.max_rel_error is not None and found.max_rel_error < 1e-5
    assert found.losses == pytest.approx(undisturbed.losses, rel=1e-5)


def test_a_second_one_is_lost_before_there_is_another_snapshot(bed: Bed, undisturbed: Execution) -> None:
    found = bed.run("crash device0 at step 4; crash device2 at step 5")
    assert [recovery["back_to_round"] for recovery in found.recoveries] == [3, 3]
    assert found.max_rel_error is not None and found.max_rel_error < 1e-5
    assert found.losses == pytest.approx(undisturbed.losses, rel=1e-5)


def test_heavy_rescheduling_ends_with_the_same(bed: Bed, undisturbed: Execution) -> None:
    fault = "crash device3 at step 7"
    check(bed.run(fault, asteroid.HEAVY), undisturbed, fault)


def same(found: Execution, undisturbed: Execution) -> None:
    assert found.max_rel_error is not None and found.max_rel_error < 1e-5
    assert found.losses == pytest.approx(undisturbed.losses, rel=1e-5)


@pytest.mark.parametrize("device", [f"device{number}" for number in range(4)])
def test_one_that_leaves_is_there_until_the_next_snapshot(device: str, bed: Bed, undisturbed: Execution) -> None:
    found = bed.run(f"leave {device} at step 4")
    same(found, undisturbed)
    (recovery,) = found.recoveries
    assert (recovery["in_round"], recovery["back_to_round"], recovery["replay_s"]) == (6, 6, 0)
    assert recovery["detect_s"] == 0
    assert device not in found.trace.devices


def test_one_that_joins_takes_part_from_the_next_snapshot_on(bed: Bed, undisturbed: Execution) -> None:
    smaller = replace(bed, plan=plan_of(("device0",), ("device1", "device2"), costs=bed.costs))
    found = smaller.run("join device3 at step 2")
    same(found, undisturbed)
    (recovery,) = found.recoveries
    assert (recovery["in_round"], recovery["back_to_round"], recovery["replay_s"]) == (3, 3, 0)
    assert recovery["moved_bytes"] > 0
    assert set(found.trace.devices) == set(bed.cluster.names)


def test_one_joins_one_leaves_and_one_is_lost(bed: Bed, undisturbed: Execution) -> None:
    smaller = replace(bed, plan=plan_of(("device0",), ("device1", "device2"), costs=bed.costs))
    found = smaller.run("join device3 at step 0; leave device1 at step 2; crash device0 at step 7 during backward")
    same(found, undisturbed)
    assert [recovery["back_to_round"] for recovery in found.recoveries] == [0, 3, 6]
    assert set(found.trace.devices) == {"device2", "device3"}


def test_one_that_has_just_joined_is_lost(bed: Bed, undisturbed: Execution) -> None:
    smaller = replace(bed, plan=plan_of(("device0",), ("device1", "device2"), costs=bed.costs))
    for lost in ("device3", "device1"):
        found = smaller.run(f"join device3 at step 3; crash {lost} at step 4")
        same(found, undisturbed)
        assert [recovery["back_to_round"] for recovery in found.recoveries] == [3, 3]


def test_one_that_was_lost_comes_back(bed: Bed, undisturbed: Execution) -> None:
    found = bed.run("crash device2 at step 1; join device2 at step 2; hang device0 at step 4; join device0 at step 5")
    same(found, undisturbed)
    assert [recovery["back_to_round"] for recovery in found.recoveries] == [0, 3, 3, 6]
    assert set(found.trace.devices) == set(bed.cluster.names)


def test_where_nothing_is_shaped_no_device_can_be_slow(bed: Bed) -> None:
    with pytest.raises(OrreryError, match=r"devices have neither links nor a speed of their own"):
        bed.run("slow 2x device1 at step 4")


def test_without_the_only_copy_the_run_ends_and_says_so(bed: Bed) -> None:
    with pytest.raises(Broken, match=r"had the only copy of what units 0 to \d+ have learned.*snapshot was of round 3"):
        bed.run("crash device1 at step 4; crash device0 at step 5")


def test_with_resume_it_says_where_the_last_checkpoint_is(
    bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.Testbeds, "execute", lambda self, request: bed.execute)  # it is open
    asked = {**ASKED, "testbed": "local-4", "inject": "crash device3 at step 7; crash device0 at step 8"}
    del asked["steps"]
    asked |= {"num_samples": 40, "epochs": 3}
    request = one(asked, {"replication_period": 3, "stages": 4})
    (outcome,) = runner.sweep([request], tmp_path, resume=True)
    assert outcome.record.status == "failed" and outcome.record.reason is not None
    found = re.search(r"had the only copy.* up to epoch 1 is in (\S+): run again with --resume", outcome.record.reason)
    assert found is not None and (Path(found[1]) / COMMITTED).exists()


def test_a_fault_that_never_strikes_is_no_success(bed: Bed) -> None:
    with pytest.raises(Broken, match="never struck"):
        bed.run("crash device0 at step 3 during all-reduce")


def test_faults_are_for_plans_that_can_go_on() -> None:
    for asked, reason in (
        ({"method": "gpipe"}, "does not plan again where devices change"),
        ({}, "Set asteroid.replication_period"),
    ):
        request = one({**ASKED, **asked, "testbed": "local-4", "inject": "crash device1 at step 4"}, {})
        with pytest.raises(OrreryError, match=reason):
            runner.run(request)
