"""Galaxy's split of heads and columns: by capacity, then by memory; and the best there is, by exhaustive search.

The paper's own equations are not known. What is here is a plausible shape of them, and assumed:

    minimise   max_d L_att(a_d, d) + max_d L_mlp(b_d, d)                   (all layers; tokens are split evenly)
    subject to M_att a_d + M_mlp b_d <= room_d,  sum a_d = heads,  sum b_d = columns
    capacity   V_d = 1 / (L_att(heads, d) + L_mlp(columns, d))
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.cluster import Device
from harness.costs import FORWARD, Costs
from harness.schedules import split, split_within
from harness.sharded import MLP, Block, shared_cut


@dataclass(frozen=True)
class Load:
    """Seconds that a device needs for `count` heads, or columns, of all layers: `fixed` unless it has none."""

    fixed: float
    each: float

    def at(self, count: int) -> float:
        return self.fixed + count * self.each if count else 0.0

    def within(self, seconds: float, most: int) -> int:
        """The most that it can do in so many seconds, up to `most`."""
        if seconds < self.at(1):
            return 0
        return most if self.each == 0 else min(most, int((seconds - self.fixed) / self.each * (1 + 1e-12) + 1e-9))


@dataclass(frozen=True)
class Problem:
    """What is to be split, per device in ring order. `head_bytes`, `column_bytes`: of weights, over all layers.

    `room`: bytes that a device has for such weights, besides all else that it holds.
    """

    heads: int
    columns: int
    attention: tuple[Load, ...]
    mlp: tuple[Load, ...]
    head_bytes: int
    column_bytes: int
    room: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.heads * self.head_bytes + self.columns * self.column_bytes

    def seconds(self, heads: Sequence[int], columns: Sequence[int]) -> float:
        """What the split is judged by: the slowest device in attention, and the slowest in the MLP."""
        slowest = [
            max(load.at(count) for load, count in zip(loads, counts, strict=True))
            for loads, counts in ((self.attention, heads), (self.mlp, columns))
        ]
        return sum(slowest)

    def fits(self, heads: Sequence[int], columns: Sequence[int]) -> bool:
        return all(
            a * self.head_bytes + b * self.column_bytes <= room
            for a, b, room in zip(heads, columns, self.room, strict=True)
        )

    @property
    def capacities(self) -> list[float]:
        """V of each device."""
        return [
            1 / (attention.at(self.heads) + mlp.at(self.columns))
            for attention, mlp in zip(self.attention, self.mlp, strict=True)
        ]


Split = tuple[list[int], list[int]]


def problem(costs: Costs, block: Block, devices: Sequence[Device], rows: int, room: Sequence[int]) -> Problem:
    """The problem of the shared layers on these devices, from profiled times."""
    units = range(block.first, block.last)
    mlp = [u for u in units if costs.units[u].kind in MLP]
    attention = [u for u in units if costs.units[u].cut is not None and u not in mlp]

    def load(device: Device, numbers: Sequence[int], count: int) -> Load:
        nothing, everything = (
            sum(costs.seconds(device, u, u + 1, FORWARD, rows, fraction) for u in numbers) for fraction in (0.0, 1.0)
        )
        return Load(nothing, (everything - nothing) / count)

    def weights(numbers: Sequence[int], count: int) -> int:
        parameters = [
            costs.parameters[name]
            for u in numbers
            for name in costs.units[u].parameters
            if name not in shared_cut(costs.units[u]).whole
        ]
        return sum(p.bytes for p in parameters) // count

    return Problem(
        block.heads,
        block.columns,
        tuple(load(device, attention, block.heads) for device in devices),
        tuple(load(device, mlp, block.columns) for device in devices),
        weights(attention, block.heads),
        weights(mlp, block.columns),
        tuple(room),
    )


def balanced(task: Problem) -> Split:
    """Step 1, the balanced partition: whole heads and columns in proportion to capacity, whatever the memory."""
    return split(task.heads, task.capacities), split(task.columns, task.capacities)


def heuristic(task: Problem) -> Split | None:
    """Step 1, then step 2: what overflows a device goes to those that have room, in proportion to capacity, until
    nothing overflows. Columns move before heads, which are coarse. None where it finds no way."""
    heads, columns = balanced(task)
    if task.fits(heads, columns):
        return heads, columns
    most_heads = [max(0, room // task.head_bytes) for room in task.room]
    found = split_within(task.heads, task.capacities, most_heads)
    while found is not None:
        most = [
            max(0, (room - a * task.head_bytes) // task.column_bytes) for room, a in zip(task.room, found, strict=True)
        ]
        filled = split_within(task.columns, task.capacities, most)
        if filled is not None:
            return found, filled
        # Heads stand where columns could be, by less than a head on each device: one moves to where most room is left.
        found = _move_a_head(task, found)
    return None


def _move_a_head(task: Problem, heads: list[int]) -> list[int] | None:
    """One head from where least room is left to where most is; None where that is no use."""
    rest = [room - a * task.head_bytes for room, a in zip(task.room, heads, strict=True)]
    source = min((i for i, a in enumerate(heads) if a), key=lambda i: rest[i])
    target = max(range(len(heads)), key=lambda i: rest[i])
    if source == target or rest[target] - task.head_bytes <= rest[source]:
        return None
    moved = list(heads)
    moved[source] -= 1
    moved[target] += 1
    return moved


def exact(task: Problem) -> Split | None:
    """The split with the least `Problem.seconds` of all that fit. None where none does.

    The slowest device's time in attention is one of devices x heads values, that in the MLP one of devices x columns.
    The former are tried in order, many at once where that is enough to see that none is better than the best so far;
    for one that is, the least of the latter is found by bisection. Whether heads and columns fit within both times is
    a dynamic program over devices, which keeps for every number of heads the most columns that they leave room for.
    """
    times = _values(task.attention, task.heads)
    paces = _values(task.mlp, task.columns)
    floor = float(paces[bisect_left(paces, True, key=lambda pace: _reached(task.mlp, pace, task.columns))])
    best = heuristic(task)
    least = math.inf if best is None else task.seconds(*best)
    first = bisect_left(times, True, key=lambda time: _reached(task.attention, time, task.heads))
    stride = 1
    while first < len(times) and times[first] + floor < least:
        last = min(first + stride, len(times)) - 1
        better = paces[: bisect_left(paces, least - times[first])]
        if _within(task, times[last], better[-1]) is None:  # then none of the times up to the last can be better
            first, stride = last + 1, 2 * stride
        elif last > first:
            stride //= 2
        else:
            place = bisect_left(better, True, key=lambda pace: _within(task, times[last], pace) is not None)
            best = _within(task, times[last], better[place])
            assert best is not None
            least = task.seconds(*best)
            first += 1
    return best


def _values(loads: Sequence[Load], most: int) -> np.ndarray:
    """The times that any device can need for 1 to `most`, in order."""
    counts = np.arange(1, most + 1)
    return np.unique(np.concatenate([load.fixed + counts * load.each for load in loads]))


def _reached(loads: Sequence[Load], seconds: float, total: int) -> bool:
    """Whether the devices can do `total` in so many seconds."""
    return sum(load.within(seconds, total) for load in loads) >= total


def _may_be_within(task: Problem, time: float, pace: float) -> bool:
    """Whether parts of heads and columns would fit: where they don't, whole ones don't either.

    A device with as many columns as it can do has room for some heads besides; every further head takes the place of
    as many columns on any device.
    """
    heads = columns = beside = 0.0
    for attention, mlp, room in zip(task.attention, task.mlp, task.room, strict=True):
        room = max(0, room)
        most_heads = min(attention.within(time, task.heads), room / task.head_bytes)
        most_columns = min(mlp.within(pace, task.columns), room / task.column_bytes)
        heads, columns = heads + most_heads, columns + most_columns
        beside += min(most_heads, (room - most_columns * task.column_bytes) / task.head_bytes)
    displaced = max(0.0, task.heads - beside) * task.head_bytes / task.column_bytes
    return heads >= task.heads * (1 - 1e-12) and columns - displaced >= task.columns * (1 - 1e-12)


#: Fewer columns than any device can lack: no number of devices makes up for it.
_IMPOSSIBLE = -(2**40)


def _within(task: Problem, time: float, pace: float) -> Split | None:
    """A split whose attention takes at most `time`, and whose MLP takes at most `pace`, on every device."""
    if not _may_be_within(task, time, pace):
        return None
    rest = np.arange(task.heads + 1)[:, None] - np.arange(task.heads + 1)[None, :]  # heads for the devices before
    most = np.full(task.heads + 1, _IMPOSSIBLE, dtype=np.int64)
    most[0] = 0
    heads = np.arange(task.heads + 1)
    chosen, tables = [], []
    for attention, mlp, room in zip(task.attention, task.mlp, task.room, strict=True):
        columns = np.minimum(mlp.within(pace, task.columns), (room - heads * task.head_bytes) // task.column_bytes)
        allowed = (columns >= 0) & (heads <= attention.within(time, task.heads))
        table = np.where(allowed, columns, _IMPOSSIBLE)
        reached = np.where(rest >= 0, most[rest], _IMPOSSIBLE) + table
        chosen.append(reached.argmax(axis=1))
        most = np.maximum(reached.max(axis=1), _IMPOSSIBLE)
        tables.append(table)
    if most[task.heads] < task.columns:
        return None
    picked, left = [], task.heads
    for picks in reversed(chosen):
        picked.append(int(picks[left]))
        left -= picked[-1]
    picked.reverse()
    filled = split_within(
        task.columns, task.capacities, [int(table[a]) for table, a in zip(tables, picked, strict=True)]
    )
    assert filled is not None, "the bounds add up to enough"
    return picked, filled
