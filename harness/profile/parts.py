"""What a part of a unit costs on this machine beside the whole, where devices share it by tokens and width.

A part takes longer than its share: small products run at a lower rate, and every call has a price of its own. That is
taken as linear, through the whole and through a quarter of the tokens and of the channels.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from time import perf_counter

import torch
from torch import Tensor

from harness.costs import Costs
from harness.models import build
from harness.models.cuts import cut
from harness.models.layered import Cut, Layered, Unit
from harness.plan.pieces import CORE, ROWS, TOKENWISE
from harness.workload import Workload

PARTS = 4
WARM_UPS, LEAST_REPEATS = 2, 5


def fixed_shares(
    workload: Workload, costs: Costs, whole: Layered, batch: Mapping[str, Tensor], least_s: float
) -> tuple[float, ...]:
    """Of each unit of the chain the share of its time that every part of it takes, too: from 0 to 1.

    costs: of the chain `whole`, which may be that of one more token. batch: what it reads, of as many rows as are to be
    timed. 0 for units that can't be shared. Medians of passes over whole units and over parts in turn, for at least
    `least_s` seconds.
    """
    part = _chain(_cut(workload, costs), costs)
    with torch.no_grad():
        values = whole.run(0, len(whole.units), dict(batch), wanted=costs.tensors)
        places = [place for place, unit in enumerate(whole.units) if _is_shared(unit)]
        inputs = [[values[name] for name in whole.units[place].reads] for place in places]
        pieces = [_piece(whole.units[place], found) for place, found in zip(places, inputs, strict=True)]
        seconds: tuple[list[list[float]], list[list[float]]] = ([], [])
        began = perf_counter()
        while len(seconds[0]) < WARM_UPS + LEAST_REPEATS or perf_counter() - began < least_s:
            for found, layered, given in zip(seconds, (whole, part), (inputs, pieces), strict=True):
                timed = zip(places, given, strict=True)
                found.append([_timed(layered.units[place], tensors) for place, tensors in timed])
    medians = [[statistics.median(column) for column in zip(*found[WARM_UPS:], strict=True)] for found in seconds]
    shares = [0.0] * len(whole.units)
    for place, all_of_it, quarter, tensors, piece in zip(places, *medians, inputs, pieces, strict=True):
        fraction = _fraction(whole.units[place], tensors, piece)
        if fraction < 1:
            shares[place] = min(1.0, max(0.0, (quarter / all_of_it - fraction) / (1 - fraction)))
    return tuple(shares)


def _chain(layered: Layered, costs: Costs) -> Layered:
    if not costs.decodes:
        return layered
    assert layered.decoding is not None
    return layered.decoding


def _is_shared(unit: Unit) -> bool:
    return unit.cut is not None or unit.kind in TOKENWISE


def _cut(workload: Workload, costs: Costs) -> Layered:
    """The model with a part of the channels of every unit that has some to share; weights are noise."""
    layered = build(workload, device="meta")
    widths = {number: (0, _width(unit.cut)) for number, unit in enumerate(layered.units) if unit.cut is not None}
    biases = {name for unit in costs.units if unit.cut is not None for name in unit.cut.whole}
    layered = cut(layered, widths, biases)
    layered.root.to_empty(device="cpu")
    for parameter in layered.root.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layered


def _piece(unit: Unit, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of what the unit reads that which a part of it does."""
    return [_sliced(unit, place, tensor).contiguous() for place, tensor in enumerate(tensors)]


def _sliced(unit: Unit, place: int, tensor: Tensor) -> Tensor:
    """[rows, tokens, width], or a mask, which stays."""
    if tensor.dim() != 3:
        return tensor
    if unit.kind != CORE:
        tensor = tensor.narrow(1, 0, max(1, tensor.shape[1] // PARTS))
    if unit.kind in (CORE, *ROWS):
        assert unit.cut is not None
        tensor = tensor.narrow(2, 0, _width(unit.cut))
    return tensor


def _fraction(unit: Unit, tensors: Sequence[Tensor], piece: Sequence[Tensor]) -> float:
    """The share of the unit's tokens and channels that the piece has."""
    fraction = piece[0].shape[1] / tensors[0].shape[1]
    return fraction if unit.cut is None else fraction * _width(unit.cut) / unit.cut.width


def _width(cut: Cut) -> int:
    """A quarter of the channels, or what is next to it in whole granules: at least one."""
    return max(cut.granule, cut.width // PARTS // cut.granule * cut.granule)


def _timed(unit: Unit, tensors: Sequence[Tensor]) -> float:
    began = perf_counter()
    unit(*tensors)
    return perf_counter() - began
