"""A hundred runs in a row, and ten deaths among them: nothing is left behind, and nothing grows."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from harness import store
from tests.testbeds.processes import (
    family,
    lives,
    nothing_left,
    own_folders,
    resident_bytes,
    supervisors,
    wait_for,
    worker,
)

__all__ = ["own_folders"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")]
ROOT = Path(__file__).resolve().parents[1]
NUM_RUNS, SEED = 100, 7
DEATHS = ("worker",) * 4 + ("supervisor",) * 3 + ("runner",) * 3
#: How much a process may grow from its third run to its last.
GROWTH_BYTES = 4 * 2**20
MORE_DESCRIPTORS = 3
LIMIT_S = 1200.0

EXPERIMENT = f"""
[workload]
model = "bert-tiny"
dataset = "synthetic"
num_samples = 16
batch_size = 8
seq_len = 16
steps = 4
seed = {list(range(NUM_RUNS // 2))}
[run]
method = ["gpipe", "eddl"]
testbed = "local-2"
mode = "emulated"
[options.gpipe]
micro_batch_size = 4
"""

RUNNER = """
import sys
from pathlib import Path
from harness import experiment, runner
for outcome in runner.sweep(experiment.read(Path(sys.argv[1])), Path(sys.argv[2])):
    print(outcome.record.status, outcome.record.reason)
"""


@dataclass
class Watch:
    """What was seen of each process, at the end of each run that it took part in."""

    resident: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    descriptors: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    seen: set[int] = field(default_factory=set)

    def look(self, runner: int) -> None:
        try:
            for pid in supervisors(runner):
                if resident := resident_bytes(pid):  # one that has just ended has none
                    self.resident[pid].append(resident)
            self.descriptors[runner].append(len(os.listdir(f"/proc/{runner}/fd")))
        except OSError:
            pass  # it died meanwhile
        self.seen.update(family(runner))


def test_a_hundred_runs_and_ten_deaths(own_folders: Path, tmp_path: Path) -> None:
    experiment, out = tmp_path / "storm.toml", tmp_path / "out"
    experiment.write_text(EXPERIMENT)
    chance = random.Random(SEED)
    moments = sorted(chance.sample(range(3, NUM_RUNS - 3), len(DEATHS)))
    deaths = list(zip(moments, chance.sample(DEATHS, len(DEATHS)), strict=True))
    watch, began, killed_runners = Watch(), time.monotonic(), 0
    with nothing_left(own_folders), open(tmp_path / "errors", "w+b") as errors:
        while True:
            runner = subprocess.Popen(
                [sys.executable, "-c", RUNNER, str(experiment), str(out)],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            try:
                follow(runner, out, deaths, chance, watch, began + LIMIT_S)
            finally:
                runner.kill()
                code = runner.wait(timeout=10)
            if code != -signal.SIGKILL:
                assert code == 0, (tmp_path / "errors").read_text()[-2000:]
                break
            killed_runners += 1
        assert wait_for(lambda: not any(map(lives, watch.seen)), 5), [pid for pid in watch.seen if lives(pid)]
    records = store.load_all(out)
    reasons = [record.reason for record in records if record.status != "ok"]
    assert deaths == [] and killed_runners == DEATHS.count("runner")
    assert len(records) == NUM_RUNS and len(reasons) <= len(DEATHS) - killed_runners
    assert all(str(reason).startswith(("device0: its ", "device1: its ")) for reason in reasons), reasons
    report(watch, reasons, time.monotonic() - began)
    assert all(growth(seen) <= GROWTH_BYTES for seen in watch.resident.values())
    assert abs(level(watch, 9) - level(watch, -1)) <= GROWTH_BYTES, "the tenth run's supervisors and the last one's"
    assert all(growth(seen) <= MORE_DESCRIPTORS for seen in watch.descriptors.values())


def follow(
    runner: subprocess.Popen[bytes],
    out: Path,
    deaths: list[tuple[int, str]],
    chance: random.Random,
    watch: Watch,
    give_up: float,
) -> None:
    """Until the runner ends: look at its processes after every run, and kill what is to die then."""
    done = num_records(out)
    while runner.poll() is None:
        assert time.monotonic() < give_up, "it takes too long"
        time.sleep(0.01)
        if num_records(out) == done:
            continue
        done = num_records(out)
        watch.look(runner.pid)
        if deaths and done >= deaths[0][0]:
            _, kind = deaths.pop(0)
            time.sleep(chance.uniform(0, 0.8))
            rank = chance.randrange(2)
            victims: dict[str, Callable[[], int | None]] = {
                "worker": lambda rank=rank: worker(runner.pid, rank),
                "supervisor": lambda rank=rank: (supervisors(runner.pid) or [None, None])[rank],
                "runner": lambda: runner.pid,
            }
            kill(victims[kind])


def num_records(out: Path) -> int:
    return len(list((out / "runs").glob("*.json")))


def kill(victim: Callable[[], int | None]) -> None:
    """As soon as there is one."""
    found: list[int] = []
    assert wait_for(lambda: found.extend(filter(None, [victim()])) or found, 20)
    os.kill(found[0], signal.SIGKILL)


def growth(seen: list[int]) -> float:
    """From the third look to the last ones; the first runs settle things."""
    return statistics.median(seen[-3:]) - statistics.median(seen[2:5]) if len(seen) > 5 else 0.0


def level(watch: Watch, place: int) -> float:
    """Resident bytes of a supervisor at a look, in order of time."""
    return [size for seen in watch.resident.values() for size in seen][place]


def report(watch: Watch, reasons: list[str | None], seconds: float) -> None:
    """For whoever runs it with `-s`."""
    print(f"\n{NUM_RUNS} runs in {seconds:.0f} s; failed: {reasons}")
    for pid, seen in watch.resident.items():
        print(f"supervisor {pid}: {len(seen)} looks, {seen[0] / 2**20:.1f} .. {seen[-1] / 2**20:.1f} MiB")
    for pid, seen in watch.descriptors.items():
        print(f"runner {pid}: {len(seen)} looks, {min(seen)} to {max(seen)} descriptors, {seen[-1]} at last")
