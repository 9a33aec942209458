"""Asteroid's planner: stages, their groups of devices and the rows of each device (algorithms 1 and 2, as
re-implementations that agree have them).

Where the paper is silent: devices with as much memory stand in the order of speed, then of rank; blocks of one row are
offloaded; gradients and optimizer state count as this project's engine keeps them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from systems.asteroid import exact, heuristic
from systems.asteroid.families import Family, ends, everything, windows
from systems.asteroid.groups import ROUNDING, Groups, Placed, by_memory

#: How many pairs of sets of devices a search looks at to find the best of all orders: those of 8 devices that differ.
MOST_PAIRS = 3**8
#: With more, how many of them times layers it looks at in a round, and how many rounds there may be.
MOST_NEAR, MOST_ROUNDS = 2**17, 8
#: Before all orders, one in so many pairs is looked at: what is faster is found sooner, and the rest dropped sooner.
FEW = 16


@dataclass(frozen=True)
class Layout:
    """The stages of a plan, and its latency by equations 4 to 6; that of a search bounded by round trips (`Tail`)."""

    stages: tuple[Placed, ...]
    latency: float


class Planner:
    """Plans for devices that stand in `order`, by default with the largest memory in front.

    `exact`: no other way to cut the layers and the order into stages is faster, by these equations and shares; else as
    the paper has it. `idle`: devices may be left away between stages.
    """

    def __init__(
        self, groups: Groups, order: Sequence[int] | None = None, exact: bool = False, idle: bool = False
    ) -> None:
        self.groups, self.exact, self.idle = groups, exact, idle
        self.order = by_memory(groups.tables) if order is None else tuple(order)

    def best(self, num_stages: int | None = None) -> Layout | None:
        """The fastest layout on all devices of the order, of any number of stages or of so many; None: nothing fits."""
        ways = (False, True) if self.idle else (False,)  # to leave devices away can lead algorithm 2 astray
        tried = (heuristic.planned(self.groups, self.order, num_stages, idle) for idle in ways)
        found = min(filter(None, tried), key=self.groups.latency, default=None)
        if self.exact:
            limit = float("inf") if found is None else self.groups.latency(found)
            found = exact.fastest(self.groups, ends(self.order), limit, num_stages, self.idle) or found
        return None if found is None else Layout(tuple(found), self.groups.latency(found))


def searched(groups: Groups, idle: bool = False, most_pairs: int = MOST_PAIRS) -> Layout | None:
    """The fastest layout in any order of the devices, bounded by round trips. Where that is too many: in orders near to
    that by memory, speed or links. Round by round devices are taken from among the next few in the order of the fastest
    layout so far."""
    first, *others = _starts(groups)
    start = Planner(groups, first, idle=idle).best()
    best = None if start is None else Layout(start.stages, groups.latency(start.stages, trips=True))
    for order in (first, *others):
        best = _faster(groups, ends(order), best, idle) or best
    every = everything(first, groups.alike, most_pairs)
    if every is not None:
        few = _near(_order(best, first), groups.alike, every.num_pairs // FEW)
        return _faster(groups, every, best, idle, _faster(groups, few, best, idle)) or best
    for _ in range(MOST_ROUNDS):
        near = _near(_order(best, first), groups.alike, MOST_NEAR // groups.tables.num_layers)
        found = _faster(groups, near, best, idle)
        if found is None:
            break
        best = found
    return best


def _faster(
    groups: Groups, family: Family, best: Layout | None, idle: bool, other: Layout | None = None
) -> Layout | None:
    """The fastest layout of the family, if it is faster than the best one so far; it is as fast as some `other` one."""
    limit = min((layout.latency for layout in (best, other) if layout is not None), default=float("inf"))
    stages = exact.fastest(groups, family, limit, idle=idle, trips=True)
    found = None if stages is None else Layout(tuple(stages), groups.latency(stages, trips=True))
    return None if found is None or (best and found.latency >= best.latency * (1 - ROUNDING)) else found


def _starts(groups: Groups) -> Iterable[tuple[int, ...]]:
    """Orders by memory, and by speed and links in both directions."""
    tables = groups.tables
    devices = range(len(tables.devices))
    by_speed = tuple(sorted(devices, key=lambda d: (-tables.speeds[d], d)))
    by_rate = tuple(sorted(devices, key=lambda d: (-groups.rates[d], -tables.speeds[d], d)))
    return dict.fromkeys((by_memory(tables), by_speed, by_speed[::-1], by_rate, by_rate[::-1]))


def _order(layout: Layout | None, everybody: Sequence[int]) -> tuple[int, ...]:
    """Devices in the order of the stages; behind them those that have none."""
    busy = [device for stage in layout.stages for device in stage.devices] if layout else []
    return (*busy, *(device for device in everybody if device not in busy))


def _near(order: Sequence[int], alike: Sequence[int], most_pairs: int) -> Family:
    """The widest windows of the order that make so many pairs of sets."""
    found, width = ends(order), 2
    while width <= len(order) and len(order) << width <= most_pairs:
        wider = windows(order, alike, width)
        if wider.num_pairs > most_pairs:
            break
        found, width = wider, width + 1
    return found
