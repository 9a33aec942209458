"""One per device: owns the worker process, says every now and then that it lives, and never computes anything itself.

A worker is forked from the supervisor, which has imported torch once and started no thread, so that a plan begins at
once and each generation begins afresh. Whatever happens to the worker, the supervisor is there to say so.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from harness.fleet.channel import Channel, Closed, Message, ready
from harness.fleet.processes import cpu_ticks, die_with_parent

HEARTBEAT_S = 0.15
Work = Callable[[Channel, Message, "Pulse"], None]


class Pulse:
    """Memory that a worker shares with its supervisor: when it was last alive, and how far it is."""

    _LAYOUT = struct.Struct("dq")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self._LAYOUT.size)
        self._progress = 0
        self.beat()

    def beat(self) -> None:
        self._LAYOUT.pack_into(self._memory, 0, time.monotonic(), self._progress)

    def keep_beating(self) -> None:
        """Beat from now on, in a thread: it stops with the process, or where some C code keeps all threads waiting."""

        def beat() -> None:
            pause = threading.Event()
            while not pause.wait(HEARTBEAT_S):
                self.beat()

        threading.Thread(target=beat, name="heartbeat", daemon=True).start()

    def progress(self, number: int) -> None:
        self._progress = number
        self.beat()

    def read(self) -> tuple[float, int]:
        """Seconds since the last beat, and the number of the last iteration done."""
        then, number = self._LAYOUT.unpack_from(self._memory, 0)
        return time.monotonic() - then, number


@dataclass
class _Worker:
    pid: int
    channel: Channel
    pulse: Pulse
    ticks: int = 0
    ticked_s: float = field(default_factory=time.monotonic)

    def condition(self) -> dict[str, float]:
        """How long it has been silent, and how far it is. Who computes is alive, even if C code lets no thread beat."""
        age, number = self.pulse.read()
        ticks = cpu_ticks(self.pid)
        if ticks != self.ticks:
            self.ticks, self.ticked_s = ticks, time.monotonic()
        return {"silent_s": min(age, time.monotonic() - self.ticked_s), "progress": number}


def supervise(channel: Channel, work: Work) -> None:
    """Serve the coordinator until it is gone: fork workers, pass messages on, report how each worker ended.

    From the coordinator: `{"run": job}` forks a worker that does `work(channel, job, pulse)`, `{"stop": true}` kills
    it, `{"worker": message}` is for it. To the coordinator, while there is a worker: `{"alive": ...}` in every
    HEARTBEAT_S, `{"worker": message}` from the worker, and `{"ended": exit code}` (negative: a signal) at its end.
    """
    worker: _Worker | None = None
    next_beat = time.monotonic()
    try:
        while True:
            if worker is None:
                worker = _from_coordinator(channel.receive(), None, channel, work)
                continue
            sources = ready([channel, worker.channel], max(0.0, next_beat - time.monotonic()))
            if worker.channel in sources:
                worker = _from_worker(worker, channel)
            elif channel in sources:
                worker = _from_coordinator(channel.receive(), worker, channel, work)
            if worker is not None and time.monotonic() >= next_beat:
                next_beat = time.monotonic() + HEARTBEAT_S
                channel.send({"alive": worker.condition()})
    except Closed:
        pass
    finally:
        if worker is not None:
            _kill(worker)


def _from_coordinator(message: Message, worker: _Worker | None, channel: Channel, work: Work) -> _Worker | None:
    if "run" in message:
        if worker is not None:
            _kill(worker)
        return _fork(message["run"], channel, work)
    if "stop" in message and worker is not None:
        channel.send({"ended": _kill(worker)})
        return None
    if "worker" in message and worker is not None:
        with contextlib.suppress(Closed):  # its end is read next
            worker.channel.send(message["worker"])
    return worker


def _from_worker(worker: _Worker, channel: Channel) -> _Worker | None:
    try:
        packed = worker.channel.take()
    except Closed:
        channel.send({"ended": _reap(worker)})
        return None
    channel.pass_on(b'{"worker": ' + packed + b"}")
    return worker


def _fork(job: Message, channel: Channel, work: Work) -> _Worker:
    ours, theirs = socket.socketpair()
    pulse, supervisor = Pulse(), os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        die_with_parent(supervisor)
        ours.close()
        channel.close()
        _work(Channel.of_socket(theirs.detach()), job, pulse, work)
    theirs.close()
    return _Worker(pid, Channel.of_socket(ours.detach()), pulse)


def _work(channel: Channel, job: Message, pulse: Pulse, work: Work) -> NoReturn:
    """The worker process, from fork to exit. Nothing may get back into the supervisor's code."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the coordinator, which stops us
        pulse.keep_beating()
        work(channel, job, pulse)
        code = 0
    except Closed:
        pass
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _kill(worker: _Worker) -> int:
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker.pid, signal.SIGKILL)
    return _reap(worker)


def _reap(worker: _Worker) -> int:
    worker.channel.close()
    _, status = os.waitpid(worker.pid, 0)
    return os.waitstatus_to_exitcode(status)
