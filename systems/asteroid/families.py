"""In which groups, and in which order of them, devices may come to stages.

A *family* is a set of sets of devices: those that may be left for the last stages. A stage has what one of them has
more than another one. With the ends of an order these are its consecutive groups; with all sets, all groups in all
orders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain as joined
from itertools import product
from math import prod

import numpy as np


@dataclass(frozen=True)
class Pairs:
    """Sets and smaller ones, and the groups that these have more, by number, [pairs]; set i begins at `begin[i]`."""

    members: np.ndarray
    rest: np.ndarray
    group: np.ndarray
    begin: np.ndarray


@dataclass(frozen=True)
class Family:
    """Sets of devices, from none to all in the order of their size, as bits: that of each device by its place in
    `order`. Of devices that are alike a set has those that come last."""

    order: tuple[int, ...]
    sets: tuple[int, ...]

    @cached_property
    def smaller(self) -> list[list[int]]:
        """Of every set, by number, those that it has all devices of, and more."""
        return [[j for j in range(i) if not self.sets[j] & ~self.sets[i]] for i in range(len(self.sets))]

    @property
    def num_pairs(self) -> int:
        """Of a set and a smaller one: a group with what may be behind it."""
        return sum(map(len, self.smaller))

    @cached_property
    def groups(self) -> list[tuple[int, ...]]:
        """The devices of every group that there is, by number."""
        return [
            tuple(device for place, device in enumerate(self.order) if group >> place & 1) for group in self._numbers
        ]

    @cached_property
    def by_size(self) -> list[int]:
        """The first set of each size from one device on, and how many sets there are."""
        sizes = [members.bit_count() for members in self.sets]
        return [*(i for i in range(1, len(sizes)) if sizes[i] > sizes[i - 1]), len(sizes)]

    @cached_property
    def pairs(self) -> Pairs:
        numbers, counts = self._numbers, list(map(len, self.smaller))
        members = np.repeat(np.arange(len(self.sets)), counts)
        rest = np.array(list(joined.from_iterable(self.smaller)), dtype=np.int64)
        groups = [numbers[self.sets[i] & ~self.sets[j]] for i, j in zip(members, rest, strict=True)]
        return Pairs(members, rest, np.array(groups, dtype=np.int64), np.cumsum([0, *counts]))

    @cached_property
    def _numbers(self) -> dict[int, int]:
        """Every group, as bits, with its number."""
        found = dict.fromkeys(self.sets[i] & ~self.sets[j] for i, smaller in enumerate(self.smaller) for j in smaller)
        return {group: number for number, group in enumerate(found)}


def ends(order: Sequence[int]) -> Family:
    """The last devices of an order: 0, 1, ... of them."""
    return _family(order, (_bits(range(first, len(order))) for first in range(len(order) + 1)))


def windows(order: Sequence[int], alike: Sequence[int], width: int) -> Family:
    """What is left of an order when its devices are taken one by one, each from the first `width` that are there.

    `alike`: of each device the first one that it is exchangeable with.
    """
    places = _places(order, alike)

    def found() -> Iterator[int]:
        yield 0
        for first in range(len(order)):
            near, far = range(first + 1, min(first + width, len(order))), range(first + width, len(order))
            for chosen in range(1 << len(near)):
                members = _bits((first, *far)) | chosen << first + 1
                yield _last(places, [sum(members >> place & 1 for place in each) for each in places])

    return _family(order, found())


def everything(order: Sequence[int], alike: Sequence[int], most_pairs: int) -> Family | None:
    """All sets; None where these make more pairs."""
    places = _places(order, alike)
    counts = [range(len(each) + 1) for each in places]
    if prod((len(each) + 1) * len(each) // 2 for each in counts) > most_pairs:
        return None
    return _family(order, (_last(places, chosen) for chosen in product(*counts)))


def _family(order: Sequence[int], sets: Iterator[int]) -> Family:
    return Family(tuple(order), tuple(sorted(set(sets), key=lambda members: (members.bit_count(), members))))


def _places(order: Sequence[int], alike: Sequence[int]) -> list[list[int]]:
    """Places in the order of devices that are alike."""
    found: dict[int, list[int]] = {}
    for place, device in enumerate(order):
        found.setdefault(alike[device], []).append(place)
    return list(found.values())


def _last(places: Sequence[Sequence[int]], counts: Sequence[int]) -> int:
    """The set with so many devices of each kind."""
    return sum(_bits(each[len(each) - count :]) for each, count in zip(places, counts, strict=True))


def _bits(places: Sequence[int]) -> int:
    return sum(1 << place for place in places)
