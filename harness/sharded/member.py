"""The action list of one device of a ring that shares the layers of a model, for one request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from harness.costs import FORWARD, UnitCost
from harness.plan import Action, Collective, Combine, Compute, Free, Recv, Send, Step, Value
from harness.plan.actions import reads, writes
from harness.plan.flow import is_piece
from harness.plan.pieces import COLUMNS, CORE, ROWS, inputs, outputs
from harness.plan.values import Range
from harness.sharded.layout import Sharded
from harness.sharded.shares import HYBRID, SEQUENCE, TENSOR


class Member:
    """Writes the action list of one device of the ring."""

    def __init__(self, sharded: Sharded, number: int) -> None:
        self.sharded, self.costs, self.block = sharded, sharded.costs, sharded.block
        self.number, self.count = number, len(sharded.devices)
        self.right = sharded.devices[(number + 1) % self.count]
        self.left = sharded.devices[(number - 1) % self.count]
        self.whole: Range = (0, self.block.tokens)
        self.mine = sharded.tokens[number]
        self._begin(0, 0)

    def _begin(self, micro_batch: int, rows: int) -> None:
        self.micro_batch, self.rows = micro_batch, rows
        #: Of sums how many devices' parts are in what is read. A part is version 0; so is whatever is no sum.
        self.summed: dict[str, int] = {}
        #: What has been gathered: version 1 has all tokens, version 0 this device's.
        self.gathered: set[str] = set()
        self.kept = self.sharded.kept(self.number, rows)

    def request(self, rows: int, micro_batch: int = 0) -> Iterator[Action]:
        """The way of so many rows through all layers."""
        self._begin(micro_batch, rows)
        first, last = self.block.first, self.block.last
        if self.number == 0 or self.sharded.embedded:
            yield from self._compute((0, first), None, None)
        if not self.sharded.embedded:
            yield from self._enter()
        yield from {HYBRID: self._hybrid, TENSOR: self._tensor, SEQUENCE: self._sequence}[self.sharded.scheme]()
        yield from self._leave()
        if self.number == 0 or self.sharded.headed:
            yield from self._compute((last, len(self.costs.units)), None, None, version=int(self.costs.decodes))

    # Values

    def _value(self, name: str, tokens: Range | None = None, width: Range | None = None) -> Value:
        """What is held under the name: of all tokens, or some."""
        tokens = None if tokens == self.whole else tokens
        gathered = tokens is None and name in self.gathered
        return Value(name, self.micro_batch, (0, self.rows), tokens, width, 1 if gathered else self.summed.get(name, 0))

    def _compute(self, units: Range, tokens: Range | None, width: Range | None, version: int = 0) -> Iterator[Action]:
        """The pass, if there is anything to do. `version`: that of what it makes."""
        if any(part is not None and part[0] == part[1] for part in (tokens, width)):
            return
        tokens = None if tokens == self.whole else tokens
        weights = [value for unit in range(*units) for value in self.sharded.weights(unit, self.number)]
        buffers = Value("buffers@{}:{}".format(*self.sharded.held(self.number)))
        buffered = self.costs.buffers_bytes(*units) and buffers.name in self.sharded.tensors
        about = Compute(units, FORWARD, self.micro_batch, (0, self.rows), (), (), tokens=tokens, width=width)
        kinds = {unit.kind for unit in self.costs.units[slice(*units)]}
        inside = self.block.first <= units[0] < self.block.last
        again = not inside or (self.sharded.scheme == TENSOR and kinds == {"connective"})
        made = (v for v in outputs(about, self.costs) if v.name not in self.costs.kept or v in self.kept)
        yield Compute(
            units,
            FORWARD,
            self.micro_batch,
            (0, self.rows),
            (*dict.fromkeys(weights), *((buffers,) if buffered else ())),
            tuple(self._value(value.name, value.tokens, value.width) for value in inputs(about, self.costs)),
            tuple(value._replace(version=version) for value in made),
            tokens=tokens,
            width=width,
            replica=again and self.number > 0,
        )

    def _unit(self, number: int, tokens: Range | None, version: int = 0) -> Iterator[Action]:
        """A pass over this device's channels of a unit."""
        width = self.sharded.channels(self.costs.units[number])[self.number]
        yield from self._compute((number, number + 1), tokens, width, version)

    def _product(self, number: int) -> Iterator[Action]:
        """This device's part of a sum, for all tokens; of a single device it is the sum."""
        unit = self.costs.units[number]
        yield from self._unit(number, None, version=1 if self.count == 1 else 0)
        if self.count == 1:
            self.summed[unit.writes[0]] = 1

    # Entering and leaving the shared layers

    def _enter(self) -> Iterator[Action]:
        """The leader hands out the tokens; the schemes that want all of them everywhere gather them again."""
        name = self.block.entering
        if self.sharded.scheme == TENSOR and self.block.tokens == 1:
            if self.number == 0:
                for device in self.sharded.devices[1:]:
                    yield Send(self._value(name), device)
            else:
                yield Recv(self._value(name), self.sharded.devices[0])
            return
        if self.number == 0:
            for device, tokens in list(zip(self.sharded.devices, self.sharded.tokens, strict=True))[1:]:
                if tokens[0] < tokens[1]:
                    yield Send(self._value(name, tokens), device)
        elif self.mine[0] < self.mine[1]:
            yield Recv(self._value(name, self.mine), self.sharded.devices[0])
        if self.sharded.scheme == TENSOR:
            yield from self._gather(name)

    def _leave(self) -> Iterator[Action]:
        """The leader collects the tokens."""
        name = self.block.leaving
        if self.sharded.scheme == TENSOR or self.count == 1:
            return
        if self.sharded.headed:
            yield from self._gather(name)
            return
        pieces = [self._value(name, tokens) for tokens in self.sharded.tokens if tokens[0] < tokens[1]]
        if self.number > 0:
            if self.mine[0] < self.mine[1]:
                yield Send(self._value(name, self.mine), self.sharded.devices[0])
            return
        for device, tokens in list(zip(self.sharded.devices, self.sharded.tokens, strict=True))[1:]:
            if tokens[0] < tokens[1]:
                yield Recv(self._value(name, tokens), device)
        if len(pieces) > 1:
            yield Combine("concat", tuple(pieces), self._value(name))

    # Schemes

    def _sequence(self) -> Iterator[Action]:
        """By tokens from one attention core to the next."""
        for units in self._layers():
            yield from self._compute(units, self.mine, None)
            core = self.costs.units[units[1]]
            if core.kind == CORE and sum(share > 0 for share in self.sharded.shares.tokens) > 1:
                for name in core.reads[1:3]:
                    yield from self._gather(name)

    def _tensor(self) -> Iterator[Action]:
        """By width, with sums everywhere."""
        for units in self._layers():
            number, unit = units[0], self.costs.units[units[0]]
            if unit.kind == "connective":
                yield from self._compute(units, None, None)
            elif unit.kind in ROWS:
                yield from self._product(number)
                yield from self._sum_up(unit, "all-reduce", None)
            else:
                yield from self._unit(number, None)

    def _hybrid(self) -> Iterator[Action]:
        """By width and by tokens in turn."""
        overlap = self.sharded.overlap and self.count > 1
        for units in self._layers():
            number, unit = units[0], self.costs.units[units[0]]
            if unit.kind == "connective":
                yield from self._compute(units, self.mine, None)
            elif unit.kind == CORE:
                yield from self._unit(number, None)
            elif unit.kind in COLUMNS and overlap and not self._is_everywhere(unit.reads[0]):
                yield from self._gather_into(number, join=unit.kind == "qkv")
            elif unit.kind in COLUMNS:
                yield from self._gather(unit.reads[0])
                yield from self._unit(number, None)
            elif overlap:
                yield from self._scatter_from(number)
            else:
                yield from self._product(number)
                yield from self._sum_up(unit, "reduce-scatter", self.mine)

    def _layers(self) -> list[Range]:
        """The shared layers, pass by pass."""
        return self.sharded.passes[1:-1]

    # Collectives

    def _collective(self, kind: str, value: Value, result: Value) -> Collective:
        devices, shares = self.sharded.devices, self.sharded.shares.tokens
        tiles = 1 if kind == "reduce-scatter" else self.sharded.tiles  # its result is one piece of memory
        if self.block.tokens == 1 and kind == "all-reduce":  # of one token every device takes a part of the width
            return Collective(kind, value, result, devices)
        return Collective(kind, value, result, devices, shares, tiles, "tokens")

    def _gather(self, name: str) -> Iterator[Action]:
        """All tokens of a tensor of which every device has its own."""
        if self.count == 1 or self._is_everywhere(name):
            return
        value = self._value(name)
        mine = value._replace(tokens=self.mine)
        if self.mine[0] == self.mine[1]:
            yield Combine("sum", (), mine)
        yield self._collective("all-gather", mine, value._replace(version=1))
        self.gathered.add(name)

    def _is_everywhere(self, name: str) -> bool:
        """Whether every device has made all tokens of it for itself."""
        return self.sharded.embedded and name == self.block.entering

    def _sum_up(self, unit: UnitCost, kind: str, tokens: Range | None) -> Iterator[Action]:
        """The sum of all devices' parts: of all tokens everywhere, or of each one's tokens."""
        if self.count == 1:
            return
        name = unit.writes[0]
        value = self._value(name)
        part = self.sharded.channels(unit)[self.number]
        self.summed[name] = self.count
        if part is not None and part[0] == part[1]:
            yield Combine("sum", (), value)
        yield self._collective(kind, value, value._replace(tokens=tokens, version=self.count))

    def _gather_into(self, number: int, join: bool) -> Iterator[Action]:
        """An all-gather round the ring beside the product that it feeds: a tile is multiplied while the next comes.

        In step s member r multiplies the tiles of member r-s and sends them on. With `join` what the product makes of
        all tiles is put together.
        """
        unit = self.costs.units[number]
        (name,) = unit.reads
        for step in range(self.count):
            now, following = ((self.number - step - ahead) % self.count for ahead in (0, 1))
            arriving = self.sharded.pieces[following] if step < self.count - 1 else []
            for tokens in self.sharded.pieces[now]:
                if step < self.count - 1:
                    yield Send(self._value(name, tokens), self.right)
            for tokens in arriving:
                yield Recv(self._value(name, tokens), self.left)
            for tokens in self.sharded.pieces[now]:
                yield from self._unit(number, tokens)
        width = self.sharded.channels(unit)[self.number]
        if join and (width is None or width[0] < width[1]):
            tiles = [tokens for tiles in self.sharded.pieces for tokens in tiles]
            for made in unit.writes:
                if len(tiles) > 1:
                    found = tuple(self._value(made, tokens, width) for tokens in tiles)
                    yield Combine("concat", found, self._value(made, None, width))

    def _scatter_from(self, number: int) -> Iterator[Action]:
        """A reduce-scatter round the ring beside the product that it takes away: a tile travels while the next is made.

        In step s member r makes its part of the tiles of member r-1-s, adds it to what comes, and sends the sum on.
        """
        unit = self.costs.units[number]
        name = unit.writes[0]
        for step in range(self.count):
            owner = (self.number - 1 - step) % self.count
            before, after = self._parts(unit, owner, step), self._parts(unit, owner, step + 1)
            for tokens in self.sharded.pieces[owner]:
                value = self._value(name, tokens)
                if before:
                    yield Recv(value._replace(version=before), self.left)
                if after > before:
                    yield from self._unit(number, tokens, version=0 if before else 1)
                if 0 < before < after:
                    arrived, own = value._replace(version=before), value._replace(version=0)
                    yield Combine("sum", (own, arrived), value._replace(version=after), in_place=True)
                if after and step < self.count - 1:
                    yield Send(value._replace(version=after), self.right)
        self.summed[name] = self._parts(unit, self.number, self.count)
        if len(self.sharded.pieces[self.number]) > 1:
            found = tuple(self._value(name, tokens) for tokens in self.sharded.pieces[self.number])
            yield Combine("concat", found, self._value(name)._replace(tokens=self.mine))

    def _parts(self, unit: UnitCost, owner: int, steps: int) -> int:
        """How many devices have added their part to the tiles of `owner` after so many steps round the ring."""
        channels = self.sharded.channels(unit)
        passed = [channels[(owner + 1 + step) % self.count] for step in range(steps)]
        return sum(part is None or part[0] < part[1] for part in passed)


def with_frees(
    actions: Iterable[Action], begins: Iterable[Value] = (), stays: Iterable[Value] = ()
) -> tuple[Action, ...]:
    """The actions, and after each what no later one touches is freed: of what is made, and of what it `begins` with.

    What `stays` is not.
    """
    listed = list(actions)
    alive: dict[str, list[Value]] = defaultdict(list)
    last: dict[Value, int] = {}
    for value in begins:
        alive[value.name].append(value)
    for index, action in enumerate(listed):
        if isinstance(action, Compute):
            for value in action.accumulates:
                if value not in last:
                    alive[value.name].append(value)
                    last[value] = index
        for value in reads(action):
            found = [held for held in alive.get(value.name, ()) if is_piece(value, held)]
            if found:
                last[value if value in found else found[0]] = index
        for value in _used_up(action):
            alive[value.name].remove(value)
            del last[value]
        for value in () if isinstance(action, Step) else writes(action):  # its weights take the place of older ones
            alive[value.name].append(value)
            last[value] = index
    freed: Mapping[int, list[Value]] = defaultdict(list)
    for value, index in last.items():
        if value not in stays:
            freed[index].append(value)
    complete: list[Action] = []
    for index, action in enumerate(listed):
        complete.append(action)
        if index in freed:
            complete.append(Free(tuple(freed[index])))
    return tuple(complete)


def _used_up(action: Action) -> Sequence[Value]:
    """What is gone when the action has ended: another value has taken its place."""
    if isinstance(action, Combine) and action.in_place:
        return action.reads[:1]
    if isinstance(action, Collective) and action.kind != "all-gather":
        return (action.value,)
    return ()
