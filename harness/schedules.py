"""Pipelines of replicated stages as phases: GPipe, 1F1B, and everything between, by one warm-up count per stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from harness.costs import BACKWARD, FORWARD, Costs
from harness.errors import OrreryError, Unsupported
from harness.garbage import no_collection
from harness.plan import (
    Action,
    Collective,
    Combine,
    Commit,
    Compute,
    Free,
    Load,
    Phase,
    Recv,
    Send,
    Shard,
    Step,
    Store,
    Tensor,
    Value,
)
from harness.plan.values import Range, saved_name
from harness.workload import OPTIMIZER_STATE_COPIES


@dataclass(frozen=True)
class Stage:
    """A contiguous range of units on a group of devices, each taking its share of the rows of a micro-batch."""

    units: Range
    devices: tuple[str, ...]
    shares: tuple[float, ...]

    def rows(self, micro_batch: int) -> tuple[Range, ...]:
        """Row range of each device for a micro-batch of that many rows."""
        counts = split(micro_batch, self.shares)
        edges = [sum(counts[:i]) for i in range(len(counts) + 1)]
        return tuple(pairwise(edges))


def split(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers proportional to `shares` that sum to `total` (largest remainders; ties to the first)."""
    weight = sum(shares)
    exact = [total * share / weight for share in shares]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def split_within(total: int, weights: Sequence[float], most: Sequence[int]) -> list[int] | None:
    """Whole numbers that sum to `total`, in proportion to the weights as far as each may have so much. None where all
    together may not."""
    if sum(most) < total:
        return None
    counts = list(most)
    free = [i for i, bound in enumerate(most) if bound > 0]
    while free:
        left = total - sum(counts[i] for i in range(len(most)) if i not in free)
        shares = split(left, [weights[i] for i in free])
        over = [i for i, share in zip(free, shares, strict=True) if share > most[i]]
        if not over:
            for i, share in zip(free, shares, strict=True):
                counts[i] = share
            return counts
        free = [i for i in free if i not in over]
    return counts


def micro_batches(batch_size: int, micro_batch_size: int) -> tuple[int, ...]:
    """Row counts of the micro-batches; the last one takes what is left."""
    if micro_batch_size < 1:
        raise OrreryError(f"The micro-batch size is {micro_batch_size}; it must be at least 1.")
    full, rest = divmod(batch_size, micro_batch_size)
    return (micro_batch_size,) * full + ((rest,) if rest else ())


def in_flight(warmup: int, count: int) -> int:
    """How many of `count` micro-batches a stage has in flight at most."""
    return min(max(warmup, 1), count)


def one_f_one_b(warmup: int, count: int) -> Iterator[tuple[str, int]]:
    """`warmup` forwards, then one backward and one forward in turn, then the drain. warmup = count is GPipe."""
    ahead = in_flight(warmup, count)
    for m in range(ahead):
        yield FORWARD, m
    for m in range(count):
        yield BACKWARD, m
        if m + ahead < count:
            yield FORWARD, m + ahead


@dataclass(frozen=True)
class Pipeline:
    """Stages in order over `costs`; builds the phase of a batch and the tensors its values name.

    With `clip` every update reads the square of the norm of all gradients together. With `store` every device stores
    what it makes of `costs.cacheable`. With `costs.cached` every device loads that; then there is one stage.
    `regions` are ranges of units, in order, each within one stage: the weights of each, its optimizer state and its
    buffers are values of their own, so that they can come and go by themselves. By default they are the stages. The
    parameters `apart` are values of their own, too, as are those that several regions use.
    """

    costs: Costs
    stages: tuple[Stage, ...]
    optimizer: str = "sgd"
    clip: bool = False
    store: bool = False
    regions: tuple[Range, ...] = ()
    apart: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.costs.kept:
            raise Unsupported("a pipeline generates no tokens")
        edges = [stage.units for stage in self.stages]
        if [0, *(last for _, last in edges)] != [*(first for first, _ in edges), len(self.costs.units)]:
            raise OrreryError(
                f"The stages {edges} do not cut the {len(self.costs.units)} units into contiguous ranges."
            )
        for first, _ in edges[1:]:
            for name in self.costs.carried(first):
                if self.costs.tensors[name].batchless:
                    raise Unsupported(f"{name} has no row axis and would be carried across the cut at unit {first}")

    @cached_property
    def devices(self) -> tuple[str, ...]:
        return tuple(device for stage in self.stages for device in stage.devices)

    @cached_property
    def tied(self) -> dict[str, tuple[str, ...]]:
        """Parameters held by several stages -> the devices that hold them, in pipeline order."""
        holders: dict[str, list[Stage]] = {}
        for stage in self.stages:
            for name in self.costs.parameters_of(*stage.units):
                holders.setdefault(name, []).append(stage)
        return {
            name: tuple(device for stage in stages for device in stage.devices)
            for name, stages in holders.items()
            if len(stages) > 1
        }

    @cached_property
    def single(self) -> frozenset[str]:
        """Parameters that are values of their own."""
        users = Counter(name for region in self.regions for name in self.costs.parameters_of(*region))
        return frozenset((*self.tied, *self.apart, *(name for name, count in users.items() if count > 1)))

    def regions_of(self, stage: Stage) -> tuple[Range, ...]:
        """The ranges of units of the stage of which each has weights by itself."""
        first, last = stage.units
        return tuple(region for region in self.regions if first <= region[0] < region[1] <= last) or (stage.units,)

    def rows(self, stage: Stage, count: int) -> tuple[Range, ...]:
        """Row ranges of the stage's devices for a micro-batch of `count` rows."""
        cache: dict[tuple[Range, int], tuple[Range, ...]] = self.__dict__.setdefault("_rows", {})
        if (stage.units, count) not in cache:
            cache[stage.units, count] = stage.rows(count)
        return cache[stage.units, count]

    def stored(self, stage: Stage) -> list[str]:
        """What the stage makes and stores."""
        made = {name for unit in self.costs.units[slice(*stage.units)] for name in unit.writes}
        return [name for name in self.costs.cacheable if name in made] if self.store else []

    def outputs(self, stage: Stage) -> list[str]:
        """What the stage makes that is a value of its own: for the next one, or to be stored."""
        first, last = stage.units
        leaving = [name for name in self.costs.carried(last) if name not in self.costs.carried(first)]
        return [*leaving, *(name for name in self.stored(stage) if name not in leaving)]

    def loaded(self, stage: Stage) -> list[str]:
        """What the stage reads from the cache."""
        read = {name for unit in self.costs.units[slice(*stage.units)] for name in unit.reads}
        return [name for name in self.costs.loaded if name in read]

    @property
    def cached(self) -> bool:
        return bool(self.costs.loaded)

    @property
    def worker(self) -> type[StageWorker]:
        """What writes the action lists."""
        return StageWorker

    def kept_outputs(self, stage: Stage) -> list[str]:
        """What the stage makes as a value and itself keeps for its backward pass."""
        kept = self.costs.saves(*stage.units) if self.costs.training else frozenset()
        return [name for name in self.outputs(stage) if name in kept]

    def groups(self, stage: Stage) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
        """The stage's weights as (name of the value, parameters, devices with a copy), tied ones last.

        Where some are trained and others are not, each have a value of their own.
        """
        found = []
        names = self.costs.parameters_of(*stage.units)
        for first, last in self.regions_of(stage):
            own = [name for name in self.costs.parameters_of(first, last) if name not in self.single]
            trained = tuple(name for name in own if self.costs.parameters[name].trainable)
            frozen = tuple(name for name in own if not self.costs.parameters[name].trainable)
            if trained and frozen:
                found.append((f"frozen@{first}:{last}", frozen, stage.devices))
            if own:
                found.append((f"weights@{first}:{last}", trained or frozen, stage.devices))
        single = sorted(self.single & set(names))
        return found + [(f"weights:{name}", (name,), self.tied.get(name, stage.devices)) for name in single]

    def _numel(self, names: Sequence[str], trainable: bool) -> int:
        return sum(p.numel for p in map(self.costs.parameters.__getitem__, names) if p.trainable or not trainable)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor the phases name."""
        costs, tensors = self.costs, dict[str, Tensor]()
        copies = OPTIMIZER_STATE_COPIES[self.optimizer]
        for stage in self.stages:
            first, last = stage.units
            for weights, names, _ in self.groups(stage):
                itemsize = costs.parameters[names[0]].itemsize
                tensors[weights] = Tensor("weights", 1, self._numel(names, False), itemsize)
                trained = self._numel(names, True)
                if costs.training and trained:
                    tensors[gradients_of(weights)] = Tensor("gradients", 1, trained, itemsize)
                    if copies:
                        tensors[state_of(weights)] = Tensor("optimizer", 1, trained * copies, itemsize)
            for region in self.regions_of(stage):
                if buffers := costs.buffers_bytes(*region):
                    tensors[buffers_of(region)] = Tensor("buffers", 1, buffers)
            if costs.training:
                saved = costs.saved(first, last)
                values = sum(costs.tensors[name].bytes(1) for name in self.kept_outputs(stage))
                tensors[saved_name(first, last, self.cached)] = Tensor(
                    "activations", 1, int(saved.per_row) - values, per_row=True, fixed_bytes=int(saved.fixed)
                )
            for name in (*self.stored(stage), *self.loaded(stage), *costs.carried(first)):
                cost = costs.tensors[name]
                tensors[name] = Tensor("activations", cost.tokens, cost.width, cost.itemsize, per_row=True)
                if costs.training and cost.needs_grad and name in costs.carried(first):
                    tensors[f"grad:{name}@{first}"] = tensors[name]
        if self.clip and any(tensor.kind == "gradients" for tensor in tensors.values()):
            tensors["norm"] = Tensor("buffers", 1, 1, 4)
        return tensors

    def phase(self, batches: Sequence[int], warmup: Sequence[int], name: str = "train", repeat: int = 1) -> Phase:
        """One iteration over micro-batches of these row counts; stage p keeps warmup[p] of them in flight."""
        actions: dict[str, tuple[Action, ...]] = {}
        live: dict[str, tuple[Value, ...]] = {}
        shards: dict[str, Shard] = {}
        with no_collection():
            for p, stage in enumerate(self.stages):
                rows = [self.rows(stage, count) for count in batches]
                for i, device in enumerate(stage.devices):
                    mine = tuple(r[i] for r in rows)
                    worker = self.worker(self, p, i, mine, tuple(batches))
                    actions[device] = tuple(worker.iteration(warmup))
                    live[device] = worker.live
                    shards[device] = Shard(stage.units, mine)
        return Phase(
            name=name,
            micro_batches=tuple(batches),
            shards=shards,
            actions=actions,
            live=live,
            tied={
                f"gradients:{parameter}": devices
                for parameter, devices in self.tied.items()
                if self.costs.parameters[parameter].trainable
            },
            repeat=repeat,
            training=self.costs.training,
            cached=self.cached,
        )


class StageWorker:
    """Writes the action list of one device, number `i` of stage p, which works on `rows[m]` of micro-batch m."""

    def __init__(self, pipeline: Pipeline, p: int, i: int, rows: tuple[Range, ...], batches: tuple[int, ...]) -> None:
        self.pipeline, self.costs, self.p, self.rows, self.batches = pipeline, pipeline.costs, p, rows, batches
        self.stage = pipeline.stages[p]
        self.device = self.stage.devices[i]
        self._overlap_cache: dict[tuple[Range, int], list[tuple[str, Range]]] = {}
        self.first, self.last = self.stage.units
        self.before = pipeline.stages[p - 1] if p else None
        self.behind = pipeline.stages[p + 1] if p + 1 < len(pipeline.stages) else None
        self.entering = self.costs.carried(self.first) if self.before else ()
        self.leaving = self.costs.carried(self.last) if self.behind else ()
        groups = pipeline.groups(self.stage)
        tensors = pipeline.tensors
        self.weights = tuple(Value(weights) for weights, _, _ in groups)
        self.state = tuple(Value(n) for w, _, _ in groups if (n := state_of(w)) in tensors)
        self.buffers = tuple(Value(n) for n in map(buffers_of, pipeline.regions_of(self.stage)) if n in tensors)
        self.gradients = [(Value(n), devices) for w, _, devices in groups if (n := gradients_of(w)) in tensors]
        self.trained = tuple(Value(w) for w, _, _ in groups if gradients_of(w) in tensors)
        self.live = self.weights + self.state + self.buffers
        self.read = {name for unit in self.costs.units[self.first : self.last] for name in unit.reads}
        kept = self.costs.saves(self.first, self.last) if self.costs.training else frozenset()
        self.outputs, self.stored, self.loaded = (
            f(self.stage) for f in (pipeline.outputs, pipeline.stored, pipeline.loaded)
        )
        entering = (*self.entering, *self.loaded)
        self.kept = [*(name for name in entering if name in kept), *pipeline.kept_outputs(self.stage)]

    def iteration(self, warmup: Sequence[int]) -> Iterator[Action]:
        """The device's actions; stage p keeps warmup[p] micro-batches in flight."""
        if not self.costs.training:
            for m in range(len(self.rows)):
                yield from self._forward(m)
            return
        for direction, m in one_f_one_b(warmup[self.p], len(self.rows)):
            yield from self._forward(m) if direction == FORWARD else self._backward(m)
        yield from self._update()

    def _weights(self, m: int) -> tuple[Value, ...]:
        """The weights that micro-batch m is computed with, in the version that it began with."""
        return self.weights

    def _gradients(self, m: int) -> tuple[Value, ...]:
        """The weight gradients to which micro-batch m adds."""
        return tuple(value for value, _ in self.gradients)

    def _active(self, m: int) -> bool:
        return self.rows[m][0] < self.rows[m][1]

    def _overlaps(self, other: Stage, m: int) -> list[tuple[str, Range]]:
        """Devices of another stage that work on some of this device's rows of micro-batch m, with those rows."""
        count = self.batches[m]
        if (other.units, count) not in self._overlap_cache:
            low, high = self.rows[m]
            pieces = zip(other.devices, self.pipeline.rows(other, count), strict=True)
            self._overlap_cache[other.units, count] = [
                (device, (max(low, a), min(high, b))) for device, (a, b) in pieces if max(low, a) < min(high, b)
            ]
        return self._overlap_cache[other.units, count]

    def _receive(self, name: str, source: Stage, m: int) -> Iterator[Action]:
        """Receive this device's rows of a tensor, joining the pieces when several devices hold them."""
        pieces = [(device, Value(name, m, rows)) for device, rows in self._overlaps(source, m)]
        for device, piece in pieces:
            yield Recv(piece, device)
        if len(pieces) > 1:
            parts = tuple(piece for _, piece in pieces)
            yield Combine("concat", parts, Value(name, m, self.rows[m]))
            yield Free(parts)

    def _distribute(self, name: str, target: Stage, m: int) -> Iterator[Action]:
        for device, rows in self._overlaps(target, m):
            yield Send(Value(name, m, rows), device)

    def _saved(self, m: int) -> Value:
        return Value(saved_name(self.first, self.last, self.pipeline.cached), m, self.rows[m])

    def _held_for_backward(self, m: int) -> tuple[Value, ...]:
        return tuple(Value(name, m, self.rows[m]) for name in self.kept)

    def _forward(self, m: int) -> Iterator[Action]:
        if not self._active(m):
            return
        rows, training = self.rows[m], self.costs.training
        if self.before:
            for name in self.entering:
                yield from self._receive(name, self.before, m)
        loaded = tuple(Value(name, m, rows) for name in self.loaded)
        yield from map(Load, loaded)
        made = tuple(Value(name, m, rows) for name in self.outputs)
        yield Compute(
            (self.first, self.last),
            FORWARD,
            m,
            rows,
            self._weights(m) + self.buffers,
            reads=(*(Value(name, m, rows) for name in self.entering if name in self.read), *loaded),
            writes=made + ((self._saved(m),) if training else ()),
        )
        if self.behind:
            for name in self.leaving:
                yield from self._distribute(name, self.behind, m)
        yield from (Store(Value(name, m, rows)) for name in self.stored)
        handled = (*made, *loaded, *(Value(name, m, rows) for name in self.entering))
        if spent := tuple(value for value in handled if value.name not in self.kept):
            yield Free(spent)

    def _flowing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if self.costs.tensors[name].needs_grad]

    def _backward(self, m: int) -> Iterator[Action]:
        if not self._active(m):
            return
        rows = self.rows[m]
        arriving = [f"grad:{name}@{self.last}" for name in self._flowing(self.leaving)]
        going = [f"grad:{name}@{self.first}" for name in self._flowing(self.entering)]
        for name in arriving:
            assert self.behind is not None
            yield from self._receive(name, self.behind, m)
        spent = (self._saved(m), *self._held_for_backward(m), *(Value(name, m, rows) for name in arriving))
        if self.gradients or going:
            yield Compute(
                (self.first, self.last),
                BACKWARD,
                m,
                rows,
                self._weights(m),
                reads=spent,
                writes=tuple(Value(name, m, rows) for name in going),
                accumulates=self._gradients(m),
            )
        yield Free(spent)
        if going:
            assert self.before is not None
            for name in going:
                yield from self._distribute(name, self.before, m)
            yield Free(tuple(Value(name, m, rows) for name in going))

    def _update(self) -> Iterator[Action]:
        """Sum the gradients over all copies, update, and commit the round."""
        summed: list[Value] = []
        for value, devices in self.gradients:
            if not any(map(self._active, range(len(self.rows)))):
                yield Combine("sum", (), value)
            if len(devices) > 1:
                yield Collective("all-reduce", value, next_version(value), devices)
            summed.append(next_version(value) if len(devices) > 1 else value)
        norm = None
        if "norm" in self.pipeline.tensors:
            norm = yield from self._norm(summed)
        if summed:
            changed = self.trained + self.state
            yield Step(self.stage.units, tuple(summed), changed, tuple(map(next_version, changed)), norm)
            yield Free(tuple(summed))
        if norm is not None:
            yield Free((norm,))
        yield Commit()

    def _norm(self, summed: Sequence[Value]) -> Generator[Action, None, Value]:
        """The square of the norm of all gradients. Each counts on the first device that holds its weights."""
        norm, everybody = Value("norm"), self.pipeline.devices
        counted = tuple(
            value for value, (_, devices) in zip(summed, self.gradients, strict=True) if devices[0] == self.device
        )
        yield Combine("square-sum" if counted else "sum", counted, norm)
        if len(everybody) == 1:
            return norm
        yield Collective("all-reduce", norm, next_version(norm), everybody)
        return next_version(norm)


def gradients_of(weights: str) -> str:
    """The name of the gradients of the value `weights...`."""
    return "gradients" + weights.removeprefix("weights")


def state_of(weights: str) -> str:
    """The name of the optimizer's state of the value `weights...`."""
    return "optimizer" + weights.removeprefix("weights")


def buffers_of(region: Range) -> str:
    """The name of the buffers of the region's units."""
    return "buffers@{}:{}".format(*region)


def next_version(value: Value) -> Value:
    """The value one version on."""
    return value._replace(version=value.version + 1)
