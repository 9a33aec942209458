"""Asteroid's algorithms stage by stage, and plans one by one: what the planners for all at once are held against."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain as joined
from itertools import combinations

from harness.cluster import Cluster
from harness.costs import Affine, Costs
from harness.schedules import split_within
from systems.asteroid.equations import Step, in_flight, tail
from systems.asteroid.groups import Groups, Placed
from tests.harness.toys import chain, cluster

Seconds = Sequence[Sequence[float]]


def unequal(seed: int, count: int = 4, memory: bool = False) -> Cluster:
    """Devices of very different speed, behind links of different rate."""
    draw = random.Random(seed)
    found = cluster(count, speeds=tuple(draw.choice((1.0, 2.0, 3.5, 5.0)) for _ in range(count)))
    devices = tuple(
        replace(device, memory_bytes=draw.choice((40_000, 60_000, 90_000)) if memory else 10**12 + draw.randrange(9))
        for device in found.devices
    )
    return replace(found, devices=devices, bandwidth={d.name: draw.choice((2e4, 1e5, 1e6)) for d in devices})


def uneven(layers: int, seed: int) -> Costs:
    """Layers of different work and size."""
    draw, costs = random.Random(seed), chain(layers)
    units = tuple(
        replace(
            unit,
            forward=scaled(unit.forward, draw.uniform(0.2, 2)),
            backward=scaled(unit.backward, draw.uniform(0.2, 2)),
        )
        for unit in costs.units
    )
    parameters = {name: replace(p, numel=draw.choice((100, 1000, 5000))) for name, p in costs.parameters.items()}
    return replace(costs, key=f"uneven {layers} {seed}", units=units, parameters=parameters)


def scaled(work, by: float):  # type: ignore[no-untyped-def]
    return work._replace(matmul=Affine(work.matmul.fixed * by, work.matmul.per_row * by))


def offloaded(rows: Sequence[int], seconds: Seconds, most: Sequence[int]) -> list[int]:
    """The second part of algorithm 1: `seconds[d][y]` of y rows on device d."""
    found = list(rows)
    while True:
        times = [of[y] for of, y in zip(seconds, found, strict=True)]
        slowest = max(range(len(found)), key=times.__getitem__)
        others = [d for d in range(len(found)) if d != slowest and found[d] < most[d]]
        if not found[slowest] or not others:
            return found
        target = min(others, key=times.__getitem__)
        after = list(found)
        after[slowest] -= 1
        after[target] += 1
        if max(of[y] for of, y in zip(seconds, after, strict=True)) >= times[slowest]:
            return found
        found = after


class Plain:
    """Stages one by one, as `Groups` has them."""

    def __init__(self, groups: Groups) -> None:
        self.groups, self.tables = groups, groups.tables
        self.stage = cache(self._stage)
        self._passes = cache(lambda device, rows: self.tables.layer_seconds(device, rows))

    def _stage(self, layers: tuple[int, int], devices: tuple[int, ...], behind: int) -> Placed | None:
        """Where memory is short it keeps fewer micro-batches in flight, down to one."""
        devices = self.groups.sorted(devices)
        tried = (
            self._shared(layers, devices, kept) for kept in range(min(in_flight(behind), self.groups.count), 0, -1)
        )
        return next(filter(None, tried), None)

    def _shared(self, layers: tuple[int, int], devices: tuple[int, ...], kept: int) -> Placed | None:
        """Algorithm 1, with so many micro-batches in flight."""
        (first, last), total = layers, self.groups.rows
        most = [self._most_rows(layers, device, kept) for device in devices]
        if min(most) < 0:
            return None
        passes = [[self._passes(device, rows) for rows in range(total + 1)] for device in devices]
        forward = [[float(f[last] - f[first]) for f, _ in of] for of in passes]
        backward = [[float(b[last] - b[first]) for _, b in of] for of in passes]
        both = [[f + b for f, b in zip(*of, strict=True)] for of in zip(forward, backward, strict=True)]
        capacities = [1 / max(of[-1], 1e-12) if self.groups.by_speed else 1.0 for of in both]
        rows = split_within(total, capacities, most)
        if rows is None:
            return None
        if self.groups.offload:
            rows = offloaded(rows, both, most)
        step = Step(
            max(of[y] for of, y in zip(forward, rows, strict=True)),
            max(of[y] for of, y in zip(backward, rows, strict=True)),
            self._all_reduce(layers, devices),
        )
        return Placed(layers, devices, tuple(rows), kept, step)

    def _most_rows(self, layers: tuple[int, int], device: int, kept: int) -> int:
        stays, fixed, per_row = (part[layers] for part in self.tables.memory)
        room = self.tables.budgets[device] - stays - kept * fixed
        if room < 0:
            return -1
        return int(min(self.groups.rows, room / (kept * per_row))) if per_row else self.groups.rows

    def _all_reduce(self, layers: tuple[int, int], devices: Sequence[int]) -> float:
        units = self.tables.costs.layers
        _, trained = self.tables.costs.weight_bytes(units[layers[0]][0], units[layers[1] - 1][1])
        return 2 * (len(devices) - 1) * trained / (len(devices) * self.groups.rate(devices))


def with_trips(groups: Groups, stages: Sequence[Placed]) -> float:
    """Equations 4 to 6, and no less than the round trips of stages that follow one another, term by term."""
    steps, count = list(groups.steps(stages)), groups.count
    both = [step.both for step in steps]
    pipes = [count * each + sum(both[:s]) for s, each in enumerate(both)]
    for p, stage in enumerate(stages):
        pipes.append(count / stage.in_flight * sum(both[2 * p :]) + sum(both[: 2 * p]))
    return max(pipes) + max(step.all_reduce - sum(b.backward for b in steps[:s]) for s, step in enumerate(steps))


def algorithm_2(plain: Plain, order: Sequence[int], num_stages: int | None = None) -> tuple[Placed, ...] | None:
    """Q(l, n, p) state by state: of equal tails that with fewer layers, then fewer devices, behind the first stage."""
    groups, layers, devices = plain.groups, plain.tables.num_layers, len(order)
    reached = cache(lambda stages: float(tail(list(groups.steps(stages)), groups.count).latency))
    states: dict[tuple[int, int], tuple[Placed, ...]] = {(0, 0): ()}
    found: list[tuple[Placed, ...]] = []
    for p in range(1, min(layers, devices) + 1):
        following: dict[tuple[int, int], tuple[Placed, ...]] = {}
        for (length, n), behind in sorted(states.items()):
            for longer in range(length + 1, layers + 1):
                for more in range(n + 1, devices + 1):
                    group = tuple(order[devices - more : devices - n])
                    head = plain.stage((layers - longer, layers - length), group, p - 1)
                    if head is None or (p == 1) != (n == 0) or (p == 1) != (length == 0):
                        continue
                    whole = (head, *behind)
                    before = following.get((longer, more))
                    if before is None or reached(whole) < reached(before):
                        following[longer, more] = whole
        states = following
        if (layers, devices) in states and num_stages in (None, p):
            found.append(states[layers, devices])
    return min(found, key=reached, default=None)


def every(plain: Plain, order: Sequence[int], idle: bool = False) -> Iterator[tuple[Placed, ...]]:
    """All ways to cut the layers, and the order of the devices, into stages that fit; `idle`: devices may be left away
    between stages."""
    layers, devices = plain.tables.num_layers, len(order)

    def behind(first: int, place: int) -> Iterator[tuple[Placed, ...]]:
        if first == layers and (place == devices or idle):
            yield ()
            return
        for begin in range(place, devices if idle else min(place + 1, devices)):
            for last in range(first + 1, layers + 1):
                for end in range(begin + 1, devices + 1):
                    for rest in behind(last, end):
                        stage = plain.stage((first, last), tuple(order[begin:end]), len(rest))
                        if stage is not None:
                            yield (stage, *rest)

    return behind(0, 0)


def every_order(plain: Plain, idle: bool = False) -> Iterator[tuple[Placed, ...]]:
    """All ways to cut the layers into stages that fit, on groups of any devices."""
    layers, everybody = plain.tables.num_layers, frozenset(range(len(plain.tables.devices)))

    def behind(first: int, left: frozenset[int]) -> Iterator[tuple[Placed, ...]]:
        if first == layers and (idle or not left):
            yield ()
            return
        groups = joined.from_iterable(combinations(sorted(left), size) for size in range(1, len(left) + 1))
        for group in groups:
            for last in range(first + 1, layers + 1):
                for rest in behind(last, left - set(group)):
                    stage = plain.stage((first, last), group, len(rest))
                    if stage is not None:
                        yield (stage, *rest)

    return behind(0, everybody)
