"""What a workload costs, unit by unit: counted from the real model, independent of any device.

Every quantity is affine in the number of rows (samples): `fixed + per_row * rows`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from harness.cluster import OPERATOR_CLASSES, Device
from harness.errors import OrreryError

FORWARD, BACKWARD = "forward", "backward"
DIRECTIONS = (FORWARD, BACKWARD)
#: Beside the directions, what measured tables hold: the optimizer's update of each unit's weights.
UPDATE = "update"


class Affine(NamedTuple):
    """`fixed + per_row * rows`."""

    fixed: float = 0
    per_row: float = 0

    def at(self, rows: int) -> float:
        return self.fixed + self.per_row * rows

    def plus(self, other: Affine) -> Affine:
        return Affine(self.fixed + other.fixed, self.per_row + other.per_row)

    def minus(self, other: Affine) -> Affine:
        return Affine(self.fixed - other.fixed, self.per_row - other.per_row)


class Work(NamedTuple):
    """FLOPs by operator class (one multiply-add is 2) and the number of kernels launched."""

    matmul: Affine = Affine()
    conv: Affine = Affine()
    depthwise: Affine = Affine()
    kernels: Affine = Affine()

    def plus(self, other: Work) -> Work:
        return Work(*(a.plus(b) for a, b in zip(self, other, strict=True)))

    def minus(self, other: Work) -> Work:
        return Work(*(a.minus(b) for a, b in zip(self, other, strict=True)))

    def flops(self, rows: int) -> float:
        return self.matmul.at(rows) + self.conv.at(rows) + self.depthwise.at(rows)


@dataclass(frozen=True)
class TensorCost:
    """A tensor that units hand to each other. Bytes per row = tokens * width * itemsize.

    `batchless` tensors are the same for every row. `needs_grad` says whether a gradient flows back into it.
    """

    tokens: int
    width: int
    itemsize: int
    batchless: bool = False
    needs_grad: bool = True

    def bytes(self, rows: int) -> int:
        return self.tokens * self.width * self.itemsize * (1 if self.batchless else rows)


@dataclass(frozen=True)
class ParameterCost:
    """One parameter of the model. Tied uses carry the same name in several units."""

    numel: int
    itemsize: int
    trainable: bool

    @property
    def bytes(self) -> int:
        return self.numel * self.itemsize


class WidthCut(NamedTuple):
    """How the width of a unit can be cut among devices: in multiples of `granule` of its `width` channels.

    All its parameters are cut with it but the `whole` ones: biases that one device adds to its part of a sum.
    """

    width: int
    granule: int
    whole: tuple[str, ...] = ()


@dataclass(frozen=True)
class UnitCost:
    """One unit. `saved` counts what autograd keeps inside the unit; tensors that units hand to each other
    and that this unit keeps for its backward pass are named in `saves`, so that a range counts them once.

    `workspace`: bytes alive at the worst moment of the pass beyond what is alive before it and, for the
    forward pass, what stays after it. The gradients of what the unit reads are in it, those of its weights are not.
    `local` units (masks, position biases) are cheap and run on every device that reads what they write.
    `cut`: how devices can share its width; None where they can't.
    """

    name: str
    layer: int
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    forward: Work
    backward: Work
    saved: Affine
    saves: tuple[str, ...]
    forward_workspace: Affine
    backward_workspace: Affine
    parameters: tuple[str, ...]
    buffers_bytes: int = 0
    local: bool = False
    cut: WidthCut | None = None

    def work(self, direction: str) -> Work:
        return self.forward if direction == FORWARD else self.backward


@dataclass(frozen=True)
class Costs:
    """The chain of units in execution order, the local units beside it, tensors and parameters by name.

    `inputs` are the tensors that every device reads from its own copy of the data, by sample id.
    `measured[table][direction]` holds, per unit (chain, then local), measured seconds as ((rows, seconds), ...);
    `measured[table]["update"]` likewise the optimizer's update, which does not depend on rows.
    `loaded` are those of the inputs that are values of the plan: what a cache of the frozen part's results provides
    (see `cached`), or what was kept of the tokens before. `kept` are tensors that outlive a pass, on the device that
    makes them. Where tokens are generated this is the chain of the prompt, and `decoding` that of one more token, if
    there is to be one.
    `fixed_shares[table]`: of each unit's measured time the share that every part of it takes, too; none: as the whole.
    `core_flops_per_s[table]` is what a core of the measured machine did at that time (see `harness.profile.core`).
    `key` identifies the content: same key, same costs.
    """

    key: str
    units: tuple[UnitCost, ...]
    local_units: tuple[UnitCost, ...]
    tensors: dict[str, TensorCost] = field(hash=False)
    parameters: dict[str, ParameterCost] = field(hash=False)
    inputs: tuple[str, ...]
    training: bool
    measured: dict[str, dict[str, tuple[tuple[tuple[int, float], ...], ...]]] = field(default_factory=dict, hash=False)
    core_flops_per_s: dict[str, float] = field(default_factory=dict, hash=False)
    fixed_shares: dict[str, tuple[float, ...]] = field(default_factory=dict, hash=False)
    loaded: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    decoding: Costs | None = None

    @property
    def decodes(self) -> bool:
        """Whether this is the chain of one more token."""
        return bool(self.loaded) and not self.training

    @cached_property
    def cacheable(self) -> tuple[str, ...]:
        """What the frozen part in front of everything trained hands to the rest, and thus what a cache must hold."""
        return tuple(
            name
            for unit in self.units
            if self._frozen(unit)
            for name in unit.writes
            if any(name in other.reads and not self._frozen(other) for other in self.units)
        )

    @cached_property
    def cached(self) -> Costs:
        """The same chain where a cache has what is `cacheable`: frozen units are empty, their tensors inputs."""
        empty = [self._frozen(unit) for unit in self.units]
        measured = {
            table: {
                direction: tuple(
                    ((1, 0.0),) if place < len(empty) and empty[place] else points
                    for place, points in enumerate(columns)
                )
                for direction, columns in directions.items()
            }
            for table, directions in self.measured.items()
        }
        return replace(
            self,
            key=f"{self.key}-cached",
            units=tuple(_emptied(unit) if gone else unit for unit, gone in zip(self.units, empty, strict=True)),
            inputs=(*self.inputs, *self.cacheable),
            loaded=self.cacheable,
            measured=measured,
        )

    def _frozen(self, unit: UnitCost) -> bool:
        """Whether nothing is trained in the unit or in front of it."""
        return self.training and not any(self.tensors[name].needs_grad for name in unit.writes)

    @cached_property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """Unit ranges [first, last) of the layers, in order."""
        ranges: list[tuple[int, int]] = []
        for index, unit in enumerate(self.units):
            if ranges and self.units[ranges[-1][0]].layer == unit.layer:
                ranges[-1] = (ranges[-1][0], index + 1)
            else:
                ranges.append((index, index + 1))
        return tuple(ranges)

    @cached_property
    def _writer(self) -> dict[str, int]:
        return {tensor: index for index, unit in enumerate(self.units) for tensor in unit.writes}

    @cached_property
    def _local_writer(self) -> dict[str, UnitCost]:
        return {tensor: unit for unit in self.local_units for tensor in unit.writes}

    @cached_property
    def _last_reader(self) -> dict[str, int]:
        return {tensor: index for index, unit in enumerate(self.units) for tensor in unit.reads}

    def carried(self, cut: int) -> tuple[str, ...]:
        """Tensors that cross the boundary in front of unit `cut`: written before it, read at or after it."""
        return self._carried[cut]

    @cached_property
    def _carried(self) -> tuple[tuple[str, ...], ...]:
        crossing: list[list[str]] = [[] for _ in range(len(self.units) + 1)]
        for tensor, writer in self._writer.items():
            for cut in range(writer + 1, self._last_reader.get(tensor, writer) + 1):
                crossing[cut].append(tensor)
        return tuple(tuple(names) for names in crossing)

    def locals_of(self, first: int, last: int) -> tuple[UnitCost, ...]:
        """Local units that the range [first, last) needs, each once, in the order of `local_units`."""
        return tuple(unit for unit, users in self._local_users if bisect_left(users, first) < bisect_left(users, last))

    @cached_property
    def _local_users(self) -> tuple[tuple[UnitCost, list[int]], ...]:
        """Each local unit with the chain units that need it, directly or through other local units."""
        users: dict[str, list[int]] = {unit.name: [] for unit in self.local_units}
        for index, unit in enumerate(self.units):
            wanted: set[str] = set()
            todo = list(unit.reads)
            while todo:
                local = self._local_writer.get(todo.pop())
                if local is not None and local.name not in wanted:
                    wanted.add(local.name)
                    users[local.name].append(index)
                    todo.extend(local.reads)
        return tuple((unit, users[unit.name]) for unit in self.local_units)

    def executed(self, first: int, last: int) -> Iterator[UnitCost]:
        """The units a device runs for the range: its local units, then the chain."""
        yield from self.locals_of(first, last)
        yield from self.units[first:last]

    def parameters_of(self, first: int, last: int) -> tuple[str, ...]:
        """Names of the parameters the range holds, each once."""
        names: dict[str, None] = {}
        for unit in self.executed(first, last):
            names.update(dict.fromkeys(unit.parameters))
        return tuple(names)

    def weight_bytes(self, first: int, last: int) -> tuple[int, int]:
        """Bytes of the range's parameters, and of those that are trained."""
        cache: dict[tuple[int, int], tuple[int, int]] = self.__dict__.setdefault("_weight_cache", {})
        if (first, last) not in cache:
            held = [self.parameters[name] for name in self.parameters_of(first, last)]
            cache[first, last] = sum(p.bytes for p in held), sum(p.bytes for p in held if p.trainable)
        return cache[first, last]

    def work(self, first: int, last: int, direction: str) -> Work:
        cache: dict[tuple[int, int, str], Work] = self.__dict__.setdefault("_work_cache", {})
        key = (first, last, direction)
        if key not in cache:
            sums = self._work_before[direction]
            total = sums[last].minus(sums[first])
            for unit in self.locals_of(first, last):
                total = total.plus(unit.work(direction))
            cache[key] = total
        return cache[key]

    @cached_property
    def _work_before(self) -> dict[str, list[Work]]:
        """Per direction: the work of the chain in front of each unit."""
        return {
            direction: list(accumulate((unit.work(direction) for unit in self.units), Work.plus, initial=Work()))
            for direction in DIRECTIONS
        }

    def saved(self, first: int, last: int) -> Affine:
        """Bytes kept between forward and backward of the range, without the tensors that enter it."""
        cache: dict[tuple[int, int], Affine] = self.__dict__.setdefault("_saved_cache", {})
        if (first, last) not in cache:
            cache[first, last] = self._saved(first, last)
        return cache[first, last]

    def _saved(self, first: int, last: int) -> Affine:
        total = Affine()
        inside: set[str] = set()
        for unit in self.executed(first, last):
            total = total.plus(unit.saved)
            inside.update(unit.saves)
        entering = {*self.inputs, *self.carried(first)}
        for name in inside - entering:
            cost = self.tensors[name]
            total = total.plus(Affine(cost.bytes(1)) if cost.batchless else Affine(0, cost.bytes(1)))
        return total

    def saves(self, first: int, last: int) -> frozenset[str]:
        """Tensors handed between units that some unit of the range keeps for its backward pass."""
        return frozenset(name for unit in self.executed(first, last) for name in unit.saves)

    def buffers_bytes(self, first: int, last: int) -> int:
        return sum(unit.buffers_bytes for unit in self.executed(first, last))

    def workspace(self, first: int, last: int, direction: str, rows: int, new_gradients: bool = False) -> int:
        """Bytes at the worst moment of a pass over the range beyond those alive before it and those that it leaves.

        A forward pass leaves what autograd saves and the tensors that cross the end of the range; other tensors
        between its units live until their last reader. A backward pass leaves the gradients of the tensors that
        cross the start; on its way it frees what each unit saved. With `new_gradients` its weight gradients come
        to life in it and count too, else they exist, and those of one weight at a time are added to them.
        """
        cache: dict[tuple[object, ...], int] = self.__dict__.setdefault("_workspace_cache", {})
        key = (first, last, direction, rows, new_gradients)
        if key not in cache:
            forward = direction == FORWARD
            cache[key] = int(
                self._forward_workspace(first, last, rows)
                if forward
                else self._backward_workspace(first, last, rows, new_gradients)
            )
        return cache[key]

    def _forward_workspace(self, first: int, last: int, rows: int) -> float:
        units = list(self.executed(first, last))
        last_use = {name: index for index, unit in enumerate(units) for name in (*unit.writes, *unit.reads)}
        stays = {*self.saves(first, last), *self.carried(last), *units[-1].writes, *self.kept}
        written: set[str] = set()
        alive, worst = 0.0, 0.0
        for index, unit in enumerate(units):
            written.update(unit.writes)
            alive += unit.saved.at(rows) + self._bytes(unit.writes, rows)
            worst = max(worst, alive + unit.forward_workspace.at(rows))
            done = {name for name in (*unit.writes, *unit.reads) if last_use[name] == index}
            alive -= self._bytes((done & written) - stays, rows)
        return worst - alive

    def _backward_workspace(self, first: int, last: int, rows: int, new_gradients: bool) -> float:
        units = list(self.executed(first, last))
        written = {name for unit in units for name in unit.writes}
        first_saver: dict[str, int] = {}
        for index, unit in enumerate(units):
            for name in written.intersection(unit.saves):
                first_saver.setdefault(name, index)
        uses = Counter(name for unit in units for name in unit.parameters)
        used: Counter[str] = Counter()
        alive, worst = 0.0, 0.0
        gradients: set[str] = set()
        for index, unit in reversed(list(enumerate(units))):
            own = {name: self.parameters[name].bytes for name in unit.parameters if self.parameters[name].trainable}
            again = max((own[name] for name in own if used[name] or not new_gradients), default=0)
            # A gradient that is new stays, and so does one that autograd gathers from several uses of the weight.
            stays = {name for name in own if new_gradients or uses[name] > 1}
            begins = sum(own[name] for name in stays if not used[name])
            worst = max(worst, alive + unit.backward_workspace.at(rows) + again + (begins if new_gradients else 0))
            alive += begins
            used.update(own)
            if not new_gradients:
                alive -= sum(own[name] for name in stays if used[name] == uses[name])
            made = {name for name in unit.reads if self.tensors[name].needs_grad} - gradients
            alive += self._bytes(made, rows) - self._bytes(gradients.intersection(unit.writes), rows)
            gradients |= made
            saved = {name for name in written.intersection(unit.saves) if first_saver[name] == index}
            alive -= unit.saved.at(rows) + self._bytes(saved, rows)
        return max(0.0, worst - self._bytes(gradients.intersection(self.carried(first)), rows))

    def _bytes(self, names: Iterable[str], rows: int) -> int:
        return sum(self.tensors[name].bytes(rows) for name in names)

    def seconds(self, device: Device, first: int, last: int, direction: str, rows: int, fraction: float = 1.0) -> float:
        """Time of one pass of `rows` rows over the range on the device; of that `fraction` of their tokens and width.

        A part has its share of the FLOPs, and as many kernels as the whole; of a measured time it has the fixed share,
        and its share of the rest. One more token takes as long as the memory needs to give what every unit
        reads, where that is longer than the arithmetic: rates of products are those of many tokens.
        """
        if rows == 0:
            return 0.0
        cache: dict[tuple[object, ...], float] = self.__dict__.setdefault("_seconds_cache", {})
        key = (device.kind, first, last, direction, rows, fraction)
        if key not in cache:
            if device.measured is not None:
                measured = self.measured_seconds(device.measured, first, last, direction, rows, fraction)
                cache[key] = measured / device.share
            elif self.decodes:
                units = self.executed(first, last)
                cache[key] = sum(
                    _rated_seconds(
                        device, unit.work(direction), direction, rows, fraction, self._read_bytes(unit, rows)
                    )
                    for unit in units
                )
            else:
                cache[key] = _rated_seconds(device, self.work(first, last, direction), direction, rows, fraction)
        return cache[key]

    def layer_seconds(self, device: Device, direction: str, rows: int) -> tuple[float, ...]:
        """Time of one pass over each layer by itself."""
        cache: dict[tuple[object, ...], tuple[float, ...]] = self.__dict__.setdefault("_layer_seconds_cache", {})
        key = (device.kind, direction, rows)
        if key not in cache:
            cache[key] = tuple(self.seconds(device, *layer, direction, rows) for layer in self.layers)
        return cache[key]

    def _read_bytes(self, unit: UnitCost, rows: int) -> int:
        """Of the weights, of which an embedding reads next to nothing, and of what was kept of the tokens before."""
        weights = 0 if unit.kind == "embedding" else sum(self.parameters[name].bytes for name in unit.parameters)
        return weights + self._bytes((name for name in unit.reads if name in self.loaded), rows)

    def update_seconds(self, device: Device, first: int, last: int, nbytes: int) -> float:
        """Time of the optimizer's update of the range, which reads and writes `nbytes` of memory."""
        if device.measured is not None:
            return self.measured_seconds(device.measured, first, last, UPDATE, 1) / device.share
        return nbytes / device.memory_bandwidth

    def measured_seconds(
        self, table: str, first: int, last: int, direction: str, rows: int, fraction: float = 1.0
    ) -> float:
        """Time of one pass, or update, of a whole core of the machine that was measured; fraction: as `seconds`.

        Local units are done whole, whatever the part.
        """
        if table not in self.measured:
            raise OrreryError(
                f"There are no measured times called {table!r} for this workload. Run `orrery profile` first."
            )
        columns = self.measured[table][direction]
        local = {unit.name: len(self.units) + i for i, unit in enumerate(self.local_units)}
        whole = sum(_interpolate(columns[local[unit.name]], rows) for unit in self.locals_of(first, last))
        shares = self.fixed_shares.get(table) or (0.0,) * len(self.units)
        parts = ((shares[i], _interpolate(columns[i], rows)) for i in range(first, last))
        return whole + sum(seconds * (fixed + (1 - fixed) * fraction) for fixed, seconds in parts)


def _emptied(unit: UnitCost) -> UnitCost:
    """The unit where nobody runs it."""
    nothing = Affine()
    return UnitCost(unit.name, unit.layer, unit.kind, (), (), Work(), Work(), nothing, (), nothing, nothing, ())


def _rated_seconds(
    device: Device, work: Work, direction: str, rows: int, fraction: float, read_bytes: int = 0
) -> float:
    """Kernel launches plus the fraction of the FLOPs over the achieved rate of each operator class, or of the bytes
    read over the memory's bandwidth where that is more."""
    seconds = 0.0
    for operator in OPERATOR_CLASSES:
        flops = getattr(work, operator).at(rows) * fraction
        if not flops:
            continue
        if operator not in device.rates:
            raise OrreryError(
                f"Nobody has published the rate of {operator} operators on {device.profile}, and this model needs it. "
                f"Choose a device with a known rate, or add `efficiency_{operator}` to a device file of your own."
            )
        seconds += flops / device.rates[operator][DIRECTIONS.index(direction)]
    if read_bytes:
        seconds = max(seconds, read_bytes * fraction / device.memory_bandwidth)
    return work.kernels.at(rows) * device.kernel_overhead_s + seconds


def _interpolate(points: tuple[tuple[int, float], ...], rows: int) -> float:
    """Piecewise linear through the measured points; the outer segments are extended."""
    if len(points) == 1:
        return points[0][1] * rows / points[0][0]
    after = next((i for i, (r, _) in enumerate(points[1:-1], 1) if rows <= r), len(points) - 1)
    (r0, s0), (r1, s1) = points[after - 1], points[after]
    return max(0.0, s0 + (s1 - s0) * (rows - r0) / (r1 - r0))
