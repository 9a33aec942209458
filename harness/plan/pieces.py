"""What a pass over some tokens, or some of the width, of units reads and makes.

By kind a unit is a product by columns (`COLUMNS`), which makes its channels of all that it reads; an attention core,
which makes the channels of its heads, of its tokens, from the keys and values of all tokens; a product by rows
(`ROWS`), which makes of its channels a part of a sum over the width; or does the same with each token (`TOKENWISE`).
Whatever is of another kind is done whole.
"""

from __future__ import annotations

from math import prod

from harness.costs import Costs, UnitCost
from harness.plan.actions import Compute
from harness.plan.values import Range, Value

COLUMNS = ("qkv", "mlp-in")
ROWS = ("projection", "mlp-out")
CORE = "attention"
TOKENWISE = (*COLUMNS, *ROWS, "connective")


def is_part(action: Compute) -> bool:
    return action.tokens is not None or action.width is not None


def inputs(action: Compute, costs: Costs) -> list[Value]:
    """The values that a forward pass can't do without, in the pieces that it needs; of versions it knows nothing.

    Of what was kept of the tokens before it is all tokens.
    """
    first, last = action.units
    units = costs.units[first:last]
    read = {name for unit in units for name in unit.reads}
    whole = {name for unit in units if unit.kind == CORE for name in unit.reads[1:3]}.union(costs.loaded)
    width = None if units[0].kind in COLUMNS else action.width
    names = [name for name in (*costs.carried(first), *costs.loaded) if name in read]
    return [
        Value(name, action.micro_batch, action.rows, None if name in whole else action.tokens, width) for name in names
    ]


def outputs(action: Compute, costs: Costs) -> list[Value]:
    """The values that a forward pass makes for later units; of a product by rows its part of the sum.

    And those that outlive it, which are there for all tokens.
    """
    first, last = action.units
    units = costs.units[first:last]
    made = {name for unit in units for name in unit.writes}
    width = None if units[-1].kind in ROWS else action.width
    leaving = [
        Value(name, action.micro_batch, action.rows, action.tokens, width)
        for name in costs.carried(last)
        if name in made
    ]
    return leaving + [Value(name, action.micro_batch, action.rows, None, width) for name in costs.kept if name in made]


def extents(unit: UnitCost, costs: Costs) -> tuple[int, int]:
    """How many tokens the unit has, and how many channels can be shared; 1 where none can."""
    return costs.tensors[unit.writes[0]].tokens if unit.writes else 1, 1 if unit.cut is None else unit.cut.width


def spans(action: Compute, unit: UnitCost, costs: Costs) -> tuple[Range, Range]:
    """The action's tokens and channels of the unit."""
    tokens, width = extents(unit, costs)
    return action.tokens or (0, tokens), action.width or (0, width)


def fraction(action: Compute, costs: Costs) -> float:
    """The share of the tokens and channels of its rows that the pass works on."""
    if not is_part(action):
        return 1.0
    unit = costs.units[action.units[0]]
    return prod(high - low for low, high in spans(action, unit, costs)) / prod(extents(unit, costs))


def broken_rule(action: Compute, costs: Costs) -> str:
    """What is wrong with a pass over a part of its units, or with the part of the weights; empty: nothing."""
    weights = [value for value in action.weights if value.name.startswith("weights@")]
    other = next((value for value in weights if value.width != action.width), None)
    if other is not None:
        return f"its width is {action.width or 'all'}, and that of {other} {other.width or 'all'}"
    if not is_part(action):
        return ""
    units = costs.units[slice(*action.units)]
    whole = next((unit for unit in units if unit.kind not in (*TOKENWISE, CORE)), None)
    if whole is not None:
        return f"{whole.name} can't be done by tokens or width"
    tokens, width = extents(units[0], costs)
    inside = {name for unit in units for name in unit.writes}
    for unit in units:
        if action.tokens is not None and unit.kind == CORE and inside.intersection(unit.reads[1:3]):
            return f"{unit.name} needs the keys and values of all tokens, and the pass makes some of them"
    if action.tokens is not None and not _within(action.tokens, tokens):
        return f"its tokens are {action.tokens} of {tokens}"
    if action.width is None:
        return ""
    cut = units[0].cut
    if len(units) > 1 or cut is None:
        return "the width of one unit can be cut, and of that only where the unit says how"
    if not _within(action.width, width) or any(edge % cut.granule for edge in action.width):
        return f"its width is {action.width}; allowed is some of {width} channels in multiples of {cut.granule}"
    return ""


def _within(part: Range, extent: int) -> bool:
    return 0 <= part[0] < part[1] <= extent
