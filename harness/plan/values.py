"""Values: the tensors, and pieces of tensors, that actions read and write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Range = tuple[int, int]
AXES = ("rows", "tokens", "width")

#: What a tensor is to the memory ledger.
KINDS = ("weights", "gradients", "optimizer", "activations", "buffers", "cache", "snapshots")


class Value(NamedTuple):
    """A tensor of one micro-batch (-1: of none), with its row, token and width range (None: all) and a version.

    Names are unique per tensor; the same name on two devices means two copies or two parts of one tensor.
    Ranges are half-open. A version counts the updates of a weight, or the stages of a reduction.
    """

    name: str
    micro_batch: int = -1
    rows: Range | None = None
    tokens: Range | None = None
    width: Range | None = None
    version: int = 0

    def __str__(self) -> str:
        text = self.name
        if self.micro_batch >= 0:
            text += f"#{self.micro_batch}"
        ranges = [
            f"{axis}{r[0]}:{r[1]}"
            for axis, r in (("r", self.rows), ("t", self.tokens), ("w", self.width))
            if r is not None
        ]
        if ranges:
            text += f"[{' '.join(ranges)}]"
        return f"{text}.v{self.version}" if self.version else text

    def range_of(self, axis: str) -> Range | None:
        """Its range on the axis "rows", "tokens" or "width"."""
        found: Range | None = getattr(self, axis)
        return found

    def part(self, axis: str, part: Range | None, version: int) -> Value:
        """Of another version that range on the axis "tokens" or "width"."""
        if axis == "tokens":
            return self._replace(tokens=part, version=version)
        return self._replace(width=part, version=version)


@dataclass(frozen=True)
class Tensor:
    """The shape behind a value's name: [rows,] tokens, width, of `itemsize` bytes, plus `fixed_bytes` once.

    `per_row` False: no row axis (weights, gradients, a batchless bias).
    """

    kind: str
    tokens: int
    width: int
    itemsize: int = 1
    per_row: bool = False
    fixed_bytes: int = 0

    def bytes(self, value: Value) -> int:
        tokens = self.tokens if value.tokens is None else value.tokens[1] - value.tokens[0]
        width = self.width if value.width is None else value.width[1] - value.width[0]
        size = tokens * width * self.itemsize
        if self.per_row:
            if value.rows is None:
                raise ValueError(f"{value} has rows, but the value names none")
            size *= value.rows[1] - value.rows[0]
        return size + self.fixed_bytes

    def extent(self, axis: str) -> int:
        """Elements along the axis "tokens" or "width"."""
        return self.tokens if axis == "tokens" else self.width


def joined_axis(pieces: Sequence[Value]) -> str:
    """The axis along which the pieces differ, "rows" where there is nothing to tell. ValueError where there are two."""
    differ = [axis for axis in AXES if len({piece.range_of(axis) for piece in pieces}) > 1]
    if len(differ) > 1:
        raise ValueError(f"the pieces differ in {' and '.join(differ)}")
    return differ[0] if differ else AXES[0]


def saved_name(first: int, last: int, cached: bool = False) -> str:
    """The tensor of what autograd keeps of the units [first, last), where the frozen ones are run or cached."""
    return f"saved@{first}:{last}{'.cached' if cached else ''}"
