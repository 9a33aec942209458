"""Is every sum over the width whole when it is read? Followed through sends, sums and collectives, without running.

A product by rows that is shared among devices leaves with each of them a part of the sum; a bias is added by one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from harness.costs import Costs, UnitCost
from harness.plan.actions import Combine, Compute, Send
from harness.plan.flow import is_piece
from harness.plan.graph import Graph, InvalidPlan
from harness.plan.pieces import ROWS, extents
from harness.plan.plan import Phase
from harness.plan.values import Range, Value

#: What is in a sum: channels, and names of biases -> how many times.
Content = Counter[Range | str]


def check_sums(phase: Phase, graph: Graph, order: Sequence[int], costs: Costs) -> None:
    """Every pass reads sums that hold each channel and each bias once. `order`: the graph's nodes as they can run.

    Raises InvalidPlan.
    """
    if not any(isinstance(action, Compute) and action.width is not None for action in graph.actions):
        return
    _Follower(phase, graph, costs).follow(order)


class _Follower:
    def __init__(self, phase: Phase, graph: Graph, costs: Costs) -> None:
        self.phase, self.graph, self.costs = phase, graph, costs
        self.sums = {unit.writes[0]: unit for unit in costs.units if unit.kind in ROWS and unit.cut is not None}
        self.held: dict[tuple[int, str], dict[Value, Content]] = defaultdict(dict)

    def follow(self, order: Sequence[int]) -> None:
        for node in order:
            action, device = self.graph.actions[node], self.graph.device[node]
            if isinstance(action, Compute):
                self._compute(action, device)
            elif isinstance(action, Send) and action.value.name in self.sums:
                self._hold(self.graph.peer[node], action.value, self._find(device, action.value))
            elif isinstance(action, Combine) and action.write.name in self.sums:
                self._combine(action, device)

    def _compute(self, action: Compute, device: int) -> None:
        for value in action.reads:
            if value.name in self.sums:
                self._check_whole(value, self._find(device, value), device)
        biases = {value.name.removeprefix("weights:") for value in action.weights}
        for value in action.writes:
            unit = self.sums.get(value.name)
            if unit is not None:
                assert unit.cut is not None
                part: Content = Counter({action.width or (0, unit.cut.width): 1})
                part.update(unit.cut.whole if action.width is None else biases.intersection(unit.cut.whole))
                self._hold(device, value, part)

    def _combine(self, action: Combine, device: int) -> None:
        found = [self._find(device, value) for value in action.reads]
        if action.op == "sum":
            self._hold(device, action.write, sum(found, Counter()))
            return
        if any(content != found[0] for content in found[1:]):
            raise self._fail(device, f"{action.write} is joined of pieces that are not the same sum")
        self._hold(device, action.write, found[0] if found else Counter())

    def _hold(self, device: int, value: Value, content: Content) -> None:
        self.held[device, value.name][value] = content

    def _find(self, device: int, value: Value) -> Content:
        held = self.held[device, value.name]
        if value in held:
            return held[value]
        return next(content for whole, content in held.items() if is_piece(value, whole))

    def _check_whole(self, value: Value, content: Content, device: int) -> None:
        unit: UnitCost = self.sums[value.name]
        assert unit.cut is not None
        reached, (_, width) = 0, extents(unit, self.costs)
        for low, high in sorted(part for part in content.elements() if not isinstance(part, str)):
            if low != reached:
                what = "misses the channels" if low > reached else "has twice the channels"
                raise self._fail(device, f"the sum {value} {what} {min(low, reached)}:{max(low, reached)}")
            reached = high
        if reached != width:
            raise self._fail(device, f"the sum {value} misses the channels {reached}:{width}")
        for name in unit.cut.whole:
            if content[name] != 1:
                raise self._fail(device, f"the sum {value} has {name} {content[name]} times, and should have it once")

    def _fail(self, device: int, rule: str) -> InvalidPlan:
        return InvalidPlan(f"phase {self.phase.name!r}: {self.graph.devices[device]}: {rule}")
