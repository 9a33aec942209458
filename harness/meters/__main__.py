"""The process that reads a meter while others work: one window between a `begin` and an `end` on standard input.

It is a program of its own, so that it neither waits for the one that trains nor takes its time:
`python -m harness.meters PROBE`, the probe as `harness.meters.meter` encodes it.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import pickle
import select
import signal
import sys
import time

from harness.meters.meter import BEGIN
from harness.meters.sampler import Probe


class Commands:
    """A window's watch at the other end of standard input: its end is asked for there."""

    def __init__(self, inward: int, outward: int) -> None:
        self.inward, self.outward = inward, outward
        self._unread = b""

    def next(self) -> bytes:
        """The next command; empty when there will be none."""
        while b"\n" not in self._unread:
            more = os.read(self.inward, 4096)
            if not more:
                return b""
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def begun(self) -> None:
        self.reply({})

    def ended(self, until_ns: int | None) -> bool:
        left_s = None if until_ns is None else max(0.0, (until_ns - time.monotonic_ns()) / 1e9)
        ready, _, _ = select.select([self.inward], [], [], left_s)
        if ready:
            self.next()
        return bool(ready)

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def reply(self, content: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # who asked is gone, and so are we at the next command
            os.write(self.outward, json.dumps(content).encode() + b"\n")


def main(probe: Probe) -> None:
    """Answer until nobody asks any more. What libraries print is not taken for an answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who is interrupted at the keyboard ends us by closing the pipe
    commands = Commands(0, os.dup(1))
    os.dup2(2, 1)
    while commands.next() == BEGIN:
        commands.reply(dataclasses.asdict(probe.window(commands)))


if __name__ == "__main__":
    main(pickle.loads(base64.b64decode(sys.argv[1])))
