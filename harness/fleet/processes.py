"""Processes that don't outlive the one that is responsible for them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def die_with_parent(parent: int) -> None:
    """From now on this process is killed when its parent, of that id, ends, however it ends. Linux only."""
    if sys.platform != "linux":
        return  # elsewhere the closed channel ends it
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it was gone before the kernel knew


def adopt_orphans() -> None:
    """From now on whoever below this process loses its parent is its child, so that it can wait for it. Linux only."""
    if sys.platform == "linux":
        _prctl(PR_SET_CHILD_SUBREAPER, 1)


def enter(files: Sequence[str]) -> None:
    """Move this process, or its first thread, into control groups, by the files that take an id. Called by that thread,
    whose id is the process's own."""
    for file in files:
        Path(file).write_text(str(os.getpid()))


def cpu_ticks(pid: int) -> int:
    """How long a process has computed, in clock ticks. Linux only: elsewhere always 0."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])  # in user mode and in the kernel


def _prctl(option: int, argument: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0)
