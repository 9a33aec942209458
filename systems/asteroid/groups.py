"""What stages come to on groups of devices: rows by algorithm 1, seconds by equations 5, 7 and 8, memory by equation 3.

A stage with k behind it keeps 2k+1 micro-batches in flight, or as many as the round has, or as its devices have memory
for, down to one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from harness.layer_tables import LayerTables
from systems.asteroid.equations import Step, in_flight, latency, tail
from systems.asteroid.shares import Shares, shared

#: Layers that take less time are taken to take this: they may have nothing to compute.
NO_TIME_S = 1e-12
#: By how much bounds may be off because sums are rounded.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Placed:
    """A stage: layers [first, last) on devices, by number, each with so many rows of a micro-batch."""

    layers: tuple[int, int]
    devices: tuple[int, ...]
    rows: tuple[int, ...]
    in_flight: int
    step: Step


@dataclass(frozen=True, eq=False)
class Stages:
    """E_f and E_b of all stages on one group, as `Groups.table` reads them: infinite where memory is too short. And M /
    K_p of those that keep fewer than the rule wants, 1 of others, for which that is no bound."""

    forward: np.ndarray
    backward: np.ndarray
    num_trips: np.ndarray


@dataclass(frozen=True)
class _Known:
    """All stages of a group, but those that miss a limit, with at most so many micro-batches in flight: seconds, how
    many each of them keeps, -1 of those that are missing, and with what rows in memory its devices would share in the
    same way (`Shares.given`)."""

    limit: float
    most: int
    forward: np.ndarray
    backward: np.ndarray
    kept: np.ndarray
    given: np.ndarray


class Groups:
    """What a stage on a group of devices comes to, for `count` micro-batches of `rows` rows. Devices are numbered as in
    `tables`, and those of a group stand in the order of their memory. `offload`: the second part of algorithm 1.
    `by_speed`: the first one, or else equal shares.
    """

    def __init__(self, tables: LayerTables, rows: int, count: int, offload: bool = True, by_speed: bool = True) -> None:
        self.tables, self.rows, self.count, self.offload, self.by_speed = tables, rows, count, offload, by_speed
        cluster, costs, devices = tables.cluster, tables.costs, range(len(tables.devices))
        self.rates = [cluster.bandwidth[device.name] for device in tables.devices]
        features = [(tables.kinds[d], tables.budgets[d], self.rates[d]) for d in devices]
        #: Of each device the first one that it is exchangeable with.
        self.alike = [features.index(feature) for feature in features]
        order = sorted(devices, key=lambda d: (-tables.budgets[d], -tables.speeds[d], self.alike[d], d))
        self._place = {device: place for place, device in enumerate(order)}

        carried = [[costs.tensors[name] for name in costs.carried(first)] for first, _ in costs.layers]
        sent = [sum(tensor.bytes(rows) for tensor in tensors) for tensors in carried]
        returned = [sum(tensor.bytes(rows) for tensor in tensors if tensor.needs_grad) for tensors in carried]
        #: Bytes forward and backward over the boundary in front of each layer; nothing is behind the last one.
        self.sent, self.returned = np.array([*sent, 0.0]), np.array([*returned, 0.0])

        self._first, self._last = np.triu_indices(tables.num_layers + 1, 1)
        self._case = np.full((tables.num_layers + 1, tables.num_layers + 1), -1)
        self._case[self._first, self._last] = np.arange(self._first.size)
        self._memory = [part[self._first, self._last] for part in tables.memory]
        kinds = list(dict.fromkeys(tables.kinds))
        self._kind = np.array([kinds.index(kind) for kind in tables.kinds])
        passes = [
            [tables.layer_seconds(tables.kinds.index(kind), y) for y in range(rows + 1)] for kind in kinds
        ]  # of each kind and number of rows
        self._forward, self._backward = (np.array([[y[side] for y in kind] for kind in passes]) for side in (0, 1))
        whole = self._seconds(np.arange(len(kinds))[:, None], np.arange(self._first.size), np.array(rows))
        self._capacity = 1 / np.maximum(sum(whole), NO_TIME_S)  # eq. 9
        if not by_speed:
            self._capacity = np.ones_like(self._capacity)
        self._bounds()
        self._known: dict[tuple[int, ...], _Known] = {}
        self._made: dict[tuple[int, ...], list[Stages]] = {}

    def _bounds(self) -> None:
        """The most rows per second of each kind of device, on every stage and on the whole model; and, of the layers
        outside of each stage, the part of the whole model's work that no kind has less of."""
        rows = np.arange(1, self.rows + 1)[:, None]
        both = (self._forward + self._backward)[:, 1:]
        least = np.maximum((np.diff(both) / rows).min(axis=1), 0.0)  # seconds per row of each layer, [kinds, layers]
        whole = np.maximum(least.sum(axis=1), NO_TIME_S)
        before = np.concatenate(([0.0], np.cumsum((least / whole[:, None]).min(axis=0))))
        stage = [((of[:, self._last] - of[:, self._first]) / rows).min(axis=0) for of in both]
        self._most_per_second = 1 / np.maximum(stage, NO_TIME_S)
        self._whole = 1 / whole
        self._outside = before[-1] - (before[self._last] - before[self._first])

    def sorted(self, devices: Iterable[int]) -> tuple[int, ...]:
        """The devices in the order that they have in a group."""
        return tuple(sorted(devices, key=self._place.__getitem__))

    def rate(self, devices: Iterable[int]) -> float:
        """Bytes per second of the slowest link between these devices."""
        return min(self.rates[device] for device in devices)

    def stage(self, layers: tuple[int, int], devices: Sequence[int], behind: int) -> Placed | None:
        """The stage on these devices, with so many stages behind it; None: it does not fit."""
        group = self.sorted(devices)
        case = self._case[layers][None]
        kept = self._fitting(group, case, min(in_flight(behind), self.count))
        if not kept[0]:
            return None
        rows = self._shared(group, case, self._most_rows(group, case, kept)).rows
        forward, backward = (float(seconds[0]) for seconds in self._slowest(group, case, rows))
        step = Step(forward, backward, float(self.all_reduce(group)[layers]))
        return Placed(layers, group, tuple(map(int, rows[:, 0])), int(kept[0]), step)

    def stages(self, devices: Sequence[int], behind: int, limit: float = np.inf) -> Stages:
        """All stages on these devices, with so many stages behind: the same object where nothing changes with that.

        Those with which no round can be as fast as the limit, in seconds, may be missing.
        """
        group = tuple(self.alike[device] for device in self.sorted(devices))
        if group not in self._known or self._known[group].limit < limit:
            self._known[group], self._made[group] = self._roomy(group, limit), []
        made = self._made[group]
        while len(made) <= behind:
            known = self._crowded(group, self._known[group], min(in_flight(len(made)), self.count))
            fewer = (known.kept > 0) & (known.kept < known.most)
            num_trips = np.divide(self.count, known.kept, out=np.ones(fewer.size), where=fewer)
            same = made and made[-1].forward is known.forward and (made[-1].num_trips == num_trips).all()
            made.append(made[-1] if same else Stages(known.forward, known.backward, num_trips))
            self._known[group] = known
        return made[behind]

    def _roomy(self, group: tuple[int, ...], limit: float) -> _Known:
        """With memory for everything."""
        cases = self._hopeful(group, limit)
        shares = self._shared(group, cases, np.full((len(group), cases.size), self.rows))
        forward, backward = np.full((2, self._first.size), np.inf)
        forward[cases], backward[cases] = self._slowest(group, cases, shares.rows)
        kept, given = np.full(self._first.size, -1, np.int16), np.zeros((len(group), self._first.size), np.int32)
        kept[cases], given[:, cases] = 0, shares.given
        return _Known(limit, 0, forward, backward, kept, given)

    def _crowded(self, group: tuple[int, ...], known: _Known, most: int) -> _Known:
        """With more micro-batches in flight than is known: what changes are stages for which memory gets short."""
        if most == known.most:
            return known
        changing = known.kept == known.most
        short = np.flatnonzero(changing & self._short(group, most))
        kept = np.where(changing, np.int16(most), known.kept)
        if not short.size:
            return replace(known, most=most, kept=kept)
        kept[short] = self._fitting(group, short, most, known.most)
        more = short[kept[short] > known.most]
        room = self._most_rows(group, more, kept[more])
        other = ~((room >= known.given[:, more]) & (room > 0)).all(axis=0)
        more, room = more[other], room[:, other]
        none = short[kept[short] == 0]
        if not more.size and not none.size:
            return replace(known, most=most, kept=kept)
        shares = self._shared(group, more, room)
        forward, backward, given = known.forward.copy(), known.backward.copy(), known.given.copy()
        forward[none] = backward[none] = np.inf
        forward[more], backward[more] = self._slowest(group, more, shares.rows)
        given[:, more] = shares.given
        return _Known(known.limit, most, forward, backward, kept, given)

    def case(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """The numbers of stages of layers [first, last) in `Stages`."""
        return self._case[first, last]

    def table(self, values: np.ndarray) -> np.ndarray:
        """Values of stages as [first layer, last layer + 1]: infinite where no layer is between."""
        found = np.full((self.tables.num_layers, self.tables.num_layers + 1), np.inf)
        found[self._first, self._last] = values
        return found

    def all_reduce(self, devices: Sequence[int]) -> np.ndarray:
        """T_a of eq. 5, [first layer, last layer + 1]: a ring over the gradients of what is trained."""
        size = len(devices)
        return 2 * (size - 1) * self.tables.weight_bytes[1][:-1] / (size * self.rate(devices))

    def communication(self, before: Sequence[int], after: Sequence[int], cut: int) -> Step:
        """The step between two groups: each direction takes what the slowest link needs for the whole micro-batch."""
        rate = self.rate((*before, *after))
        return Step(float(self.sent[cut]) / rate, float(self.returned[cut]) / rate)

    def latency(self, stages: Sequence[Placed], trips: bool = False) -> float:
        """Equations 4 to 6 of these stages and the steps between them; bounded by round trips if asked for (`Tail`)."""
        steps = list(self.steps(stages))
        if trips:
            return float(tail(steps, self.count, [stage.in_flight for stage in stages]).latency)
        return latency(steps, self.count)

    def steps(self, stages: Sequence[Placed]) -> Iterator[Step]:
        """Execution and communication steps in order."""
        yield stages[0].step
        for before, stage in pairwise(stages):
            yield self.communication(before.devices, stage.devices, stage.layers[0])
            yield stage.step

    @cached_property
    def _room(self) -> np.ndarray:
        """The most rows that meet eq. 3, [device, micro-batches in flight - 1, stage]; -1 where weights don't fit."""
        stays, fixed, per_row = self._memory
        kept = np.arange(1, min(in_flight(len(self.rates) - 1), self.count) + 1)[:, None]
        each = np.where(per_row > 0, kept * per_row, 1.0)
        found = []
        for budget in self.tables.budgets:
            room = budget - stays - kept * fixed
            rows = np.where(per_row > 0, np.minimum(self.rows, room / each), self.rows)
            found.append(np.where(room < 0, -1, rows).astype(np.int32))
        return np.stack(found)

    def _most_rows(self, group: tuple[int, ...], cases: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """The most rows that meet eq. 3, [devices, cases]; -1 where not even the weights fit."""
        return self._room[np.array(group)[:, None], kept - 1, cases]

    def _short(self, group: tuple[int, ...], most: int) -> np.ndarray:
        """Of which stages a device has no memory for all rows, with so many micro-batches in flight."""
        least = min(group, key=self.tables.budgets.__getitem__)
        return self._room[least, most - 1] < self.rows

    def _hopeful(self, group: tuple[int, ...], limit: float) -> np.ndarray:
        """The stages on a group with which a round may take no longer than the limit: neither that of the stage, nor
        that of all other layers on all other devices. No device is faster with a row than with the best number of them.
        """
        if np.isinf(limit):
            return np.arange(self._first.size)
        kinds = self._kind[list(group)]
        others = np.bincount(self._kind, minlength=len(self._whole)) - np.bincount(kinds, minlength=len(self._whole))
        per_row = limit * (1 + ROUNDING) / (self.count * self.rows)
        within = 1 <= per_row * self._most_per_second[kinds].sum(axis=0)
        return np.flatnonzero(within & (self._outside <= per_row * (others @ self._whole)))

    def _fitting(self, group: tuple[int, ...], cases: np.ndarray, most: int, least: int = 0) -> np.ndarray:
        """The most micro-batches in flight, up to `most`, that the group has memory for; 0: it has for none. There is
        memory for `least`.

        The fewer, the less memory is needed: so they are found bit by bit.
        """
        kept = np.full(cases.size, least)
        for bit in reversed(range((most - least).bit_length())):
            tried = kept + (1 << bit)
            rows = self._most_rows(group, cases, np.minimum(tried, most))
            fits = (tried <= most) & (rows.min(axis=0) >= 0) & (rows.sum(axis=0) >= self.rows)
            kept = np.where(fits, tried, kept)
        return kept

    def _shared(self, group: tuple[int, ...], cases: np.ndarray, most: np.ndarray) -> Shares:
        """Algorithm 1: rows, [devices, cases]."""
        kinds = self._kind[list(group)]

        def seconds(devices: np.ndarray, chosen: np.ndarray, rows: np.ndarray) -> np.ndarray:
            forward, backward = self._seconds(kinds[devices], cases[chosen], rows)
            return forward + backward

        return shared(self.rows, self._capacity[kinds][:, cases], most, seconds if self.offload else None)

    def _slowest(self, group: tuple[int, ...], cases: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """E_f and E_b (eq. 8)."""
        forward, backward = self._seconds(self._kind[list(group)][:, None], cases, rows)
        return forward.max(axis=0), backward.max(axis=0)

    def _seconds(self, kinds: np.ndarray, cases: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Forward and backward seconds of so many rows."""
        at = (kinds * self._forward.shape[1] + rows) * self._forward.shape[2]
        first, last = at + self._first[cases], at + self._last[cases]
        return (
            self._forward.take(last) - self._forward.take(first),
            self._backward.take(last) - self._backward.take(first),
        )


def by_memory(tables: LayerTables) -> tuple[int, ...]:
    """Devices with the largest memory in front, which keep the most micro-batches in flight; then by speed."""
    devices = range(len(tables.devices))
    return tuple(sorted(devices, key=lambda d: (-tables.budgets[d], -tables.speeds[d], d)))
