"""Faults that a worker brings upon its own device, at the very action that they are to strike."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from harness.faults import CRASH, CUT, Fault
from harness.fleet.mailbox import Mailbox

if TYPE_CHECKING:
    from harness.engine.worker import Iteration

#: In so long the news of the moment, without which nobody could say how long detection took, is on its way.
NOTICE_S = 0.05


def trigger(about: Mapping[str, Any], mailbox: Mailbox) -> Callable[[Iteration, int], None]:
    """What a worker calls before each of its actions. `about` are the fields of a `Fault`.

    A crash kills worker and supervisor, a hang stops both, as if the device were off or had frozen. The link of a
    device that is cut off is for the coordinator to take down.
    """
    fault, seen = Fault(**about), 0

    def before(iteration: Iteration, node: int) -> None:
        nonlocal seen
        program = iteration.program
        if not fault.strikes(program.phase, iteration.step, program.actions[node]):
            return
        seen += 1
        if seen != fault.number + 1:
            return
        when = time.monotonic() + NOTICE_S
        mailbox.send({"fault": {"at": when}})
        if fault.kind == CUT:
            return
        time.sleep(max(0.0, when - time.monotonic()))
        number = signal.SIGKILL if fault.kind == CRASH else signal.SIGSTOP
        os.kill(os.getppid(), number)
        os.kill(os.getpid(), number)

    return before
