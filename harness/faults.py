"""What is made to happen to a device during a run, as a person writes it: `crash device2 at step 7 during backward`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from harness.errors import OrreryError
from harness.plan import Action, Compute, Phase, Send, Step
from harness.replication import REPLICATE
from harness.trace import Event

CRASH, HANG, CUT = KINDS = ("crash", "hang", "cut")
#: Of a round: a pass, the sums of gradients over a group, the update; or the copying and sending of a snapshot.
MOMENTS = ("forward", "backward", "all-reduce", "update", "replication")
#: A device that is not heard of for so long is lost.
SILENCE_S = 3.0
_FAULT = re.compile(
    r"(?P<kind>\w+) (?P<device>\S+) at step (?P<step>\d+)(?: during (?P<during>[\w-]+)(?: (?P<number>\d+))?)?"
)
GRAMMAR = (
    f"KIND DEVICE at step N [during MOMENT [M]], where KIND is one of {', '.join(KINDS)} and MOMENT one of "
    f"{', '.join(MOMENTS)}"
)


@dataclass(frozen=True)
class Fault:
    """`kind` happens to `device` when `step` rounds are over: with the first action of the next one, or `during` its
    forward passes, ..., with the one of that `number`, counted from 0."""

    kind: str
    device: str
    step: int
    during: str | None = None
    number: int = 0

    def __str__(self) -> str:
        text = f"{self.kind} {self.device} at step {self.step}"
        if self.during is not None:
            text += f" during {self.during}"
            text += f" {self.number}" if self.number else ""
        return text

    def strikes(self, phase: Phase, step: int, action: Action) -> bool:
        """Whether the action, with so many rounds over, is one of those that it is about."""
        if step != self.step:
            return False
        if self.during == "replication":
            return phase.name == REPLICATE
        return bool(phase.shards) and (self.during is None or moment_of(action) == self.during)


def moment_of_event(event: Event) -> str | None:
    """The same of what a trace shows of an action."""
    if event.kind in ("forward", "backward"):
        return event.kind
    if event.kind == "send" and ".v-" in event.label:  # negative versions are pieces of collectives
        return "all-reduce"
    return "update" if event.kind == "step" else None


def moment_of(action: Action) -> str | None:
    """The moment of a round to which an action of the compute or sending queue belongs; None: another transfer."""
    match action:
        case Compute():
            return action.direction
        case Send() if action.value.version < 0:  # a piece of a collective
            return "all-reduce"
        case Step():
            return "update"
        case _:
            return None


def faults_of(text: str, devices: Sequence[str]) -> tuple[Fault, ...]:
    """Several are separated by semicolons. Raises OrreryError for what is no fault, or concerns none of the devices."""
    faults = tuple(_parsed(part.strip(), devices) for part in text.split(";"))
    struck = [fault.device for fault in faults]
    if len(set(struck)) < len(struck):
        raise OrreryError(f"The faults {text!r} strike a device twice, and it is gone after the first one.")
    return faults


def _parsed(text: str, devices: Sequence[str]) -> Fault:
    found = _FAULT.fullmatch(text)
    if found is None:
        raise OrreryError(f"The fault {text!r} can't be read. Write: {GRAMMAR}.")
    kind, device, during = found["kind"], found["device"], found["during"]
    if kind not in KINDS or (during is not None and during not in MOMENTS):
        raise OrreryError(f"The fault {text!r} can't be read. Write: {GRAMMAR}.")
    if device not in devices:
        raise OrreryError(f"The fault {text!r} is about {device}, and the devices are {', '.join(devices)}.")
    return Fault(kind, device, int(found["step"]), during, int(found["number"] or 0))
