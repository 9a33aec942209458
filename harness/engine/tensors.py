"""What a value is made of while a plan runs: tensors, flat pieces of them, and bytes for the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.plan.values import Value


@dataclass(frozen=True)
class Bundle:
    """A flat value in pieces: 1-D tensors of one type, laid end to end. Nothing is copied to slice or to add."""

    pieces: tuple[Tensor, ...]

    @property
    def width(self) -> int:
        return sum(piece.numel() for piece in self.pieces)

    def slice(self, low: int, high: int) -> Bundle:
        """The elements [low, high)."""
        found, start = [], 0
        for piece in self.pieces:
            end = start + piece.numel()
            if low < end and start < high:
                found.append(piece[max(low - start, 0) : min(high - start, piece.numel())])
            start = end
        return Bundle(tuple(found))

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    def clone(self) -> Bundle:
        return Bundle(tuple(piece.clone() for piece in self.pieces))

    def add_(self, other: Bundle) -> None:
        """Add another bundle of the same width, however it is cut."""
        torch._foreach_add_(*self._cut_alike(other))

    def copy_(self, other: Bundle) -> None:
        """Take over another bundle's elements, likewise."""
        torch._foreach_copy_(*self._cut_alike(other))

    def _cut_alike(self, other: Bundle) -> tuple[list[Tensor], list[Tensor]]:
        """This bundle and the other in pieces of the same sizes. Copies the other only where both have several."""
        mine, sizes = [piece.numel() for piece in self.pieces], [piece.numel() for piece in other.pieces]
        if mine == sizes:
            return list(self.pieces), list(other.pieces)
        if len(mine) == 1:
            return list(self.pieces[0].split(sizes)), list(other.pieces)
        whole = other.pieces[0] if len(sizes) == 1 else torch.cat(other.pieces)
        return list(self.pieces), list(whole.split(mine))

    def square_sum(self) -> Tensor:
        """The sum of the squares of all elements, as a tensor of one element, float32 whatever the pieces are."""
        norms = torch._foreach_norm(list(self.pieces))
        return torch.stack(list(norms)).float().square().sum().reshape(1)


def flat(tensor: Tensor) -> Bundle:
    """A contiguous tensor as a bundle of one piece, sharing its memory."""
    return Bundle((tensor.detach().view(-1),))


def part(tensor: Tensor, whole: Value, wanted: Value) -> Tensor:
    """The piece `wanted` of the tensor that holds `whole`: rows, then tokens; width is the last axis.

    tensor: [rows, tokens..., width], or fewer axes where the model has fewer.
    """
    for axis, (held, asked) in enumerate(((whole.rows, wanted.rows), (whole.tokens, wanted.tokens))):
        if asked is not None and asked != held:
            first = 0 if held is None else held[0]
            tensor = tensor.narrow(axis, asked[0] - first, asked[1] - asked[0])
    if wanted.width is not None and wanted.width != whole.width:
        first = 0 if whole.width is None else whole.width[0]
        tensor = tensor.narrow(-1, wanted.width[0] - first, wanted.width[1] - wanted.width[0])
    return tensor


def dtype_name(tensor: Tensor) -> str:
    """ "float32" for torch.float32: the name that travels with a frame."""
    return str(tensor.dtype).removeprefix("torch.")


def on_host(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, in memory that a socket can read; what a GPU holds passes through pinned memory."""
    tensor = tensor.detach().contiguous()
    if tensor.device.type == "cpu":
        return tensor
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return staged.copy_(tensor)


def empty_on_host(shape: Sequence[int], dtype: str, device: torch.device) -> Tensor:
    """Memory for a socket to fill, pinned where a GPU will take it."""
    return torch.empty(tuple(shape), dtype=getattr(torch, dtype), pin_memory=device.type == "cuda")


def buffer(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, without a copy."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
