"""The fastest stages there are by equations 4 to 6, of all that a family of sets of devices allows.

Of every set and first layer all tails are kept that can be best for what comes in front: no other one has both a
shorter pipe and less to reduce, among those with as slow a link and with as many stages, where that makes a difference.
What is in front takes some time, whatever it is: tails that with it are slower than what is known are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from sys import float_info

import numpy as np

from systems.asteroid.equations import Tail
from systems.asteroid.families import Family
from systems.asteroid.groups import Groups, Placed

#: By how much the bounds may be off because sums are rounded.
ROUNDING = 1e-9


def fastest(
    groups: Groups, family: Family, limit: float, num_stages: int | None = None, idle: bool = False
) -> list[Placed] | None:
    """The stages of least latency, in so many or in any number; None where none are as fast as `limit`, in seconds.

    With `idle` devices may be left away.
    """
    search = _Search(groups, family, min(limit * (1 + ROUNDING), float_info.max), num_stages, idle)
    for members in range(1, len(family.sets)):
        search.extend(members)
    return search.best()


@dataclass(frozen=True)
class _Tails:
    """Tails on a set of devices, one or more: first layer, number of stages, slowest link of the group in front, pipe
    and reduce; and how they began: on the devices that set `made` has more than set `rest`, before tail `of` of that.
    """

    first: np.ndarray
    stages: np.ndarray
    rate: np.ndarray
    pipe: np.ndarray
    reduce: np.ndarray
    made: np.ndarray
    rest: np.ndarray
    of: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> _Tails:
        return _Tails(*(getattr(self, part.name)[chosen] for part in fields(self)))

    @staticmethod
    def together(parts: Sequence[_Tails]) -> _Tails:
        return _Tails(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(_Tails)))


class _Search:
    def __init__(self, groups: Groups, family: Family, limit: float, num_stages: int | None, idle: bool) -> None:
        self.groups, self.family, self.limit, self.num_stages, self.idle = groups, family, limit, num_stages, idle
        self.layers = groups.tables.num_layers
        self.most = min(self.layers, len(family.order)) if num_stages is None else num_stages
        self.levels = self._levels()
        self.least_both, self.least_forward = self._in_front()
        none, nothing = np.zeros(1, dtype=np.int64), np.zeros(1)
        empty = _Tails(none + self.layers, none, nothing + np.inf, nothing, nothing, none, none, none)
        self.tails: list[_Tails] = [empty]

    def _behind(self, rest: int) -> int:
        """The most stages that a set of devices can make behind another one."""
        return min(self.family.sets[rest].bit_count(), self.most - 1)

    def _levels(self) -> np.ndarray:
        """A number for each number of stages behind a stage: the same one where that makes no difference."""
        if self.num_stages is not None:
            return np.arange(self.most + 1)
        new = np.zeros(self.most + 1, dtype=bool)
        for members, smaller in enumerate(self.family.smaller):
            for rest in smaller:
                group = self.family.group(members, rest)
                stages = [self.groups.stages(group, behind) for behind in range(self._behind(rest) + 1)]
                for behind in range(1, len(stages)):
                    new[behind] |= stages[behind] is not stages[behind - 1]
        return np.cumsum(new)

    def _in_front(self) -> tuple[np.ndarray, np.ndarray]:
        """The least E_f + E_b, and E_f, of all steps in front, [set, first layer]: infinite where they take longer than
        the limit in a round of their own."""
        groups, count = self.groups, self.groups.count
        both, forward, longest = (np.full((len(self.family.smaller), self.layers + 1), np.inf) for _ in range(3))
        both[-1, 0] = forward[-1, 0] = longest[-1, 0] = 0.0
        sent = groups.sent / max(groups.rates)
        exchanged = sent + groups.returned / max(groups.rates)
        for members in reversed(range(len(self.family.smaller))):
            late = np.maximum(both[members], longest[members]) > self.limit
            both[members, late] = forward[members, late] = longest[members, late] = np.inf
            if late.all():
                continue
            for rest in self.family.smaller[members]:
                group = self.family.group(members, rest)
                for stages in dict.fromkeys(groups.stages(group, behind) for behind in range(self._behind(rest) + 1)):
                    of_stage = groups.table(stages.forward + stages.backward)
                    for least, step, between in (
                        (both, of_stage, exchanged),
                        (forward, groups.table(stages.forward), sent),
                    ):
                        reached = (least[members, :-1, None] + step).min(axis=0) + between
                        least[rest] = np.minimum(least[rest], reached)
                    reached = np.maximum(longest[members, :-1, None], count * of_stage).min(axis=0)
                    longest[rest] = np.minimum(longest[rest], np.maximum(reached, count * exchanged))
                if self.idle and len(group) == 1:
                    for least in (both, forward, longest):
                        least[rest] = np.minimum(least[rest], least[members])
        return both, forward

    def extend(self, members: int) -> None:
        """All tails on a set of devices that are worth to be kept, from those on smaller ones."""
        found = [self.tails[0][np.zeros(0, dtype=np.int64)]]
        if np.isfinite(self.least_both[members]).any():
            for rest in self.family.smaller[members]:
                group, tails = self.family.group(members, rest), self.tails[rest]
                levels = self.levels[tails.stages]
                for level in np.unique(levels[tails.stages < self.most]):
                    found.append(self._headed(members, rest, group, np.flatnonzero(levels == level)))
                if self.idle and len(group) == 1:
                    found.append(tails[self._worth(members, tails.first, Tail(tails.pipe, tails.reduce))])
        self.tails.append(self._best(_Tails.together(found)))

    def _headed(self, members: int, rest: int, group: tuple[int, ...], which: np.ndarray) -> _Tails:
        """Tails of equal level with a stage on the group in front."""
        groups, tails = self.groups, self.tails[rest][which]
        stages = groups.stages(group, int(tails.stages[0]))
        rate = np.minimum(groups.rate(group), tails.rate)
        sent, returned = groups.sent[tails.first] / rate, groups.returned[tails.first] / rate
        tail = Tail(tails.pipe, tails.reduce).behind(sent, returned, 0.0, groups.count)
        forward, backward, all_reduce = (
            table[:, tails.first]
            for table in (groups.table(stages.forward), groups.table(stages.backward), groups.all_reduce(group))
        )
        tail = tail.behind(forward, backward, all_reduce, groups.count)
        first, of = np.nonzero(self._worth(members, np.arange(self.layers)[:, None], tail))
        new = np.zeros_like(first)
        return _Tails(
            first,
            tails.stages[of] + 1,
            np.full(first.size, groups.rate(group)),
            tail.pipe[first, of],
            tail.reduce[first, of],
            new + members,
            new + rest,
            which[of],
        )

    def _worth(self, members: int, first: np.ndarray, tail: Tail) -> np.ndarray:
        """Whether a tail can be as fast as the limit, with what has to be in front."""
        in_time = tail.pipe + self.least_both[members][first] <= self.limit
        return in_time & (tail.latency + self.least_forward[members][first] <= self.limit)

    def _best(self, tails: _Tails) -> _Tails:
        """Those with the least to reduce of all that have no longer pipe, among those that are alike in all else."""
        levels = self.levels[tails.stages]
        order = np.lexsort((tails.reduce, tails.pipe, tails.rate, levels, tails.first))
        tails, levels = tails[order], levels[order]
        if not order.size:
            return tails
        keys = np.stack([tails.first, levels, tails.rate])
        other = np.concatenate(([0], np.cumsum((keys[:, 1:] != keys[:, :-1]).any(axis=0))))
        reduce = np.unique(tails.reduce, return_inverse=True)[1] - order.size * other  # begins anew with every key
        least = np.minimum.accumulate(reduce)
        return tails[np.flatnonzero(np.concatenate(([True], reduce[1:] < least[:-1])))]

    def best(self) -> list[Placed] | None:
        """The fastest of the whole model on all devices."""
        tails = self.tails[-1]
        whole = tails.first == 0
        if self.num_stages is not None:
            whole &= tails.stages == self.num_stages
        if not whole.any():
            return None
        at = int(np.argmin(np.where(whole, tails.pipe + tails.reduce, np.inf)))
        found = []
        while tails.stages[at]:
            made, rest, of = int(tails.made[at]), int(tails.rest[at]), int(tails.of[at])
            behind = self.tails[rest]
            layers = int(tails.first[at]), int(behind.first[of])
            stage = self.groups.stage(layers, self.family.group(made, rest), int(behind.stages[of]))
            assert stage is not None
            found.append(stage)
            tails, at = behind, of
        return found
