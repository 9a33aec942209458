"""Faults that a worker brings upon its own device, at the very action that they are to strike."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from harness.faults import CRASH, CUT, SLOW, Fault
from harness.fleet.mailbox import Mailbox

if TYPE_CHECKING:
    from harness.engine.worker import Iteration

#: In so long the news of the moment, without which nobody could say how long detection took, is on its way.
NOTICE_S = 0.05


def trigger(
    listed: Sequence[Mapping[str, Any]], mailbox: Mailbox, slow_down: Callable[[float], None]
) -> Callable[[Iteration, int], None]:
    """What a worker calls before each of its actions. The fields of each `Fault` are listed; `slow_down` makes the
    device take so many times as long as before.

    A crash kills worker and supervisor, a hang stops both, as if the device were off or had frozen. The link of a
    device that is cut off is for the coordinator to take down.
    """
    left = {Fault(**about): 0 for about in listed}

    def before(iteration: Iteration, node: int) -> None:
        program = iteration.program
        for fault, seen in list(left.items()):
            if not fault.strikes(program.phase, iteration.step, program.actions[node]):
                continue
            left[fault] += 1
            if seen == fault.number:
                del left[fault]
                strike(fault)

    def strike(fault: Fault) -> None:
        when = time.monotonic() + NOTICE_S
        mailbox.send({"fault": {**asdict(fault), "at": when}})
        if fault.kind == SLOW:
            slow_down(fault.factor)
        if fault.kind in (SLOW, CUT):
            return
        time.sleep(max(0.0, when - time.monotonic()))
        number = signal.SIGKILL if fault.kind == CRASH else signal.SIGSTOP
        os.kill(os.getppid(), number)
        os.kill(os.getpid(), number)

    return before
