"""What happened, when, on which device and queue. One schema for every mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from harness.plan.actions import Action, Combine, Compute, Load, Recv, Send, Store

#: Iterations of a phase whose events are kept for pictures; totals cover every iteration.
EVENTS_KEPT = 2


@dataclass(frozen=True, slots=True)
class Event:
    """One action of one device. Times are seconds since the run began; `nbytes` is what a transfer moved.

    `peer` is the other end of a transfer. `label` is for people: "F3 0:24", "hidden@24#3".
    """

    device: str
    queue: str
    kind: str
    label: str
    start_s: float
    end_s: float
    phase: int
    iteration: int
    micro_batch: int = -1
    nbytes: int = 0
    peer: str = ""


@dataclass(frozen=True)
class Peak:
    """Most bytes alive at once on a device, and most bytes of each kind."""

    nbytes: int
    kinds: Mapping[str, int]


@dataclass(frozen=True)
class PhaseTrace:
    """One phase of the plan: when it began, how long all its repeats took, what moved.

    `iteration_s`: the lengths of the iterations that were looked at one by one. `computing_s`: seconds that compute
    queues worked for it, of all devices. `memory[device]`: its peaks from when all earlier phases had ended to the end
    of this one. `busy_s` and `link_bytes` are as a trace has them. All of these only where they were followed phase by
    phase. `decoding`: every iteration made one more token.
    """

    name: str
    repeat: int
    start_s: float
    time_s: float
    comm_bytes: int
    iteration_s: tuple[float, ...] = ()
    computing_s: float | None = None
    memory: Mapping[str, Peak] = field(default_factory=dict)
    busy_s: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    link_bytes: Mapping[tuple[str, str], int] = field(default_factory=dict)
    decoding: bool = False


@dataclass(frozen=True)
class Trace:
    """A run. `events` holds the iterations that were looked at one by one; the totals cover the whole run.

    `busy_s[device][queue]`: seconds that a queue worked. `link_bytes[(src, dst)]`: bytes sent, whole run.
    `peak_bytes[device]`: most bytes alive at once. `memory_bytes[device][kind]`: most bytes of each kind.
    `memory_timeline[device]`: (time_s, bytes alive) at each change of the iterations looked at.
    `process_peak_bytes[device]`: most memory that the device's process took from the system, where there was one.
    """

    mode: str
    devices: tuple[str, ...]
    total_s: float
    events: Sequence[Event]
    phases: tuple[PhaseTrace, ...]
    busy_s: Mapping[str, Mapping[str, float]]
    link_bytes: Mapping[tuple[str, str], int]
    peak_bytes: Mapping[str, int]
    memory_bytes: Mapping[str, Mapping[str, int]]
    memory_timeline: Mapping[str, tuple[tuple[float, int], ...]] = field(default_factory=dict)
    process_peak_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def comm_bytes(self) -> int:
        return sum(self.link_bytes.values())


def kind_of(action: Action) -> str:
    """The event kind: forward, backward, or the action's name."""
    return action.direction if isinstance(action, Compute) else type(action).__name__.lower()


def label_of(action: Action) -> str:
    """What a person reads in a timeline."""
    match action:
        case Compute():
            return f"{action.direction[0].upper()}{action.micro_batch} {action.units[0]}:{action.units[1]}"
        case Send() | Recv() | Load() | Store():
            return str(action.value)
        case Combine():
            return f"{action.op} {action.write}"
        case _:
            return type(action).__name__.lower()


def micro_batch_of(action: Action) -> int:
    match action:
        case Compute():
            return action.micro_batch
        case Send() | Recv() | Load() | Store():
            return action.value.micro_batch
        case Combine():
            return action.write.micro_batch
        case _:
            return -1
