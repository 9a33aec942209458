"""The processes of an emulated campaign as the kernel shows them, and what they would leave behind."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testbeds.emulation import leftovers

PROC = Path("/proc")


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent... Empty if there is no such process."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def lives(pid: int) -> bool:
    return (stat(pid) or "Z")[0] not in "ZX"


def children(parent: int) -> list[int]:
    """Living ones, the oldest first."""
    pids = [int(folder.name) for folder in PROC.iterdir() if folder.name.isdigit()]
    found = {pid: fields for pid in pids if (fields := stat(pid)) and fields[0] not in "ZX"}
    mine = [pid for pid, fields in found.items() if int(fields[1]) == parent]
    return sorted(mine, key=lambda pid: int(found[pid][19]))


def nursery(runner: int) -> int | None:
    """The process in which the runner's emulated devices are, if it has one."""
    for pid in children(runner):
        with contextlib.suppress(OSError):
            if b"testbeds.emulation.nursery" in (PROC / str(pid) / "cmdline").read_bytes():
                return pid
    return None


def supervisors(runner: int) -> list[int]:
    """In rank order."""
    found = nursery(runner)
    return [] if found is None else children(found)


def worker(runner: int, rank: int) -> int | None:
    """The worker of a device, if it has one now."""
    found = supervisors(runner)
    return next(iter(children(found[rank])), None) if rank < len(found) else None


def family(root: int) -> list[int]:
    """A process and all below it."""
    return [root, *(pid for child in children(root) for pid in family(child))]


def resident_bytes(pid: int) -> int:
    return int((PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    """Whether it comes true in that time."""
    give_up = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.005)
    return True


@contextlib.contextmanager
def nothing_left(folder: Path, seconds: float = 5.0) -> Iterator[None]:
    """Inside, processes may come; soon after, none of them nor anything of theirs is there.

    `folder` is where temporary files go, for this process and those it starts.
    """
    before, groups = set(children(os.getpid())), leftovers.find()
    yield

    def left() -> object:
        new = [pid for pid in children(os.getpid()) if pid not in before]
        return new or sorted(folder.glob("orrery*")) or [path for path in leftovers.find() if path not in groups]

    assert wait_for(lambda: not left(), seconds), left()


@pytest.fixture(scope="module")
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Temporary files and caches of the tests' own: other campaigns on this machine are none of their business."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("temporary")
        patch.setenv("TMPDIR", str(folder))
        patch.setattr("tempfile.tempdir", str(folder))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield folder
