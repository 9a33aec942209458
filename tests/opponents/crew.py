"""torch's ranks on the devices of an emulated testbed: in the same namespaces and control groups as our workers."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from testbeds.emulation import namespaces
from testbeds.emulation.machine import ENVIRONMENT, Machine
from tests.opponents.rank import Task

ROOT = Path(__file__).parents[2]
#: An order that takes longer hangs.
ANSWER_S = 240.0

Spans = Sequence[Sequence[tuple[float, float]]]


class Crew:
    """One process per device, which waits for orders and computes nothing meanwhile."""

    def __init__(self, ranks: Sequence[subprocess.Popen[str]]) -> None:
        self.ranks = ranks

    def seconds(self, task: Task, iterations: int) -> list[float]:
        """Do it, and tell the length of each iteration."""
        order = json.dumps([asdict(task), iterations])
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(order + "\n")
            rank.stdin.flush()
        return lengths(self.hear())

    def hear(self) -> list[Any]:
        """One line from each. Raises RuntimeError when a rank ends, or says nothing in time."""
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + ANSWER_S
        with selectors.DefaultSelector() as selector:
            for number, rank in enumerate(self.ranks):
                assert rank.stdout is not None
                selector.register(rank.stdout, selectors.EVENT_READ, number)
            while len(answers) < len(self.ranks):
                found = selector.select(deadline - time.monotonic())
                if not found:
                    raise RuntimeError(f"ranks {set(range(len(self.ranks))) - set(answers)} have not answered")
                for key, _ in found:
                    line = self.ranks[key.data].stdout.readline()  # type: ignore[union-attr]
                    if not line:
                        raise RuntimeError(f"rank {key.data} has ended")
                    answers[key.data] = json.loads(line)
        return [answers[number] for number in range(len(self.ranks))]


@contextmanager
def crew(machine: Machine, folder: Path, isolated: bool) -> Iterator[Crew]:
    """The ranks, connected. `isolated`: the machine's devices have namespaces."""
    address = namespaces.address(0) if isolated else "127.0.0.1"
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "GLOO_SOCKET_IFNAME": namespaces.DEVICE_PORT if isolated else "lo",
        "PYTHONPATH": str(ROOT),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # a namespace has no names for its addresses
    }
    ranks = []
    try:
        for number, (pid, entrances) in enumerate(zip(machine.pids, machine.entrances.values(), strict=True)):
            enter = ["nsenter", f"--net=/proc/{pid}/ns/net"] if isolated else []
            module = [sys.executable, "-m", "tests.opponents.rank"]
            arguments = [str(number), str(len(machine.pids)), address, str(folder), json.dumps(entrances)]
            ranks.append(
                subprocess.Popen(
                    [*enter, *module, *arguments],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        found = Crew(ranks)
        found.hear()
        yield found
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate(timeout=10)


def lengths(spans: Spans) -> list[float]:
    """Of each iteration, from the end of the one before on the last device to its own, as our trace counts it."""
    ends = [max(end for _, end in iteration) for iteration in zip(*spans, strict=True)]
    return [after - before for before, after in pairwise([min(span[0][0] for span in spans), *ends])]
