"""A long row of losses, slow devices, leaves and joins at random: the run goes on, and nothing leaks."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from harness.cluster import Cluster
from harness.faults import CRASH, CUT, HANG, JOIN, LEAVE, LOSSES, SLOW, Fault
from harness.recovery import Change, Resumed
from harness.workload import Workload
from systems import asteroid
from testbeds import emulated, library
from testbeds.simulation.recovery import run
from tests.harness.toys import chain, cluster
from tests.testbeds.faults import PERIOD, opened
from tests.testbeds.processes import family, nothing_left, own_folders, resident_bytes

__all__ = ["own_folders"]

LEAST_DEVICES = 3
HOUR_S = 3600.0


def drawn(seed: int, devices: Sequence[str], kinds: Sequence[str], count: int, gap: int) -> list[Fault]:
    """So many events, the next one up to two gaps later; there are always some devices there, and all in the beginning.

    gap: rounds, at least those between two snapshots: two losses at once may take the only copy of something.
    """
    draw = random.Random(seed)
    present, step, found = set(devices), 0, list[Fault]()
    for _ in range(count):
        step += draw.randint(gap, 2 * gap)
        absent = set(devices) - present
        allowed = [kind for kind in kinds if (absent if kind == JOIN else kind == SLOW or len(present) > LEAST_DEVICES)]
        kind = draw.choice(allowed)
        device = draw.choice(sorted(absent if kind == JOIN else present))
        if kind == JOIN:
            present.add(device)
        elif kind != SLOW:
            present.remove(device)
        during = draw.choice((None, "forward", "backward", "update")) if kind in LOSSES else None
        found.append(Fault(kind, device, step, during, factor=draw.choice((1.5, 2.0, 4.0)) if kind == SLOW else 1.0))
    return found


@pytest.mark.parametrize("count", [15, pytest.param(100, marks=pytest.mark.slow)])
def test_changes_in_virtual_time(count: int) -> None:
    period = 4
    boards = replace(cluster(8, speeds=(1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0), memory_bandwidth=1e10), latency_s=1e-3)
    faults = drawn(5, boards.names, (CRASH, HANG, CUT, SLOW, LEAVE, JOIN), count, 2 * period)
    rounds = faults[-1].step + 2 * period
    workload = Workload(
        "toy", "synthetic", num_samples=16 * rounds, batch_size=16, steps=rounds, optimizer="sgd-momentum"
    )
    costs = chain(12, forward_flops=1e8, backward_flops=2e8)
    options = {**asteroid.OPTIONS, "micro_batch_size": 16, "replication_period": period, "straggler": 1.4}
    resident: list[int] = []

    def replan(boards: Cluster, change: Change) -> Resumed | None:
        resident.append(resident_bytes(os.getpid()))
        return asteroid.replan(workload, costs, boards, options, change)

    plan = asteroid.plan(workload, costs, boards, options)
    trace, found, total_s = run(plan, costs, boards, faults, replan, 3.0)
    assert found[-1]["back_to_round"] + sum(p.repeat for p in trace.phases if p.name == "train") == rounds
    struck = [text for recovery in found for text in recovery["fault"].split("; ")]
    wanted = [str(fault) for fault in faults if fault.kind != SLOW]
    assert [text for text in struck if not text.startswith(SLOW)] == wanted
    assert any(text.startswith(SLOW) for text in struck)
    assert all(after["back_to_round"] >= before["back_to_round"] for before, after in pairwise(found))
    assert total_s > count / 100 * HOUR_S
    half = len(resident) // 2
    assert max(resident[half:]) - max(resident[:half]) < 32 * 2**20


class Watch(threading.Thread):
    """Looks now and then how many processes there are below this one, and how many files the one with most has open."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.processes: list[int] = []
        self.files: list[int] = []
        self.enough = threading.Event()

    def run(self) -> None:
        while not self.enough.wait(0.25):
            pids = family(os.getpid())
            open_files = [0]
            for pid in pids:
                with contextlib.suppress(OSError):  # it has just ended
                    open_files.append(len(os.listdir(f"/proc/{pid}/fd")))
            self.processes.append(len(pids))
            self.files.append(max(open_files))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_twenty_changes_for_real(own_folders: Path) -> None:
    devices = tuple(f"device{number}" for number in range(4))
    faults = drawn(11, devices, (CRASH, HANG, LEAVE, JOIN), 20, PERIOD)
    with nothing_left(own_folders), emulated.opened(library.load("local-4")) as execute:
        bed = opened("local-4", execute, rounds=faults[-1].step + 2 * PERIOD)
        undisturbed = bed.run()
        mine, watch = resident_bytes(os.getpid()), Watch()
        watch.start()
        found = bed.run("; ".join(map(str, faults)))
        watch.enough.set()
        watch.join()
        assert [recovery["fault"] for recovery in found.recoveries] == [str(fault) for fault in faults]
        assert found.max_rel_error is not None and found.max_rel_error < 1e-5
        assert found.losses == pytest.approx(undisturbed.losses, rel=1e-5)
        assert resident_bytes(os.getpid()) - mine < 64 * 2**20
        survivors = set(devices) - {fault.device for fault in faults}
        peaks = [run.trace.process_peak_bytes for run in (undisturbed, found)]
        for device in survivors & set(found.trace.devices):
            assert peaks[1][device] - peaks[0][device] < 64 * 2**20
        for seen in (watch.processes, watch.files):
            quarter = len(seen) // 4
            assert max(seen[-quarter:]) <= max(seen[:quarter]) + 1
