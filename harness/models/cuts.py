"""Modules cut to a device's share of their width, before their weights are read: nothing more is ever in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.models.layered import Layered
from harness.plan.values import Range


@dataclass(frozen=True)
class Piece:
    """Which part of a stored tensor a parameter is: the ranges of one axis, joined."""

    axis: int
    ranges: tuple[Range, ...]

    @property
    def length(self) -> int:
        return sum(high - low for low, high in self.ranges)

    def of(self, whole: Tensor) -> Tensor:
        """The piece of a tensor."""
        return torch.cat([whole.narrow(self.axis, low, high - low) for low, high in self.ranges], self.axis)

    def put(self, piece: Tensor, whole: Tensor) -> None:
        """Write the piece to where it belongs in a whole tensor."""
        first = 0
        for low, high in self.ranges:
            whole.narrow(self.axis, low, high - low).copy_(piece.narrow(self.axis, first, high - low))
            first += high - low

    def read(self, file: safe_open, name: str) -> Tensor:
        """The piece of the tensor called `name`; the rest of it is not read."""
        stored = file.get_slice(name)
        found = [stored[low:high] if self.axis == 0 else stored[:, low:high] for low, high in self.ranges]
        return found[0] if len(found) == 1 else torch.cat(found, self.axis)


def cut(layered: Layered, widths: Mapping[int, Range], biases: Collection[str]) -> Layered:
    """Replace the parameters of the units by those of some of their channels, changing the modules in place.

    layered: on "meta". `widths[unit]` are the channels, in whole granules of the unit's `Cut`. Of the biases that are
    added to a sum over the width, those in `biases` stay.
    """
    names = layered.parameter_names()
    pieces: dict[str, Piece] = {}
    for number, channels in widths.items():
        how = layered.units[number].cut
        assert how is not None, "asked only of units that can be cut"
        for module in how.columns:
            outputs, _ = _axes(module)
            packed = _shape(module)[outputs] // how.width  # GPT-2 has queries, keys and values in one product
            ranges = tuple((channels[0] + i * how.width, channels[1] + i * how.width) for i in range(packed))
            pieces |= _keep(module, names, weight=Piece(outputs, ranges), bias=Piece(0, ranges))
            if isinstance(module, Conv1D):
                module.nf = Piece(outputs, ranges).length
        for module in how.rows:
            _, inputs = _axes(module)
            stays = module.bias is None or names[id(module.bias)] in biases
            pieces |= _keep(module, names, weight=Piece(inputs, (channels,)))
            if not stays:
                _drop_bias(module)
    return replace(layered, pieces=pieces)


def _axes(module: nn.Module) -> tuple[int, int]:
    """The axes of the output and of the input channels of a product's weight."""
    return (1, 0) if isinstance(module, Conv1D) else (0, 1)


def _shape(product: nn.Module) -> torch.Size:
    assert isinstance(product.weight, Tensor)
    return product.weight.shape


def _keep(module: nn.Module, names: Mapping[int, str], **pieces: Piece) -> dict[str, Piece]:
    """Make the module's parameters as large as the pieces. Returns the pieces by the parameters' names."""
    found = {}
    for attribute, piece in pieces.items():
        whole = getattr(module, attribute)
        if whole is None:
            continue
        shape = list(whole.shape)
        shape[piece.axis] = piece.length
        setattr(module, attribute, nn.Parameter(whole.new_empty(shape), whole.requires_grad))
        found[names[id(whole)]] = piece
    return found


def _drop_bias(module: nn.Module) -> None:
    """The product without its bias. Conv1D can't do without one: it adds a zero."""
    zero = torch.zeros(1, dtype=module.weight.dtype) if isinstance(module, Conv1D) else None
    del module.bias
    if zero is None:
        module.register_parameter("bias", None)
    else:
        module.register_buffer("bias", zero, persistent=False)
