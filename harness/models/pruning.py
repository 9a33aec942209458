"""Side layers that begin as the backbone's own, pruned: of its channels 1 in `reduction` is kept, in one shot.

Pruning is structural, so that what is left is a layer. Kept are the same channels of the residual stream in all layers
of a stack, and where a decoder reads the encoder; of each head the same channels of queries and keys, and the same of
values and the output projection; and the same channels between the two matrices of an MLP. Biases, norms and T5's
position tables go with them. Ways down and up, and gates, start as without pruning: the backbone has nothing like them.

A channel is as important as the squares of all weights that write or read it add up to. That is our choice: PAC prints
no criterion. Its accuracy code ranks by the Fisher information of 1,024 samples, as LST does, which is not done here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.models.layered import Layered, Unit

#: Channels that are kept or pruned together: where they are, and what.
Group: TypeAlias = tuple[str, str]
HIDDEN, MEMORY, SCORES, CONTEXT, INNER = "hidden", "memory", "scores", "context", "inner"
#: By kind of unit: what each of its matrices writes, in order, and what all of them read.
MATRICES = {
    "qkv": ((SCORES, SCORES, CONTEXT), HIDDEN),
    "q": ((SCORES,), HIDDEN),
    "kv": ((SCORES, CONTEXT), MEMORY),
    "projection": ((HIDDEN,), CONTEXT),
    "mlp-in": ((INNER,), HIDDEN),
    "mlp-out": ((HIDDEN,), INNER),
}


class Weights(NamedTuple):
    """A matrix of [outputs, inputs] or, where nothing is read, a vector of [outputs]: views of a model's parameters."""

    tensor: Tensor
    writes: Group
    reads: Group | None = None


class Place(NamedTuple):
    """A unit, the stack that it belongs to, and the latest unit that makes queries."""

    unit: Unit
    stack: str
    queries: str


@torch.no_grad()
def prune(layered: Layered, reduction: int) -> None:
    """Fill the layers of the side network from those that they are beside, in place."""
    backbone = list(_places(unit for unit in layered.units if not _is_aside(unit)))
    side = list(_places(unit for unit in layered.units if _is_aside(unit)))
    theirs = dict(_weights(backbone))
    head_dims = {place.queries: place.unit.head_dim for place in backbone if place.unit.kind == "attention"}
    kept = {
        (where, what): _most_important(importance, head_dims.get(where) or len(importance), reduction)
        for (where, what), importance in _importances(theirs.values()).items()
    }
    for name, ours in _weights(side):
        source = theirs[name]
        rows = source.tensor[kept[source.writes]]
        ours.tensor.copy_(rows if source.reads is None else rows[:, kept[source.reads]])
    tables = {unit.name: unit for unit in layered.local_units if unit.kind == "bias"}
    for unit in filter(_is_aside, tables.values()):
        for table, whole in zip(unit.parameters(), tables[_beside(unit)].parameters(), strict=True):
            table.copy_(whole)


def _is_aside(unit: Unit) -> bool:
    return ".side." in unit.name


def _beside(unit: Unit) -> str:
    """The name of the backbone's unit that a unit is beside; the backbone's own have theirs."""
    return unit.name.replace(".side.", ".")


def _places(units: Iterable[Unit]) -> Iterator[Place]:
    """`encoder.3.qkv` is of the stack `encoder`; what ends the last stack, `head.final-norm`, is still of that one."""
    stack = queries = ""
    for unit in units:
        prefix, _, rest = _beside(unit).partition(".")
        stack = prefix if "." in rest else stack
        queries = _beside(unit) if unit.kind in ("qkv", "q") else queries
        yield Place(unit, stack, queries)


def _weights(places: Iterable[Place]) -> Iterator[tuple[tuple[str, int], Weights]]:
    """All that is pruned of these units: each by its unit's name, the backbone's, and its number in the unit."""
    first_stack = ""
    for unit, stack, queries in places:
        first_stack = first_stack or stack
        layer = _beside(unit).rpartition(".")[0]
        where = {HIDDEN: stack, MEMORY: first_stack, SCORES: queries, CONTEXT: queries, INNER: layer}
        found: list[Weights] = []
        if unit.kind == "connective":
            found = [Weights(parameter, (stack, HIDDEN)) for parameter in unit.parameters()]
        elif unit.kind in MATRICES:
            writes, reads = MATRICES[unit.kind]
            source = (where[reads], HIDDEN if reads == MEMORY else reads)
            for (matrix, bias), what in zip(_matrices(unit, len(writes)), writes, strict=True):
                found.append(Weights(matrix, (where[what], what), source))
                if bias is not None:
                    found.append(Weights(bias, (where[what], what)))
        yield from (((_beside(unit), number), weights) for number, weights in enumerate(found))


def _matrices(unit: Unit, count: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The unit's matrices as [outputs, inputs], with their biases. In GPT-2 transposed, and three in one."""
    modules = [module for module in unit.held.modules() if isinstance(module, (nn.Linear, Conv1D))]
    fused = count // len(modules)
    for module in modules:
        matrix = module.weight.T if isinstance(module, Conv1D) else module.weight
        biases = [None] * fused if module.bias is None else module.bias.chunk(fused)
        yield from zip(matrix.chunk(fused), biases, strict=True)


def _importances(weights: Iterable[Weights]) -> dict[Group, Tensor]:
    """Of each group of channels the squares of what writes or reads them, added up."""
    found: dict[Group, Tensor] = {}
    for tensor, writes, reads in weights:
        if reads is not None:
            squares = tensor.double().square()
            for group, importance in ((writes, squares.sum(1)), (reads, squares.sum(0))):
                found[group] = found[group] + importance if group in found else importance
    return found


def _most_important(importance: Tensor, block: int, reduction: int) -> Tensor:
    """The channels that are kept, in order: of each block the most important ones, and of equal ones the first."""
    ranked = importance.view(-1, block).argsort(dim=1, descending=True, stable=True)
    starts = torch.arange(0, len(importance), block).unsqueeze(1)
    return (ranked[:, : block // reduction].sort(dim=1).values + starts).flatten()
