"""One request on several devices at once: every layer is shared by width, by tokens, or by both in turn.

Three schemes, over one ring of devices:

- "hybrid": attention and MLP by width (heads, columns), what lies between by tokens. The sums over the width leave by
  a reduce-scatter along the tokens, and an all-gather along the tokens feeds the next product (Galaxy, INFOCOM'24).
  With `overlap` both go round the ring tile by tile, beside the products.
- "tensor": attention and MLP by width, sums by an all-reduce, what lies between on every device (Megatron, arXiv
  1909.08053).
- "sequence": everything by tokens with whole weights; keys and values are all-gathered.

The first device of the ring leads: it alone has the head, and collects the tokens of what the last layer makes. It
alone has the embeddings, too, and hands out the tokens of what they make; or they are "everywhere", and every device
makes that for itself.

Where tokens are generated the prompt is done so, and every device keeps the keys and values of its heads. One token
can't be shared: after "hybrid" and "tensor" every further one is done by width with sums everywhere. After "sequence",
where weights are whole and the leader has all keys and values, it does that alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise

from harness.cluster import Cluster
from harness.costs import FORWARD, Costs, UnitCost, WidthCut
from harness.errors import OrreryError, Unsupported, unknown_name
from harness.plan import Action, Collective, Combine, Compute, Free, Phase, Plan, Recv, Send, Shard, Tensor, Value
from harness.plan.actions import reads, writes
from harness.plan.collectives import chunks
from harness.plan.flow import is_piece
from harness.plan.pieces import COLUMNS, CORE, ROWS, extents, inputs, outputs
from harness.plan.values import Range
from harness.schedules import split
from harness.workload import Workload

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
    if costs.training:
        raise Unsupported("the layers are shared among devices in inference only")
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


@dataclass(frozen=True)
class Sharded:
    """The phases of a scheme on a ring of devices, and the tensors that their values name.

    `tiles`: pieces into which each device's share of the tokens is cut on its way round the ring. `embeddings`: who has
    them. Raises Unsupported for a model whose layers can't be shared.
    """

    costs: Costs
    devices: tuple[str, ...]
    scheme: str
    shares: Shares
    overlap: bool = False
    tiles: int = 1
    embeddings: str = LEADER
    block: Block = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", shared_block(self.costs))

    def channels(self, unit: UnitCost) -> list[Range | None]:
        """Each device's channels of the unit; None for all of them."""
        if self.scheme == SEQUENCE or unit.cut is None:
            return [None] * len(self.devices)
        shares = self.shares.columns if unit.kind in MLP else self.shares.heads
        granule = unit.cut.width // sum(shares)
        return list(_ranges(share * granule for share in shares))

    @cached_property
    def tokens(self) -> list[Range]:
        """Each device's tokens."""
        return _ranges(self.shares.tokens)

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
        if device == 0:
            return (0, len(self.costs.units))
        return (0 if self.embeddings == EVERYWHERE else self.block.first, self.block.last)

    @property
    def embedded(self) -> bool:
        """Whether every device makes for itself what enters the layers. A chosen token is with the leader alone."""
        return self.embeddings == EVERYWHERE and not self.costs.decodes

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
        if f"weights@{number}:{number + 1}" in self.tensors:
            found.append(Value(f"weights@{number}:{number + 1}", width=part))
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
            own = [parameters[name] for name in unit.parameters if name not in apart]
            if own:
                numel = sum(p.numel for p in own)
                width = 1 if self.scheme == SEQUENCE else extents(unit, self.costs)[1]
                tensors[f"weights@{number}:{number + 1}"] = Tensor("weights", numel // width, width, own[0].itemsize)
            for name in apart:
                tensors[f"weights:{name}"] = Tensor("weights", 1, parameters[name].numel, parameters[name].itemsize)
            for name in unit.writes:
                cost = self.costs.tensors[name]
                kind = "cache" if name in self.costs.kept else "activations"
                tensors[name] = Tensor(kind, cost.tokens, cost.width, cost.itemsize, per_row=True)
        for number in range(len(self.devices)):
            first, last = self.held(number)
            if buffers := self.costs.buffers_bytes(first, last):
                tensors[f"buffers@{first}:{last}"] = Tensor("buffers", 1, buffers)
        return tensors

    def phase(
        self, rows: int, name: str = "infer", repeat: int = 1, prompt: Sharded | None = None, ends: bool = False
    ) -> Phase:
        """One request of so many rows. After a `prompt`: one more token of it, and with `ends` the last one."""
        actions, live, leaves = {}, {}, {}
        for number, device in enumerate(self.devices):
            first, last = self.held(number)
            held = dict.fromkeys(value for unit in range(first, last) for value in self.weights(unit, number))
            buffers = Value(f"buffers@{first}:{last}")
            standing = (*held, *((buffers,) if buffers.name in self.tensors else ()))
            before = () if prompt is None else prompt.kept(number, rows)
            after = self.kept(number, rows) if prompt is None else before
            renewed = [value for value in before if value.name in self.costs.kept]
            live[device] = (*standing, *before)
            leaves[device] = standing if ends else (*standing, *after)
            actions[device] = _with_frees(
                _Member(self, number, rows).request(),
                before if ends else renewed,
                () if ends else after if prompt is None else [value._replace(version=1) for value in renewed],
            )
        return Phase(
            name=name,
            micro_batches=(rows,),
            shards={device: Shard(self.held(i), ((0, rows),)) for i, device in enumerate(self.devices)},
            actions=actions,
            live=live,
            repeat=repeat,
            training=False,
            leaves={} if leaves == live else leaves,
            decoding=prompt is not None,
        )


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


def plan_sharded(
    method: str,
    workload: Workload,
    costs: Costs,
    devices: Sequence[str],
    scheme: str,
    shares: Shares,
    overlap: bool = False,
    tiles: int = 1,
    embeddings: str = LEADER,
) -> Plan:
    """All requests of the workload under the scheme. Raises Unsupported where the layers can't be shared."""
    sharded = Sharded(costs, tuple(devices), scheme, shares, overlap, tiles, embeddings)
    built: dict[tuple[int, int], tuple[Phase, ...]] = {}
    for rows, repeat in workload.batches():
        batch = "" if rows == workload.batch_size else " last batch"
        built[rows, repeat] = built.get((rows, repeat)) or _requests(sharded, rows, repeat, workload.new_tokens, batch)
    further = {} if sharded.further is None else sharded.further.tensors
    return Plan(
        method=method,
        num_units=len(costs.units),
        tensors=sharded.tensors | further,
        phases=tuple(phase for batch in workload.batches() for phase in built[batch]),
        summary={
            "scheme": scheme,
            "devices": list(devices),
            "heads": list(shares.heads),
            "columns": list(shares.columns),
            "tokens": list(shares.tokens),
            "overlap": overlap,
            "tiles": tiles,
            "embeddings": embeddings,
        },
    )


def _requests(sharded: Sharded, rows: int, repeat: int, new_tokens: int | None, batch: str) -> tuple[Phase, ...]:
    """So many requests, one after the other; where they generate each is a prompt, which gives the first token, and the
    tokens after it."""
    if new_tokens is None:
        return (sharded.phase(rows, f"infer{batch}", repeat),)
    further = sharded.further
    phases = [sharded.phase(rows, f"prefill{batch}", ends=further is None)]
    if further is not None:
        if new_tokens > 2:
            phases.append(further.phase(rows, f"decode{batch}", new_tokens - 2, sharded))
        phases.append(further.phase(rows, f"last token{batch}", 1, sharded, ends=True))
    return tuple(phases) * repeat


class _Member:
    """Writes the action list of one device of the ring."""

    def __init__(self, sharded: Sharded, number: int, rows: int) -> None:
        self.sharded, self.costs, self.block = sharded, sharded.costs, sharded.block
        self.number, self.rows, self.count = number, rows, len(sharded.devices)
        self.right = sharded.devices[(number + 1) % self.count]
        self.left = sharded.devices[(number - 1) % self.count]
        self.whole: Range = (0, self.block.tokens)
        self.mine = sharded.tokens[number]
        #: Of sums how many devices' parts are in what is read. A part is version 0; so is whatever is no sum.
        self.summed: dict[str, int] = {}
        #: What has been gathered: version 1 has all tokens, version 0 this device's.
        self.gathered: set[str] = set()
        self.kept = sharded.kept(number, rows)

    def request(self) -> Iterator[Action]:
        first, last = self.block.first, self.block.last
        if self.number == 0 or self.sharded.embedded:
            yield from self._compute((0, first), None, None)
        if not self.sharded.embedded:
            yield from self._enter()
        yield from {HYBRID: self._hybrid, TENSOR: self._tensor, SEQUENCE: self._sequence}[self.sharded.scheme]()
        yield from self._leave()
        if self.number == 0:
            yield from self._compute((last, len(self.costs.units)), None, None, version=int(self.costs.decodes))

    # Values

    def _value(self, name: str, tokens: Range | None = None, width: Range | None = None) -> Value:
        """What is held under the name: of all tokens, or some."""
        tokens = None if tokens == self.whole else tokens
        gathered = tokens is None and name in self.gathered
        return Value(name, 0, (0, self.rows), tokens, width, 1 if gathered else self.summed.get(name, 0))

    def _compute(self, units: Range, tokens: Range | None, width: Range | None, version: int = 0) -> Iterator[Action]:
        """The pass, if there is anything to do. `version`: that of what it makes."""
        if any(part is not None and part[0] == part[1] for part in (tokens, width)):
            return
        tokens = None if tokens == self.whole else tokens
        weights = [value for unit in range(*units) for value in self.sharded.weights(unit, self.number)]
        buffers = Value("buffers@{}:{}".format(*self.sharded.held(self.number)))
        buffered = self.costs.buffers_bytes(*units) and buffers.name in self.sharded.tensors
        about = Compute(units, FORWARD, 0, (0, self.rows), (), (), tokens=tokens, width=width)
        kinds = {unit.kind for unit in self.costs.units[slice(*units)]}
        before, shared = units[1] <= self.block.first, self.block.first <= units[0] < self.block.last
        again = before or (shared and self.sharded.scheme == TENSOR and kinds == {"connective"})
        made = (v for v in outputs(about, self.costs) if v.name not in self.costs.kept or v in self.kept)
        yield Compute(
            units,
            FORWARD,
            0,
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
        begin = self.block.first
        for number in range(*self._units()):
            unit = self.costs.units[number]
            if unit.kind != CORE:
                continue
            yield from self._compute((begin, number), self.mine, None)
            if sum(share > 0 for share in self.sharded.shares.tokens) > 1:
                for name in unit.reads[1:3]:
                    yield from self._gather(name)
            begin = number
        yield from self._compute((begin, self.block.last), self.mine, None)

    def _tensor(self) -> Iterator[Action]:
        """By width, with sums everywhere."""
        for units in self._runs():
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
        for units in self._runs():
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

    def _units(self) -> Range:
        return self.block.first, self.block.last

    def _runs(self) -> Iterator[Range]:
        """Ranges of units: connective ones that follow each other together, all others alone."""
        begin = self.block.first
        for number in range(*self._units()):
            following = self.costs.units[number + 1].kind if number + 1 < self.block.last else ""
            if self.costs.units[number].kind != "connective" or following != "connective":
                yield begin, number + 1
                begin = number + 1

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


def _ranges(shares: Iterable[int]) -> list[Range]:
    return list(pairwise(accumulate(shares, initial=0)))


def _with_frees(
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
        for value in reads(action):
            found = [held for held in alive.get(value.name, ()) if is_piece(value, held)]
            if found:
                last[value if value in found else found[0]] = index
        for value in _used_up(action):
            alive[value.name].remove(value)
            del last[value]
        for value in writes(action):
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
