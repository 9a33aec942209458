"""Devices that are cut off, or become slow, on a shaped testbed: as `test_faults`, for what needs rights."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.engine import Execution
from harness.faults import CUT
from testbeds import emulated, library
from tests.testbeds.faults import Bed, check, grid, marked, opened
from tests.testbeds.processes import nothing_left, own_folders

__all__ = ["own_folders"]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc"),
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces"),
    pytest.mark.usefixtures("own_folders"),
]
#: As slow as four of these are, this machine is not busy.
SHAPED = """
description = "Four slow devices of this machine at 200 Mbit/s"
modes = ["emulated"]

[[devices]]
profile = "this-machine"
count = 4
cpu_share = 0.1

[link]
medium = "ethernet"
duplex = "full"
nominal_mbit_per_s = { value = 200, provenance = "definition", source = "a testbed of this test" }
tcp_efficiency = { value = 0.94, provenance = "derived", source = "1448 bytes of payload in 1538 bytes on the wire" }
latency_s = { value = 0.0005, provenance = "definition", source = "a testbed of this test" }
"""


@pytest.fixture(scope="module")
def shaped(own_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    path = tmp_path_factory.mktemp("testbed") / "slow-4.toml"
    path.write_text(SHAPED)
    with nothing_left(own_folders), emulated.opened(library.load(str(path))) as execute:
        yield opened(str(path), execute)


@pytest.fixture(scope="module")
def undisturbed(shaped: Bed) -> Execution:
    found = shaped.run()
    assert not found.recoveries and found.max_rel_error is not None and found.max_rel_error < 1e-5
    return found


@pytest.mark.parametrize("fault", marked(grid((CUT,)), 3))
def test_the_others_go_on_without_one_that_is_cut_off(fault: str, shaped: Bed, undisturbed: Execution) -> None:
    check(shaped.run(fault), undisturbed, fault)


def test_a_slow_device_is_noticed_and_gets_less_to_do(shaped: Bed, undisturbed: Execution) -> None:
    fault = "slow 3x device2 at step 3"
    left_alone = shaped.run(fault)
    assert not left_alone.recoveries
    found = shaped.run(fault, straggler=1.5)
    for run in (left_alone, found):
        assert run.max_rel_error is not None and run.max_rel_error < 1e-5
        assert run.losses == pytest.approx(undisturbed.losses, rel=1e-5)
    (recovery,) = found.recoveries
    assert (recovery["fault"], recovery["in_round"], recovery["back_to_round"]) == (fault, 3, 6)
    assert recovery["replay_s"] == 0 and recovery["detect_s"] > 0
    busy = found.trace.busy_s
    assert busy["device2"]["compute"] < 2 * busy["device1"]["compute"], "it has become a third, and so has its work"
