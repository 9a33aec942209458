"""Supervisors in processes of their own, whose workers do what a test says instead of a plan.

Run as `python -m tests.harness.fleet.crew DESCRIPTOR`. A job's `plan` holds the words of a part of `PARTS`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.fleet.channel import Channel, Message
from harness.fleet.processes import die_with_parent
from harness.fleet.supervisor import Pulse, supervise

ROOT = Path(__file__).resolve().parents[3]
#: No worker lives longer, whatever a test forgets.
LIFETIME_S = 30


@contextlib.contextmanager
def crew(names: Iterator[str] | list[str], patience_s: float | None = None) -> Iterator[dict[str, tuple[int, Channel]]]:
    """A supervisor for each name: its process id and our end of its channel. All are gone afterwards."""
    made: dict[str, tuple[int, Channel]] = {}
    processes = []
    try:
        for name in names:
            ours, theirs = socket.socketpair()
            command = [sys.executable, "-m", "tests.harness.fleet.crew", str(theirs.fileno())]
            processes.append(subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()]))
            theirs.close()
            made[name] = processes[-1].pid, Channel.of_socket(ours.detach(), patience_s)
        yield made
    finally:
        for _, channel in made.values():
            channel.close()
        for process in processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=5)


def report(device: str, losses: list[float]) -> Message:
    """The least that a worker can have to say at the end."""
    empty: dict[str, Any] = {"busy_s": {}, "sent_bytes": {}, "phases": [], "events": [], "memory": []}
    return {"device": device, "losses": losses, **empty}


def work(channel: Channel, message: Message, pulse: Pulse) -> None:
    """What a worker says of a plan, but for the plan: `[part, arguments...]` in its place."""
    signal.alarm(LIFETIME_S)
    job = message["plan"]
    part, *arguments = job["plan"].split()
    if part == "early":
        PARTS[arguments[0]](channel, pulse, *arguments[1:])
    channel.send({"listening": [job["host"], os.getpid()]})
    peers = channel.receive()["peers"]
    channel.send({"ready": True})
    channel.receive()
    PARTS[part](channel, pulse, *arguments)
    channel.send({"done": report(job["device"], [float(job["generation"]), float(len(peers))])})
    channel.receive()


def _exit(channel: Channel, pulse: Pulse, code: str) -> None:
    os._exit(int(code))


def _kill(channel: Channel, pulse: Pulse, name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


def _fail(channel: Channel, pulse: Pulse, kind: str, after_s: str = "0") -> None:
    """Fail as a worker of a plan does."""
    time.sleep(float(after_s))
    flags = {"secondary": kind == "PeerLost", "unsupported": kind == "Unsupported", "refused": kind == "OrreryError"}
    channel.send({"failed": {"kind": kind, "message": "it was so", "traceback": "Traceback: line 7", **flags}})
    raise SystemExit(1)


def _steps(channel: Channel, pulse: Pulse, count: str, pause_s: str) -> None:
    for number in range(1, int(count) + 1):
        time.sleep(float(pause_s))
        pulse.progress(number)


def _barriers(channel: Channel, pulse: Pulse, count: str, pause_s: str) -> None:
    for _ in range(int(count)):
        time.sleep(float(pause_s))
        channel.send({"reached": True})
        channel.receive()


def _keep_threads_waiting(channel: Channel, pulse: Pulse, digits: str) -> None:
    """Compute in one long piece of C code, in which no other thread of Python's gets its turn."""
    7 ** int(digits)


def _save(channel: Channel, pulse: Pulse, count: str) -> None:
    """Write states, as a worker of a plan does after each epoch."""
    for epochs in range(1, int(count) + 1):
        channel.send({"saved": {"epochs": epochs, "digest": f"{os.getpid()}-{epochs}"}})


def _talk(channel: Channel, pulse: Pulse, nbytes: str) -> None:
    channel.send({"said": "x" * int(nbytes)})


PARTS: Mapping[str, Callable[..., None]] = {
    "answer": lambda channel, pulse: None,
    "exit": _exit,
    "kill": _kill,
    "fail": _fail,
    "steps": _steps,
    "barriers": _barriers,
    "compute": _keep_threads_waiting,
    "talk": _talk,
    "save": _save,
}

if __name__ == "__main__":
    die_with_parent(os.getppid())
    supervise(Channel.of_socket(int(sys.argv[1])), work)
