"""What can be shared of a model's layers, and how much of it each device takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from harness.cluster import Cluster
from harness.costs import FORWARD, Costs, UnitCost, WidthCut
from harness.errors import OrreryError, Unsupported, unknown_name
from harness.plan.collectives import chunks
from harness.plan.pieces import CORE
from harness.plan.values import Range
from harness.schedules import split

HYBRID, TENSOR, SEQUENCE = SCHEMES = ("hybrid", "tensor", "sequence")
EQUAL, SPEED = WAYS = ("equal", "speed")
LEADER, EVERYWHERE = EMBEDDINGS = ("leader", "everywhere")
MLP = ("mlp-in", "mlp-out")


@dataclass(frozen=True)
class Shares:
    """What each device of the ring takes: of the heads of attention, the columns of the MLP, the tokens.

    Each adds up to what the model and the workload have; 0 for a device that takes none.
    """

    heads: tuple[int, ...]
    columns: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """The shared layers' units [first, last), what can be shared of them, and the tensor that enters and leaves."""

    first: int
    last: int
    heads: int
    columns: int
    tokens: int
    entering: str
    leaving: str


def shared_block(costs: Costs) -> Block:
    """The layers that can be shared. Raises Unsupported for a model, or a technique, of which they can't be."""
    cut = [index for index, unit in enumerate(costs.units) if unit.cut is not None]
    if not cut:
        raise Unsupported("this model's layers can't be shared by width")
    layers = [units for units in costs.layers if units[0] <= cut[-1] and cut[0] < units[1]]
    first, last = layers[0][0], layers[-1][1]
    units = costs.units[first:last]
    core = next(unit for unit in units if unit.kind == CORE)
    attention, mlp = shared_cut(core), shared_cut(next(unit for unit in units if unit.kind in MLP))
    (entering,), (leaving,) = costs.carried(first), costs.carried(last)
    return Block(
        first,
        last,
        attention.width // attention.granule,
        mlp.width,
        costs.tensors[core.writes[0]].tokens,
        entering,
        leaving,
    )


def shared_cut(unit: UnitCost) -> WidthCut:
    """How the unit is cut. AssertionError for one that can't be."""
    assert unit.cut is not None, f"{unit.name} can't be cut"
    return unit.cut


def even_shares(costs: Costs, count: int) -> Shares:
    """Shares that are as even as whole heads, columns and tokens allow, the larger ones first."""
    block = shared_block(costs)
    return Shares(*(tuple(b - a for a, b in chunks(n, count)) for n in (block.heads, block.columns, block.tokens)))


def shares_of(costs: Costs, cluster: Cluster, rows: int, how: str, tokens: bool) -> Shares:
    """ "equal" shares of everything; or heads and columns, or with `tokens` those, in proportion to "speed".

    Speed: the shared layers per second. Raises OrreryError for another way.
    """
    if how not in WAYS:
        raise unknown_name("way to share", how, WAYS)
    block, even = shared_block(costs), even_shares(costs, len(cluster.devices))
    if how == EQUAL:
        return even
    speeds = [1 / costs.seconds(device, block.first, block.last, FORWARD, rows) for device in cluster.devices]
    if tokens:
        return replace(even, tokens=tuple(split(block.tokens, speeds)))
    return replace(even, heads=tuple(split(block.heads, speeds)), columns=tuple(split(block.columns, speeds)))


def whole_tiles(method: str, options: Mapping[str, object]) -> int:
    """The method's option `tiles`. Raises OrreryError for what is no number of pieces."""
    tiles = options["tiles"]
    if type(tiles) is not int or tiles < 1:
        raise OrreryError(f"{method}.tiles is {tiles!r}; it must be a whole number of at least 1.")
    return tiles


def known_embeddings(method: str, options: Mapping[str, object]) -> str:
    """The method's option `embeddings`. Raises OrreryError for what is no place."""
    embeddings = str(options["embeddings"])
    if embeddings not in EMBEDDINGS:
        raise unknown_name(f"value of {method}.embeddings", embeddings, EMBEDDINGS)
    return embeddings


def ranges(shares: Iterable[int]) -> list[Range]:
    return list(pairwise(accumulate(shares, initial=0)))
