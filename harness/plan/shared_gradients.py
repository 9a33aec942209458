"""Does every step see the whole gradient where layers are shared? Followed through all sums, without running.

What a pass gives back for a tensor that it reads is its part of a sum over all units that read it, and of each over all
its tokens and channels. A pass begins with what that sum says of what it has made.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

from harness.costs import BACKWARD, Costs, UnitCost
from harness.plan.actions import Combine, Commit, Compute, Send, Step
from harness.plan.flow import is_piece
from harness.plan.graph import Graph, InvalidPlan
from harness.plan.pieces import CORE, ROWS, TOKENWISE, extents, is_part, spans
from harness.plan.plan import Phase, Plan
from harness.plan.values import Range, Value


class Part(NamedTuple):
    """What is in a gradient: of a unit the tokens and channels of its pass. `aligned`: they are its own, too."""

    unit: int
    tokens: Range
    width: Range
    aligned: bool = True


Content = Counter[Part]


def is_shared(phase: Phase) -> bool:
    """Whether devices go through their units pass by pass, and not in one: then each gives back its own part only."""
    return any(
        isinstance(action, Compute) and (action.units != phase.shards[device].units or is_part(action))
        for device, actions in phase.actions.items()
        for action in actions
    )


def check_shared_gradients(phase: Phase, plan: Plan, graph: Graph, order: Sequence[int], costs: Costs) -> None:
    """Each pass on the way back begins with the whole gradients of what it has made, and every device that holds
    trained weights steps once with their whole gradient, of all rows and tokens.

    `order`: the graph's nodes as they can run. Raises InvalidPlan.
    """
    _Follower(phase, plan, graph, costs).follow(order)


class _Follower:
    def __init__(self, phase: Phase, plan: Plan, graph: Graph, costs: Costs) -> None:
        self.phase, self.plan, self.graph, self.costs = phase, plan, graph, costs
        self.held: dict[tuple[int, str], dict[Value, Content]] = defaultdict(dict)
        self.stepped: dict[int, Counter[str]] = defaultdict(Counter)
        self.readers: dict[str, list[int]] = defaultdict(list)
        for number, unit in enumerate(costs.units):
            for name in unit.reads:
                self.readers[name].append(number)

    def follow(self, order: Sequence[int]) -> None:
        for node in order:
            action, device = self.graph.actions[node], self.graph.device[node]
            if isinstance(action, Compute) and action.direction == BACKWARD:
                self._backward(action, device)
            elif isinstance(action, Send) and self._is_gradient(action.value):
                self._hold(self.graph.peer[node], action.value, self._find(device, action.value))
            elif isinstance(action, Combine) and self._is_gradient(action.write):
                self._combine(action, device)
            elif isinstance(action, Step):
                self._step(action, device)
        for device, name in enumerate(self.graph.devices):
            once = Counter(self._trained(name))
            if self.stepped[device] != once:
                odd = min((once - self.stepped[device]) + (self.stepped[device] - once))
                raise self._fail(device, f"{self.stepped[device][odd]} steps use {odd}, and {once[odd]} should")
            if sum(isinstance(action, Commit) for action in self.phase.actions[name]) != 1:
                raise self._fail(device, "a round of training has one commit")

    def _is_gradient(self, value: Value) -> bool:
        return value.name.startswith("grad:") or self.plan.tensors[value.name].kind == "gradients"

    def _trained(self, device: str) -> Iterator[str]:
        """The gradients of the weights that the device holds any of."""
        for value in self.phase.live.get(device, ()):
            gradient = "gradients" + value.name.removeprefix("weights")
            is_weight = self.plan.tensors[value.name].kind == "weights" and gradient in self.plan.tensors
            if is_weight and (value.width is None or value.width[0] < value.width[1]):
                yield gradient

    def _backward(self, action: Compute, device: int) -> None:
        """What it gives back is of the tokens of which gradients have come: all others are zeros."""
        first, last = action.units
        covered = action.tokens
        for value in action.reads:
            name, _, cut = value.name.removeprefix("grad:").rpartition("@")
            if value.name.startswith("grad:") and int(cut) == last:
                covered = self._covered(name, value, last, device) or covered
        for write in action.writes:
            name = write.name.removeprefix("grad:").rpartition("@")[0]
            content: Content = Counter()
            for number in (number for number in self.readers[name] if first <= number < last):
                unit = self.costs.units[number]
                tokens, width = spans(action, unit, self.costs)
                aligned = _is_aligned(unit, name)
                content[Part(number, (covered if aligned else action.tokens) or tokens, width, aligned)] += 1
            self._hold(device, write, content)
        for value in action.accumulates:
            parts = self.held[device, value.name].setdefault(value, Counter())
            for number in range(first, last):
                if self._uses(number, value):
                    tokens, _ = spans(action, self.costs.units[number], self.costs)
                    before = sum(self.phase.micro_batches[: action.micro_batch])
                    rows = before + action.rows[0], before + action.rows[1]
                    parts[Part(number, covered or tokens, rows)] += 1

    def _uses(self, number: int, gradient: Value) -> bool:
        """Whether the unit's weights are among those of the gradient."""
        parameters = self.costs.units[number].parameters
        if gradient.name.startswith("gradients:"):
            return gradient.name.removeprefix("gradients:") in parameters
        first, last = map(int, gradient.name.partition("@")[2].split(":"))
        return bool(parameters) and first <= number < last

    def _covered(self, name: str, value: Value, behind: int, device: int) -> Range | None:
        """The tokens of which the gradient has all that the units `behind` give back; None for all that the pass has.
        Raises where it is none."""
        content = self._find(device, value)
        tokens = value.tokens
        aligned = [part.tokens for part in content if part.aligned]
        if tokens is None and aligned:
            tokens = min(low for low, _ in aligned), max(high for _, high in aligned)
        for number in (number for number in self.readers[name] if number >= behind):
            unit = self.costs.units[number]
            length, width = extents(unit, self.costs)
            target = tokens if tokens is not None and _is_aligned(unit, name) else (0, length)
            by_width = unit.kind in (CORE, *ROWS) and value.width is not None
            channels = value.width if by_width and value.width is not None else (0, width)
            parts = [part for part in content.elements() if part.unit == number]
            self._fill(
                [(part.tokens, part.width) for part in parts], (target, channels), f"{value} of {unit.name}", device
            )
        whole = extents(self.costs.units[self.readers[name][0]], self.costs)[0]
        return None if tokens is None or tokens == (0, whole) else tokens

    def _fill(self, boxes: list[tuple[Range, Range]], target: tuple[Range, Range], what: str, device: int) -> None:
        """The boxes, as far as they are inside the target, fill it without overlap."""
        inside = [
            tuple((max(a, low), min(b, high)) for (a, b), (low, high) in zip(box, target, strict=True)) for box in boxes
        ]
        inside = [box for box in inside if all(low < high for low, high in box)]
        for index, box in enumerate(inside):
            for other in inside[:index]:
                if all(a[0] < b[1] and b[0] < a[1] for a, b in zip(box, other, strict=True)):
                    raise self._fail(
                        device, f"the gradient {what} has {box} and {other} of tokens and channels, which overlap"
                    )
        found, wanted = (sum(prod(high - low for low, high in box) for box in some) for some in (inside, [target]))
        if found != wanted:
            raise self._fail(device, f"the gradient {what} has {found} of {wanted} parts")

    def _combine(self, action: Combine, device: int) -> None:
        found = [self._find(device, value) for value in action.reads]
        if action.op == "sum":
            self._hold(device, action.write, sum(found, Counter()))
        elif action.op == "concat" and action.reads and action.reads[0].tokens is not None:
            self._hold(device, action.write, _joined(action.reads, found))
        elif any(content != found[0] for content in found[1:]):
            raise self._fail(device, f"{action.write} is joined of pieces that are not the same sum")
        else:
            self._hold(device, action.write, found[0] if found else Counter())

    def _step(self, action: Step, device: int) -> None:
        if {v.name: v.version + 1 for v in action.reads} != {v.name: v.version for v in action.writes}:
            raise self._fail(device, "the step must write what it reads, one version on")
        if action.norm is not None:
            raise self._fail(device, "gradients of layers that are shared are not clipped by a norm")
        rows = (0, self.phase.batch_size)
        for value in action.gradients:
            self.stepped[device][value.name] += 1
            content = self._find(device, value)
            for number, unit in enumerate(self.costs.units):
                if self._uses(number, value):
                    boxes = [(part.tokens, part.width) for part in content.elements() if part.unit == number]
                    target = (0, extents(unit, self.costs)[0]), rows
                    self._fill(boxes, target, f"{value} of {unit.name}", device)

    def _hold(self, device: int, value: Value, content: Content) -> None:
        self.held[device, value.name][value] = content

    def _find(self, device: int, value: Value) -> Content:
        held = self.held[device, value.name]
        if value in held:
            return held[value]
        return next((content for whole, content in held.items() if is_piece(value, whole)), Counter())

    def _fail(self, device: int, rule: str) -> InvalidPlan:
        return InvalidPlan(f"phase {self.phase.name!r}: {self.graph.devices[device]}: {rule}")


def _joined(pieces: Sequence[Value], contents: Sequence[Content]) -> Content:
    """Of pieces along the tokens: each has what it has of its own tokens; what is of others must be in every piece."""
    common = Counter({part: count for part, count in contents[0].items() if not part.aligned})
    for content in contents[1:]:
        common &= content
    for value, content in zip(pieces, contents, strict=True):
        assert value.tokens is not None
        for part, count in content.items():
            low, high = max(part.tokens[0], value.tokens[0]), min(part.tokens[1], value.tokens[1])
            if part.aligned and low < high:
                common[part._replace(tokens=(low, high))] += count
    return common


def _is_aligned(unit: UnitCost, name: str) -> bool:
    """Whether the unit makes each token of the same token of the tensor that it reads."""
    return unit.kind in TOKENWISE or (unit.kind == CORE and name == unit.reads[0])
