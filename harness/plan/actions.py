"""The eight actions, the collective that abbreviates three of them, and the commit marker.

Each action joins one queue of its device (`QUEUE_OF`) in list order and starts when its queue is free and what it
reads exists. A device sends one value at a time, in list order, and receives one at a time, in the order in which
the transfers become ready: an input that is there is never held up by one that is still on its way. A receive is
listed before the first action that reads its value, and is issued when its device begins the iteration, which is when
its compute queue has done with the one before. The sums of a collective join no queue either: they follow the data.
A load is issued one iteration ahead: when its device begins the iteration before.
`Free` and `Commit`: a value is freed as soon as every earlier action of the list that touches it has ended.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.plan.values import Range, Value

COMPUTE, NIC_OUT, NIC_IN, STORAGE = QUEUES = ("compute", "nic-out", "nic-in", "storage")
COMBINATIONS = ("sum", "concat", "slice", "square-sum")
COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather")
SHARED_AXES = ("width", "tokens")


@dataclass(frozen=True, slots=True)
class Compute:
    """One pass of `rows` of a micro-batch over the units [units[0], units[1]).

    A forward pass writes the tensors carried to the next stage and what autograd saves. A backward pass reads
    them with the gradients of the outputs, writes the gradients of the inputs, and adds to `accumulates`, the
    weight gradients: the first addition of an iteration makes them. `weights` names the version computed with, a
    backward pass that of its forward pass, which may be older than the newest.
    Of the rows it may be some `tokens`, and of one unit some of the `width` that its cut allows (see
    `harness.plan.pieces`). A `replica` repeats what another device computes.
    """

    units: Range
    direction: str
    micro_batch: int
    rows: Range
    weights: tuple[Value, ...]
    reads: tuple[Value, ...] = ()
    writes: tuple[Value, ...] = ()
    accumulates: tuple[Value, ...] = ()
    tokens: Range | None = None
    width: Range | None = None
    replica: bool = False


@dataclass(frozen=True, slots=True)
class Send:
    """Send `value`, which may be a piece of a value held, to `peer`."""

    value: Value
    peer: str


@dataclass(frozen=True, slots=True)
class Recv:
    """Receive `value` from `peer`, which sends a value of the same key."""

    value: Value
    peer: str


@dataclass(frozen=True, slots=True)
class Combine:
    """Make one value of several. `op`: "sum" (of nothing: zeros), "concat", "slice" or "square-sum".

    A concatenation joins pieces along the one axis in which they differ, in order.
    A square-sum is one number: the sum of the squares of all elements of the values read.
    With `in_place` the result takes over the memory of the first value read, which is gone; a sum waits until nobody
    reads that any more.
    """

    op: str
    reads: tuple[Value, ...]
    write: Value
    in_place: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """The optimizer's update of the units [units[0], units[1]): weights and state to their next version, in place.

    What it reads and is `kept` stays, for passes that began with it: its next version has memory of its own.
    `norm` is the square of the norm of all gradients of the phase together, where they are clipped: the update takes
    them times min(1, clip_norm / (sqrt(norm) + 1e-6)), with the workload's `clip_norm`, as
    `torch.nn.utils.clip_grad_norm_` does.
    """

    units: Range
    gradients: tuple[Value, ...]
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    norm: Value | None = None
    kept: tuple[Value, ...] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """Read `value` from storage."""

    value: Value


@dataclass(frozen=True, slots=True)
class Store:
    """Write `value` to storage."""

    value: Value


@dataclass(frozen=True, slots=True)
class Free:
    """Release the memory of `values`."""

    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """End of a round. In a phase that computes nothing: what every device has of a snapshot when all have reached it is
    what a failure goes back to."""


@dataclass(frozen=True, slots=True)
class Collective:
    """A ring collective over `group`, in ring order, stored once per member and expanded by `harness.plan.collectives`.

    kind "all-reduce": every member's `value` (its part of a sum) becomes `result`, the whole sum, in place.
    kind "reduce-scatter": every member's `value` (its part of a sum, whole axis) is used up; member r gets `result`,
    the whole sum of share r.
    kind "all-gather": every member r has share r as `value`, which stays, and gets `result`, the shares of all.

    `axis`: the one that is shared, "width" or "tokens".
    `shares` are the elements of each member along the axis, 0 for a member that has none; they add up to all that the
    tensor has. Without, they are as even as possible, the larger ones first. Share r of a value is its range, empty
    where there is nothing. `result` is the tensor of `value`, and may be another version of it.
    `tiles`: pieces into which a chunk is cut on its way, so that one is summed while the next one travels.
    """

    kind: str
    value: Value
    result: Value
    group: tuple[str, ...]
    shares: tuple[int, ...] = ()
    tiles: int = 1
    axis: str = "width"


Action = Compute | Send | Recv | Combine | Step | Load | Store | Free | Commit | Collective

QUEUE_OF: dict[type, str] = {
    Compute: COMPUTE,
    Combine: COMPUTE,
    Step: COMPUTE,
    Send: NIC_OUT,
    Recv: NIC_IN,
    Load: STORAGE,
    Store: STORAGE,
}


def reads(action: Action) -> tuple[Value, ...]:
    """The values that must exist before the action starts."""
    match action:
        case Compute():
            return (*action.weights, *action.reads)
        case Send() | Store():
            return (action.value,)
        case Combine():
            return action.reads
        case Step():
            norm = () if action.norm is None else (action.norm,)
            return (*action.gradients, *action.reads, *norm)
        case Collective():
            return (action.value,)
        case _:
            return ()


def writes(action: Action) -> tuple[Value, ...]:
    """The values that exist once the action has ended (accumulated gradients aside)."""
    match action:
        case Compute() | Step():
            return action.writes
        case Recv() | Load():
            return (action.value,)
        case Combine():
            return (action.write,)
        case Collective():
            return (action.result,)
        case _:
            return ()
