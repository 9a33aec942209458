"""Who holds what of a model whose layers are shared, under each scheme: weights, tokens, and what lives meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

from harness.costs import Costs, UnitCost
from harness.plan.collectives import chunks
from harness.plan.pieces import CORE, extents
from harness.plan.values import Range, Tensor, Value, saved_name
from harness.schedules import buffers_of, gradients_of, state_of
from harness.sharded.shares import EVERYWHERE, LEADER, MLP, SEQUENCE, TENSOR, Block, Shares, ranges, shared_block
from harness.workload import OPTIMIZER_STATE_COPIES


@dataclass(frozen=True)
class Sharded:
    """The phases of a scheme on a ring of devices, and the tensors that their values name.

    `tiles`: pieces into which each device's share of the tokens is cut on its way round the ring. `embeddings`: who has
    them; in training also who has the head. `optimizer`: of a training workload. Raises Unsupported for a model whose
    layers can't be shared.
    """

    costs: Costs
    devices: tuple[str, ...]
    scheme: str
    shares: Shares
    overlap: bool = False
    tiles: int = 1
    embeddings: str = LEADER
    optimizer: str = "sgd"
    block: Block = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", shared_block(self.costs))

    def channels(self, unit: UnitCost) -> list[Range | None]:
        """Each device's channels of the unit; None for all of them."""
        if self.scheme == SEQUENCE or unit.cut is None:
            return [None] * len(self.devices)
        shares = self.shares.columns if unit.kind in MLP else self.shares.heads
        granule = unit.cut.width // sum(shares)
        return list(ranges(share * granule for share in shares))

    @cached_property
    def tokens(self) -> list[Range]:
        """Each device's tokens."""
        return ranges(self.shares.tokens)

    @cached_property
    def pieces(self) -> list[list[Range]]:
        """Of each device's tokens the tiles, without empty ones."""
        return [
            [(low + a, low + b) for a, b in chunks(high - low, min(self.tiles, max(1, high - low))) if a < b]
            for low, high in self.tokens
        ]

    @cached_property
    def further(self) -> Sharded | None:
        """What follows a prompt, where tokens are generated: one more token, which is the leader's."""
        if self.costs.decoding is None:
            return None
        scheme = SEQUENCE if self.scheme == SEQUENCE else TENSOR
        shares = replace(self.shares, tokens=(1, *[0] * (len(self.devices) - 1)))
        return Sharded(self.costs.decoding, self.devices, scheme, shares, embeddings=self.embeddings)

    def adds_biases(self, unit: UnitCost) -> int:
        """The number of the device that adds the unit's whole biases to the sum: the first that has a part of it."""
        return next(i for i, part in enumerate(self.channels(unit)) if part is None or part[0] < part[1])

    def held(self, device: int) -> Range:
        """The units that the device has something of."""
        if device == 0 or self.headed:
            return (0, len(self.costs.units))
        return (0 if self.embeddings == EVERYWHERE else self.block.first, self.block.last)

    @property
    def embedded(self) -> bool:
        """Whether every device makes for itself what enters the layers. A chosen token is with the leader alone."""
        return self.embeddings == EVERYWHERE and not self.costs.decodes

    @property
    def headed(self) -> bool:
        """Whether every device has the head, too: all train it alike, and none has to hand out its gradient."""
        return self.embedded and self.costs.training

    def region(self, number: int) -> Range:
        """The units whose weights are one value with those of this one."""
        if not (self.costs.training and self.scheme == SEQUENCE):
            return (number, number + 1)
        first, last, end = self.block.first, self.block.last, len(self.costs.units)
        edges = (0, last, end) if self.embedded else (0, first, last, end)
        return next(region for region in pairwise(edges) if number < region[1])

    @cached_property
    def passes(self) -> list[Range]:
        """The ranges of units that are done at once, in order."""
        first, last = self.block.first, self.block.last
        if self.scheme == SEQUENCE:
            cores = [number for number in range(first, last) if self.costs.units[number].kind == CORE]
            middle = list(pairwise((first, *cores, last)))
        else:
            middle = list(self._runs())
        return [(0, first), *middle, (last, len(self.costs.units))]

    def _runs(self) -> Iterator[Range]:
        """Of the shared layers connective units that follow each other together, all others alone."""
        begin = self.block.first
        for number in range(self.block.first, self.block.last):
            following = self.costs.units[number + 1].kind if number + 1 < self.block.last else ""
            if self.costs.units[number].kind != "connective" or following != "connective":
                yield begin, number + 1
                begin = number + 1

    def kept(self, device: int, rows: int) -> tuple[Value, ...]:
        """What the device keeps of a prompt for the tokens to come."""
        found = []
        for number, unit in enumerate(self.costs.units):
            shared = self.block.first <= number < self.block.last and self.scheme != SEQUENCE
            part = self.channels(unit)[device] if shared else None
            if (part[0] < part[1]) if part is not None else (device == 0):
                names = (name for name in unit.writes if name in self.costs.kept)
                found += [Value(name, 0, (0, rows), None, part) for name in names]
        return tuple(found)

    def weights(self, number: int, device: int) -> tuple[Value, ...]:
        """The values that hold the device's weights of a unit."""
        unit = self.costs.units[number]
        part = self.channels(unit)[device] if self.block.first <= number < self.block.last else None
        found = []
        if (own := "weights@{}:{}".format(*self.region(number))) in self.tensors:
            found.append(Value(own, width=part))
        mine = part is None or device == self.adds_biases(unit)
        found += [Value(f"weights:{name}") for name in self._apart(unit) if mine]
        return tuple(found)

    def _apart(self, unit: UnitCost) -> list[str]:
        """Parameters of the unit that are values of their own: whole biases of shared products, and tied ones."""
        whole = unit.cut.whole if unit.cut is not None and self.scheme != SEQUENCE else ()
        return [name for name in unit.parameters if name in whole or name in self._tied]

    @cached_property
    def _tied(self) -> frozenset[str]:
        """Parameters that several units use."""
        seen = Counter(name for unit in self.costs.units for name in unit.parameters)
        return frozenset(name for name, uses in seen.items() if uses > 1)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the phases name."""
        tensors: dict[str, Tensor] = {}
        parameters = self.costs.parameters
        for number, unit in enumerate(self.costs.units):
            apart = self._apart(unit)
            first, last = self.region(number)
            own = [parameters[name] for name in self.costs.parameters_of(first, last) if name not in apart]
            if own and number == first:
                numel = sum(p.numel for p in own)
                width = numel if unit.cut is None or self.scheme == SEQUENCE else extents(unit, self.costs)[1]
                self._add_trained(tensors, f"weights@{first}:{last}", numel // width, width, own[0].itemsize)
            for name in apart:
                parameter = parameters[name]
                self._add_trained(tensors, f"weights:{name}", 1, parameter.numel, parameter.itemsize)
            for name in unit.writes:
                cost = self.costs.tensors[name]
                kind = "cache" if name in self.costs.kept else "activations"
                tensors[name] = Tensor(kind, cost.tokens, cost.width, cost.itemsize, per_row=True)
        for number in range(len(self.devices)):
            first, last = self.held(number)
            if buffers := self.costs.buffers_bytes(first, last):
                tensors[buffers_of((first, last))] = Tensor("buffers", 1, buffers)
        for units in self.passes if self.costs.training else ():
            tensors |= self._for_backward(tensors, units)
        return tensors

    def _add_trained(self, tensors: dict[str, Tensor], weights: str, rest: int, width: int, itemsize: int) -> None:
        """Weights [rest, width]; in training with their gradients and the optimizer's state."""
        tensors[weights] = Tensor("weights", rest, width, itemsize)
        if self.costs.training:
            tensors[gradients_of(weights)] = Tensor("gradients", rest, width, itemsize)
            if copies := OPTIMIZER_STATE_COPIES[self.optimizer]:
                tensors[state_of(weights)] = Tensor("optimizer", rest * copies, width, itemsize)

    def _for_backward(self, tensors: Mapping[str, Tensor], units: Range) -> dict[str, Tensor]:
        """What a pass keeps for its way back, and the gradients that come and go."""
        costs, (first, last) = self.costs, units
        entering, leaving = self.read(units), self.made(units)
        found = {f"grad:{name}@{first}": tensors[name] for name in self.flowing(entering)}
        found |= {f"grad:{name}@{last}": tensors[name] for name in self.flowing(leaving)}
        saved = costs.saved(first, last)
        values = sum(costs.tensors[name].bytes(1) for name in leaving if name in costs.saves(first, last))
        nbytes, unit = int(saved.per_row) - values, costs.units[first]
        tokens, width = 1, 1
        if self.scheme != SEQUENCE and unit.cut is not None:
            width = unit.cut.width
        elif self.block.first <= first < self.block.last:
            tokens = self.block.tokens
        each = -(-nbytes // (tokens * width))
        name = saved_name(first, last)
        found[name] = Tensor("activations", tokens, width, each, per_row=True, fixed_bytes=int(saved.fixed))
        return found

    def read(self, units: Range) -> list[str]:
        """What a pass over the units reads that units before it have made."""
        names = {name for unit in self.costs.units[slice(*units)] for name in unit.reads}
        return [name for name in self.costs.carried(units[0]) if name in names]

    def made(self, units: Range) -> list[str]:
        """What it makes for those behind it."""
        names = {name for unit in self.costs.units[slice(*units)] for name in unit.writes}
        return [name for name in self.costs.carried(units[1]) if name in names]

    def flowing(self, names: Iterable[str]) -> list[str]:
        """Those to which gradients flow."""
        return [name for name in names if self.costs.tensors[name].needs_grad]
