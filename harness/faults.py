"""What is made to happen to a device during a run, as a person writes it: `crash device2 at step 7 during backward`."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.errors import OrreryError
from harness.plan import Action, Compute, Phase, Send, Step
from harness.replication import REPLICATE
from harness.trace import Event

CRASH, HANG, CUT, SLOW, LEAVE, JOIN = KINDS = ("crash", "hang", "cut", "slow", "leave", "join")
#: After these a device is lost, all at once. What one does that leaves is done in order, at the next snapshot.
LOSSES = (CRASH, HANG, CUT)
#: Of a round: a pass, the sums of gradients over a group, the update; or the copying and sending of a snapshot.
MOMENTS = ("forward", "backward", "all-reduce", "update", "replication")
#: A device that is not heard of for so long is lost, where its testbed says nothing else. Assumed, as is the next one.
HEARTBEAT_TIMEOUT_S = 3.0
#: How far a device must be from the time that a plan gives it, to be told from what varies by itself.
NOTICED = 1.25
_FAULT = re.compile(
    r"(?P<kind>\w+)(?: (?P<factor>\d+(?:\.\d+)?)x)? (?P<device>\S+) at step (?P<step>\d+)"
    r"(?: during (?P<during>[\w-]+)(?: (?P<number>\d+))?)?"
)
GRAMMAR = (
    f"KIND DEVICE at step N [during MOMENT [M]], where KIND is one of {', '.join(LOSSES)} and MOMENT one of "
    f"{', '.join(MOMENTS)}; {LEAVE} DEVICE at step N; {JOIN} DEVICE at step N; or {SLOW} FACTORx DEVICE at step N"
)


@dataclass(frozen=True)
class Fault:
    """`kind` happens to `device` when `step` rounds are over: with the first action of the next one, or `during` its
    forward passes, ..., with the one of that `number`, counted from 0.

    One that leaves or joins does so with the first snapshot from then on. `factor`: one that becomes slow takes so many
    times as long as before anything happened to it.
    """

    kind: str
    device: str
    step: int
    during: str | None = None
    number: int = 0
    factor: float = 1.0

    def __str__(self) -> str:
        kind = f"{self.kind} {self.factor:g}x" if self.kind == SLOW else self.kind
        text = f"{kind} {self.device} at step {self.step}"
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
    """Several are separated by semicolons. Raises OrreryError for what is no fault, concerns none of the devices, or
    can't happen after what has happened before."""
    faults = tuple(_parsed(part.strip(), devices) for part in text.split(";"))
    happened: dict[str, Fault] = {}
    for fault in sorted(faults, key=lambda fault: fault.step):
        before = happened.get(fault.device)
        gone = before is not None and before.kind in (*LOSSES, LEAVE)
        if before is not None and gone != (fault.kind == JOIN):
            why = "the device is gone, and can only join" if gone else "the device is there"
            raise OrreryError(f"{str(fault)!r} can't happen after {str(before)!r}: {why}.")
        happened[fault.device] = fault
    if not set(devices) - set(joining(faults)):
        raise OrreryError(f"With the faults {text!r} no device is there in the beginning.")
    return faults


def joining(faults: Sequence[Fault]) -> tuple[str, ...]:
    """The devices that are not there in the beginning: the first that happens to them is that they join."""
    first: dict[str, Fault] = {}
    for fault in sorted(faults, key=lambda fault: fault.step):
        first.setdefault(fault.device, fault)
    return tuple(device for device, fault in first.items() if fault.kind == JOIN)


def due(faults: Sequence[Fault], trained: int) -> list[Fault]:
    """Of faults that have not happened yet, in the order of their steps, those that do with a snapshot after so many
    rounds: devices leave and join, each once."""
    found: dict[str, Fault] = {}
    for fault in sorted(faults, key=lambda fault: fault.step):
        if fault.kind in (LEAVE, JOIN) and fault.step <= trained:
            found.setdefault(fault.device, fault)
    return list(found.values())


def noticed(seconds: Mapping[str, float], expected: Mapping[str, float]) -> dict[str, float]:
    """The devices that are not as fast as expected, with how many times as long they take.

    `seconds` of computing in a round, and what was `expected` of it. All are compared with the one in the middle, the
    faster one of two: a whole cluster that is faster or slower than expected has no slow device.
    """
    ratios = {device: took / expected[device] for device, took in seconds.items() if expected[device] > 0}
    usual = statistics.median_low(ratios.values()) if ratios else 1.0
    return {device: ratio / usual for device, ratio in ratios.items() if max(ratio / usual, usual / ratio) > NOTICED}


def unasked(device: str, step: int, factor: float) -> Fault:
    """What is to be said of a device that nobody has made slow."""
    return Fault(SLOW, device, step, factor=round(factor, 2))


def _parsed(text: str, devices: Sequence[str]) -> Fault:
    found = _FAULT.fullmatch(text)
    if found is None:
        raise OrreryError(f"The fault {text!r} can't be read. Write: {GRAMMAR}.")
    kind, device, during = found["kind"], found["device"], found["during"]
    unknown = kind not in KINDS or (during is not None and during not in MOMENTS)
    if unknown or (during is not None and kind not in LOSSES) or (found["factor"] is None) == (kind == SLOW):
        raise OrreryError(f"The fault {text!r} can't be read. Write: {GRAMMAR}.")
    factor = float(found["factor"] or 1)
    if factor < 1:
        raise OrreryError(f"The fault {text!r} makes a device faster; a factor is at least 1.")
    if device not in devices:
        raise OrreryError(f"The fault {text!r} is about {device}, and the devices are {', '.join(devices)}.")
    return Fault(kind, device, int(found["step"]), during, int(found["number"] or 0), factor)
