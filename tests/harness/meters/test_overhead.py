"""What the reading of a meter costs, which is part of every gross figure."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from harness import meters
from harness.meters import Choice
from tests.harness.meters.trees import AGX_XAVIER, board, new_layout

pytestmark = pytest.mark.benchmark


def child_seconds(meter_seconds: float, root: Path) -> float:
    """Processor time of the sampling process over its whole life, with a window of that length."""
    system = board(root, "NVIDIA Jetson AGX Xavier Developer Kit")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with meters.opened(Choice("ina3221"), system) as meter:
        meter.begin()
        time.sleep(meter_seconds)
        assert meter.end().reason is None
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_reading_six_rails_at_20_hz_takes_less_than_a_hundredth_of_a_core(tmp_path: Path) -> None:
    """The most rails of any board, two files each. A long window less a short one: without the start of Python."""
    new_layout(tmp_path, AGX_XAVIER)
    short, long = 1.0, 21.0
    used = child_seconds(long, tmp_path) - child_seconds(short, tmp_path)
    share = used / (long - short)
    print(f"six rails at 20 Hz: {100 * share:.2f} % of a core, {1e6 * share / 20:.0f} us per reading")
    assert share < 0.01
