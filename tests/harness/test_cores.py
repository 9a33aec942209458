"""The same work on all cores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from harness.cores import on_all_cores
from harness.errors import OrreryError
from tests.testbeds.processes import lives, wait_for

STARTED = """
import os, time
from harness.cores import on_all_cores

def work(number):
    print(os.getpid(), flush=True)
    time.sleep(60)

with on_all_cores(work, [1, 2]) as made:
    list(made)
"""


def test_what_is_made_comes_in_order_from_other_processes() -> None:
    seen: list[int] = []

    def squared(number: int) -> tuple[int, int]:
        seen.append(number)  # of a process of its own
        return number * number, os.getpid()

    with on_all_cores(squared, range(20)) as made:
        found = list(made)
    assert [square for square, _ in found] == [number * number for number in range(20)]
    assert os.getpid() not in {pid for _, pid in found} and not seen


def test_a_single_thing_is_made_here() -> None:
    with on_all_cores(lambda number: (number, os.getpid()), [3]) as made:
        assert list(made) == [(3, os.getpid())]


def test_an_error_is_that_of_the_work() -> None:
    def fail(number: int) -> None:
        raise OrreryError(f"it was {number}")

    with pytest.raises(OrreryError, match="it was 1"), on_all_cores(fail, [1, 2]) as made:
        list(made)


def test_a_process_that_is_killed_is_told() -> None:
    def die(number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(OrreryError, match="memory is short"), on_all_cores(die, [1, 2]) as made:
        list(made)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_processes_end_with_the_one_that_is_killed() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", STARTED], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline())]
    if (os.cpu_count() or 1) > 1:
        pids.append(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    assert wait_for(lambda: not any(map(lives, pids)), 5)
    parent.stdout.close()
