"""The same work for many things on all cores of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from harness.errors import OrreryError

Thing = TypeVar("Thing")
Made = TypeVar("Made")
#: Of a process that works for another one: what it makes something of, and how.
_work: tuple[Callable[[Any], Any], Sequence[Any]]


@contextlib.contextmanager
def on_all_cores(make: Callable[[Thing], Made], things: Sequence[Thing]) -> Iterator[Iterator[Made]]:
    """`make` of each, in order, by one process per core; of a single one here.

    The processes are forked, so that they have what this one has: the things need not be such as can be sent. What is
    made is. They end with this process, however it ends.
    """
    if len(things) < 2:
        yield map(make, things)
        return
    workers = min(os.cpu_count() or 1, len(things))
    pool = ProcessPoolExecutor(workers, get_context("fork"), _begin, (make, things))
    try:
        yield _made(pool, len(things))
    finally:
        pool.shutdown(cancel_futures=True)


def _made(pool: ProcessPoolExecutor, count: int) -> Iterator[Any]:
    try:
        yield from pool.map(_make, range(count))
    except BrokenProcessPool as error:
        raise OrreryError(
            "A process that this one had started was killed, which the system does when memory is short. Free some "
            "memory and ask again: what is on disk is not done again."
        ) from error


def _begin(make: Callable[[Any], Any], things: Sequence[Any]) -> None:
    global _work
    _work = make, things
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too, and ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make(number: int) -> Any:
    make, things = _work
    return make(things[number])
