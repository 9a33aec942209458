"""Asteroid's planner: stages, their groups of devices and the rows of each device (algorithms 1 and 2, as
re-implementations that agree have them).

Devices stand in an order, and a stage has consecutive ones. From the back: Q(l, n, p) is the least latency of the last
l layers on the last n devices in p stages. A stage with k behind it keeps 2k+1 micro-batches in flight, or as many as
the round has, or as its devices have memory for.

Where the paper is silent: devices with as much memory stand in the order of speed, then of rank; blocks of one row are
offloaded; gradients and optimizer state count as this project's engine keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from harness.layer_tables import LayerTables
from systems.asteroid.equations import Step, Tail, in_flight, latency
from systems.asteroid.shares import balanced, offloaded

#: Layers that take less time are taken to take this: they may have nothing to compute.
NO_TIME_S = 1e-12


@dataclass(frozen=True)
class Placed:
    """A stage: layers [first, last) on devices, by number, each with so many rows of a micro-batch."""

    layers: tuple[int, int]
    devices: tuple[int, ...]
    rows: tuple[int, ...]
    in_flight: int
    step: Step


@dataclass(frozen=True)
class Layout:
    """The stages of a plan, and its latency by equations 4 to 6."""

    stages: tuple[Placed, ...]
    latency: float


class Groups:
    """What a stage on a group of devices comes to, for `count` micro-batches of `rows` rows. Devices are numbered as in
    `tables`. `offload`: the second part of algorithm 1. `by_speed`: the first one, or else equal shares.

    The same for every order of devices, so that planners for several orders share one.
    """

    def __init__(self, tables: LayerTables, rows: int, count: int, offload: bool = True, by_speed: bool = True) -> None:
        self.tables, self.rows, self.count, self.offload = tables, rows, count, offload
        self.by_speed = by_speed
        self._stages: dict[tuple[tuple[int, int], tuple[int, ...], int], Placed | None] = {}
        self._passes: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def stage(self, layers: tuple[int, int], devices: tuple[int, ...], behind: int) -> Placed | None:
        """The stage on these devices, with so many stages behind it; None: it does not fit.

        Where memory is short it keeps fewer micro-batches in flight, down to one.
        """
        most = min(in_flight(behind), self.count)
        key = (layers, devices, most)
        if key not in self._stages:
            tried = (self._shared(layers, devices, kept) for kept in range(most, 0, -1))
            self._stages[key] = next((stage for stage in tried if stage is not None), None)
        return self._stages[key]

    def _shared(self, layers: tuple[int, int], devices: tuple[int, ...], kept: int) -> Placed | None:
        """Algorithm 1, with so many micro-batches in flight."""
        most = [self._most_rows(layers, device, kept) for device in devices]
        if min(most) < 0:
            return None
        forward, backward = zip(*(self._seconds(layers, device) for device in devices), strict=True)
        both = [f + b for f, b in zip(forward, backward, strict=True)]
        capacities = [1 / max(float(of[-1]), NO_TIME_S) if self.by_speed else 1.0 for of in both]  # eq. 9
        rows = balanced(self.rows, capacities, most)
        if rows is None:
            return None
        if self.offload:
            rows = offloaded(rows, both, most)
        step = Step(
            max(float(of[y]) for of, y in zip(forward, rows, strict=True)),  # eq. 8
            max(float(of[y]) for of, y in zip(backward, rows, strict=True)),
            self._all_reduce(layers, devices),
        )
        return Placed(layers, devices, tuple(rows), kept, step)

    def _seconds(self, layers: tuple[int, int], device: int) -> tuple[np.ndarray, np.ndarray]:
        """Forward and backward seconds of the layers for 0, 1, ... rows."""
        if device not in self._passes:
            each = [self.tables.layer_seconds(device, rows) for rows in range(self.rows + 1)]
            self._passes[device] = np.stack([f for f, _ in each]), np.stack([b for _, b in each])
        first, last = layers
        forward, backward = self._passes[device]
        return forward[:, last] - forward[:, first], backward[:, last] - backward[:, first]

    def _most_rows(self, layers: tuple[int, int], device: int, kept: int) -> int:
        """The most rows that meet eq. 3; -1 where not even the weights fit."""
        stays, fixed, per_row = (part[layers] for part in self.tables.memory)
        room = self.tables.budgets[device] - stays - kept * fixed
        if room < 0:
            return -1
        return int(min(self.rows, room / (kept * per_row))) if per_row else self.rows

    def _all_reduce(self, layers: tuple[int, int], devices: Sequence[int]) -> float:
        """T_a of eq. 5: a ring over the gradients of what is trained."""
        if len(devices) == 1:
            return 0.0
        units = self.tables.costs.layers
        _, trained = self.tables.costs.weight_bytes(units[layers[0]][0], units[layers[1] - 1][1])
        return 2 * (len(devices) - 1) * trained / (len(devices) * self._rate(devices))

    def communication(self, before: Sequence[int], after: Sequence[int], cut: int) -> Step:
        """The step between two groups: each direction takes what the slowest link needs for the whole micro-batch."""
        costs = self.tables.costs
        tensors = [costs.tensors[name] for name in costs.carried(costs.layers[cut][0])]
        forward = sum(tensor.bytes(self.rows) for tensor in tensors)
        backward = sum(tensor.bytes(self.rows) for tensor in tensors if tensor.needs_grad)
        rate = self._rate((*before, *after))
        return Step(forward / rate, backward / rate)

    def _rate(self, devices: Sequence[int]) -> float:
        """Bytes per second of the slowest link between these devices."""
        return min(self.tables.cluster.bandwidth[self.tables.devices[device].name] for device in devices)


class Planner:
    """Plans for devices that stand in `order`, by default with the largest memory in front.

    `exact`: of every state keep all tails that can be best for what comes in front, not the one that is best by itself:
    then no other way to cut the layers and the order into stages is faster, by these equations and shares.
    """

    def __init__(self, groups: Groups, order: Sequence[int] | None = None, exact: bool = False) -> None:
        self.groups, self.tables, self.count = groups, groups.tables, groups.count
        self.order = by_memory(self.tables) if order is None else tuple(order)
        self.exact = exact

    def best(self, num_stages: int | None = None) -> Layout | None:
        """The fastest layout on all devices of the order, of any number of stages or of so many; None: nothing fits."""
        found: list[Layout] = []
        layers, devices = self.tables.num_layers, len(self.order)
        tails: dict[tuple[int, int], list[_Partial]] = {}
        for p in range(1, min(layers, devices) + 1):
            tails = self._extended(tails, p)
            if num_stages in (None, p):
                found += [Layout(t.stages, self.latency(t.stages)) for t in tails.get((layers, devices), ())]
        return min(found, key=lambda layout: layout.latency, default=None)

    def latency(self, stages: Sequence[Placed]) -> float:
        """Equations 4 to 6 of these stages and the steps between them."""
        return latency(list(self.steps(stages)), self.count)

    def steps(self, stages: Sequence[Placed]) -> Iterator[Step]:
        """Execution and communication steps in order."""
        yield stages[0].step
        for before, stage in pairwise(stages):
            yield self.groups.communication(before.devices, stage.devices, stage.layers[0])
            yield stage.step

    def _extended(self, tails: dict[tuple[int, int], list[_Partial]], p: int) -> dict[tuple[int, int], list[_Partial]]:
        """Q(l, n, p) for all l and n, from Q(l, n, p - 1)."""
        layers, devices = self.tables.num_layers, len(self.order)
        found: dict[tuple[int, int], list[_Partial]] = {}
        if p == 1:
            for length in range(1, layers + 1):
                for n in range(1, devices + 1):
                    stage = self.groups.stage((layers - length, layers), self.order[devices - n :], 0)
                    if stage is not None:
                        alone = Tail(self.count * stage.step.both, stage.step.all_reduce)
                        found[length, n] = [_Partial((stage,), alone)]
            return found
        for (length, n), behind in tails.items():
            for longer in range(length + 1, layers + 1):
                for more in range(n + 1, devices + 1):
                    group = self.order[devices - more : devices - n]
                    head = self.groups.stage((layers - longer, layers - length), group, p - 1)
                    if head is not None:
                        found.setdefault((longer, more), []).extend(self._headed(head, tail) for tail in behind)
        return {state: self._kept(partials) for state, partials in found.items()}

    def _headed(self, head: Placed, behind: _Partial) -> _Partial:
        between = self.groups.communication(head.devices, behind.stages[0].devices, head.layers[1])
        tail = behind.tail.behind(between, self.count).behind(head.step, self.count)
        return _Partial((head, *behind.stages), tail)

    def _kept(self, partials: list[_Partial]) -> list[_Partial]:
        if not self.exact:
            return [min(partials, key=lambda partial: partial.tail.latency)]
        kept: list[_Partial] = []
        for partial in sorted(partials, key=lambda partial: (partial.tail.pipe, partial.tail.reduce)):
            first = partial.stages[0].devices
            if all(other.tail.reduce > partial.tail.reduce or other.stages[0].devices != first for other in kept):
                kept.append(partial)
        return kept


@dataclass(frozen=True)
class _Partial:
    """The last stages of a layout."""

    stages: tuple[Placed, ...]
    tail: Tail


def by_memory(tables: LayerTables) -> tuple[int, ...]:
    """Devices with the largest memory in front, which keep the most micro-batches in flight; then by speed."""
    devices = range(len(tables.devices))
    return tuple(sorted(devices, key=lambda d: (-tables.budgets[d], -tables.speeds[d], d)))


def searched(groups: Groups) -> Layout | None:
    """The fastest layout that the exact program finds in orders reached from that by memory, and from that by speed, by
    exchanging two devices at a time while that helps."""
    tables = groups.tables
    best: Layout | None = None
    speed = tuple(sorted(range(len(tables.devices)), key=lambda d: (-tables.speeds[d], d)))
    for start in dict.fromkeys((by_memory(tables), speed, speed[::-1])):
        found = _climbed(groups, start)
        if found is not None and (best is None or found.latency < best.latency):
            best = found
    return best


def _climbed(groups: Groups, order: tuple[int, ...]) -> Layout | None:
    best = Planner(groups, order, exact=True).best()
    improved = True
    while improved:
        improved = False
        for i in range(len(order)):
            for j in range(i + 1, len(order)):
                if _alike(groups.tables, order[i], order[j]):
                    continue
                swapped = list(order)
                swapped[i], swapped[j] = swapped[j], swapped[i]
                found = Planner(groups, swapped, exact=True).best()
                if found is not None and (best is None or found.latency < best.latency * (1 - 1e-9)):
                    best, order, improved = found, tuple(swapped), True
    return best


def _alike(tables: LayerTables, one: int, other: int) -> bool:
    """Whether it makes no difference which of the two devices stands where."""
    bandwidth, devices = tables.cluster.bandwidth, tables.devices
    return (tables.kinds[one], tables.budgets[one], bandwidth[devices[one].name]) == (
        tables.kinds[other],
        tables.budgets[other],
        bandwidth[devices[other].name],
    )
