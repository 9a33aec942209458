"""The way back through shared layers, and the update: every collective of the way there is mirrored.

Where all tokens were gathered for a product, its gradients are parts of a sum: they are reduced, and scattered along
the tokens. Where a sum over the width was scattered, its gradient is gathered. With "tensor" both are an all-reduce of
what the products by columns give back (Megatron's pair, arXiv 1909.08053, section 3). With "sequence" the gradients of
the keys and values of all tokens are reduce-scattered, and those of the weights, which all devices have, all-reduced.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

from harness.costs import BACKWARD
from harness.plan import Action, Collective, Combine, Commit, Compute, Recv, Send, Step, Value
from harness.plan.pieces import COLUMNS, CORE, ROWS
from harness.plan.values import Range, saved_name
from harness.schedules import gradients_of, next_version, state_of
from harness.sharded.layout import Sharded
from harness.sharded.member import Member
from harness.sharded.shares import HYBRID, SEQUENCE, TENSOR


class Trainer(Member):
    """Writes the action list of one device of the ring for a batch.

    `grad:name@n` is what the pass that begins with unit n gives back for a tensor that it reads. When all that read the
    tensor have given theirs, the sum is what the pass that made it begins with.
    """

    def __init__(self, sharded: Sharded, number: int) -> None:
        super().__init__(sharded, number)
        self.accumulated: set[Value] = set()
        self.tokens = None if self.mine == self.whole else self.mine
        self.works = self.mine[0] < self.mine[1]

    def _begin(self, micro_batch: int, rows: int) -> None:
        super()._begin(micro_batch, rows)
        self.forwards: dict[Range, Compute] = {}
        #: The gradient of each tensor as far as it has been summed.
        self.totals: dict[str, Value] = {}

    def batch(self, micro_batches: Sequence[int]) -> Iterator[Action]:
        """The way of the micro-batches, one after the other, there and back, and the update."""
        for micro_batch, rows in enumerate(micro_batches):
            yield from self.request(rows, micro_batch)
            yield from self._back((self.block.last, len(self.costs.units)))
            yield from self._hand_out()
            for units in reversed(self._layers()):
                yield from self._back(units)
            yield from self._collect()
            yield from self._back((0, self.block.first))
        yield from self._update()

    def _compute(self, units: Range, tokens: Range | None, width: Range | None, version: int = 0) -> Iterator[Action]:
        for action in super()._compute(units, tokens, width, version):
            assert isinstance(action, Compute)
            saved = Value(saved_name(*units), self.micro_batch, (0, self.rows), action.tokens, action.width)
            self.forwards[units] = replace(action, writes=(*action.writes, saved))
            yield self.forwards[units]

    # The way back

    def _back(self, units: Range) -> Iterator[Action]:
        """The pass over the units, and what it gives back."""
        sharded, unit = self.sharded, self.costs.units[units[0]]
        if sharded.scheme == HYBRID and unit.kind in ROWS and self.count > 1:
            yield from self._gather_gradient(unit.writes[0], units[1])
        going = sharded.flowing(sharded.read(units))
        forward = self.forwards.get(units)
        if not all(name in self.totals for name in sharded.flowing(sharded.made(units))):
            forward = None  # a device without tokens has made embeddings that nobody asks it about
        if forward is not None:
            made = {value.name: value for value in forward.writes}
            arriving = []
            for name in sharded.flowing(sharded.made(units)):
                arriving.append((yield from self._arriving(made[name], units[1])))
            saves = self.costs.saves(*units)
            kept = [value for value in (*forward.reads, *forward.writes) if value.name in saves]
            weights = [value for value in forward.weights if gradients_of(value.name) in sharded.tensors]
            gradients = tuple(Value(gradients_of(value.name), width=value.width) for value in weights)
            self.accumulated.update(gradients)
            yield replace(
                forward,
                direction=BACKWARD,
                weights=tuple(weights),
                reads=(made[saved_name(*units)], *kept, *arriving),
                writes=tuple(self._gradient(v, units[0]) for v in forward.reads if v.name in going),
                accumulates=gradients,
            )
        for name in going:
            yield from self._add(name, units, forward)

    @staticmethod
    def _gradient(value: Value, unit: int) -> Value:
        """Of a value, what the pass that begins with the unit gives back."""
        return value._replace(name=f"grad:{value.name}@{unit}", version=0)

    def _arriving(self, made: Value, unit: int) -> Generator[Action, None, Value]:
        """The whole gradient of what a pass that ends in front of the unit has made."""
        total, name = self.totals.pop(made.name), f"grad:{made.name}@{unit}"
        if total.name != name:
            yield Combine("sum", (total,), total._replace(name=name), in_place=True)
        return total._replace(name=name, tokens=made.tokens, width=made.width)

    def _add(self, name: str, units: Range, forward: Compute | None) -> Iterator[Action]:
        """What a pass gives back for a tensor is summed over the devices, where each has a part of it, and added to
        what others have given."""
        unit, value = self.costs.units[units[0]], Value(f"grad:{name}@{units[0]}", self.micro_batch, (0, self.rows))
        scheme = self.sharded.scheme
        shared = sum(share > 0 for share in self.sharded.shares.tokens) > 1
        by_tokens = scheme == SEQUENCE and unit.kind == CORE and name in unit.reads[1:3] and shared
        if by_tokens or (scheme != SEQUENCE and unit.kind in COLUMNS and self.count > 1):
            if forward is None:
                yield Combine("sum", (), value)
            kind, tokens = ("all-reduce", None) if scheme == TENSOR else ("reduce-scatter", self.tokens)
            result = value._replace(tokens=tokens, version=self.count)
            yield self._collective(kind, value, result)
            if tokens is not None and not self.works:
                return
            value = result
        elif forward is None:
            return
        else:
            value = next(self._gradient(read, units[0]) for read in forward.reads if read.name == name)
        others = self.totals.get(name)
        if others is not None:
            yield Combine("sum", (others, value), next_version(value), in_place=True)
            value = next_version(value)
        self.totals[name] = value

    def _gather_gradient(self, name: str, unit: int) -> Iterator[Action]:
        """The gradient of a sum that was scattered, of all tokens."""
        value = self.totals.get(name, Value(f"grad:{name}@{unit}", self.micro_batch, (0, self.rows), self.mine))
        if not self.works:
            yield Combine("sum", (), value)
        self.totals[name] = value._replace(tokens=None, version=value.version + 1)
        yield self._collective("all-gather", value, self.totals[name])

    def _hand_out(self) -> Iterator[Action]:
        """The leader hands out the gradient of what leaves the shared layers; it is everywhere where the head is."""
        name = self.block.leaving
        if self.sharded.headed or self.count == 1:
            return
        whole = Value(f"grad:{name}@{self.block.last}", self.micro_batch, (0, self.rows))
        mine = whole._replace(tokens=self.tokens)
        if self.number == 0:
            for device, tokens in self._others():
                yield Send(whole._replace(tokens=tokens), device)
        elif self.works:
            yield Recv(mine, self.sharded.devices[0])
            self.totals[name] = mine
        if self.sharded.scheme == TENSOR:
            if not self.works:
                yield Combine("sum", (), mine)
            self.totals[name] = next_version(whole)
            yield self._collective("all-gather", mine, next_version(whole))

    def _collect(self) -> Iterator[Action]:
        """The gradient of what enters the shared layers, of all tokens, for those who have made it.

        Where all have, each goes back with that of its own tokens, and zeros for the others.
        """
        name = self.block.entering
        if self.sharded.scheme == TENSOR or self.count == 1:
            return
        total = self.totals.get(name)
        if self.sharded.embedded:
            if total is not None and total.tokens is not None:
                (low, high), end = total.tokens, self.block.tokens
                zeros = [total._replace(tokens=part) for part in ((0, low), (high, end)) if part[0] < part[1]]
                for value in zeros:
                    yield Combine("sum", (), value)
                self.totals[name] = total._replace(tokens=None)
                parts = tuple(sorted((total, *zeros), key=lambda value: value.tokens or self.whole))
                yield Combine("concat", parts, self.totals[name])
            return
        if self.number > 0:
            if total is not None:
                yield Send(total, self.sharded.devices[0])
            return
        yield from self._join(name, total)

    def _join(self, name: str, total: Value | None) -> Iterator[Action]:
        """The leader collects the gradients of the others' tokens."""
        version = self.totals[name].version if total is not None else self._versions(name)
        whole = Value(f"grad:{name}@{self.block.first}", self.micro_batch, (0, self.rows), version=version)
        pieces = [whole._replace(tokens=tokens) for _, tokens in self._others()]
        for (device, _), piece in zip(self._others(), pieces, strict=True):
            yield Recv(piece, device)
        if self.works:
            pieces.insert(0, whole._replace(tokens=self.tokens))
        if len(pieces) > 1:
            yield Combine("concat", tuple(pieces), whole)
        self.totals[name] = whole

    def _versions(self, name: str) -> int:
        """The version that the sum of a tensor's gradients has on devices that have tokens: one more for each addition,
        after that of what was reduced."""
        readers = [units for units in self._layers() if name in self.sharded.read(units)]
        reduced = self.sharded.scheme == HYBRID and self.costs.units[readers[0][0]].kind in COLUMNS
        return (self.count if reduced else 0) + (len(readers) > 1)

    def _others(self) -> list[tuple[str, Range]]:
        """The devices that have tokens, but for the leader."""
        pairs = list(zip(self.sharded.devices, self.sharded.tokens, strict=True))[1:]
        return [(device, tokens) for device, tokens in pairs if tokens[0] < tokens[1]]

    # The update

    def _update(self) -> Iterator[Action]:
        """Sum the gradients of weights that all devices have, update, and commit the round."""
        held = self.sharded.held(self.number)
        owners = {value: unit for unit in range(*held) for value in self.sharded.weights(unit, self.number)}
        summed: list[Value] = []
        changed: list[Value] = []
        for weights, unit in owners.items():
            gradient = Value(gradients_of(weights.name), width=weights.width)
            if gradient.name not in self.sharded.tensors or (weights.width and weights.width[0] == weights.width[1]):
                continue
            if gradient not in self.accumulated:
                yield Combine("sum", (), gradient)
            if self._is_shared(unit):
                yield Collective("all-reduce", gradient, next_version(gradient), self.sharded.devices)
                gradient = next_version(gradient)
            summed.append(gradient)
            changed.append(weights)
        states = (Value(state_of(weights.name), width=weights.width) for weights in changed)
        changed += [state for state in states if state.name in self.sharded.tensors]
        if summed:
            yield Step(held, tuple(summed), tuple(changed), tuple(map(next_version, changed)))
        yield Commit()

    def _is_shared(self, number: int) -> bool:
        """Whether each device has the gradient of some tokens of the unit's weights."""
        scheme, unit = self.sharded.scheme, self.costs.units[number]
        inside = number < self.block.last and (number >= self.block.first or self.sharded.embedded)
        whole = scheme == SEQUENCE or (scheme == HYBRID and (unit.cut is None or number < self.block.first))
        return self.count > 1 and inside and whole
