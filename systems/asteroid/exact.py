"""The fastest stages there are by equations 4 to 6, of all that a family of sets of devices allows.

Of every set and first layer all tails are kept that can be best for what comes in front: no other one has both a
shorter pipe and less to reduce, among those with as slow a link and with as many stages, where that makes a difference;
and a shorter trip, where round trips count.
What is in front takes some time, whatever it is: tails that with it are slower than what is known are dropped. Sets of
as many devices are looked at together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from sys import float_info

import numpy as np

from systems.asteroid.equations import Tail
from systems.asteroid.families import Family
from systems.asteroid.groups import ROUNDING, Groups, Placed, Stages

#: How many tails are looked at together.
AT_ONCE = 2**16
#: With how many others a tail is compared, at most, where round trips count.
COMPARED = 16


def fastest(
    groups: Groups,
    family: Family,
    limit: float,
    num_stages: int | None = None,
    idle: bool = False,
    trips: bool = False,
) -> list[Placed] | None:
    """The stages of least latency, in so many or in any number; None where none are as fast as `limit`, in seconds.

    With `idle` devices may be left away. With `trips` latency is bounded by round trips.
    """
    search = _Search(groups, family, limit * (1 + ROUNDING), num_stages, idle, trips)
    for begin, end in pairwise(family.by_size):
        search.extend(begin, end)
    return search.best()


@dataclass(frozen=True)
class _Tails:
    """Tails on sets of devices: first layer, number of stages, slowest link of the group in front, pipe, reduce and
    trip; and how they began: with a stage on `group`, by number, in front of the tail that is number `of` of all.
    """

    members: np.ndarray
    first: np.ndarray
    stages: np.ndarray
    rate: np.ndarray
    pipe: np.ndarray
    reduce: np.ndarray
    trip: np.ndarray
    group: np.ndarray
    of: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> _Tails:
        return _Tails(*(getattr(self, part.name)[chosen] for part in fields(self)))

    @property
    def tail(self) -> Tail:
        return Tail(self.pipe, self.reduce, self.trip)

    @staticmethod
    def together(parts: Sequence[_Tails]) -> _Tails:
        return _Tails(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(_Tails)))


class _Search:
    def __init__(
        self, groups: Groups, family: Family, limit: float, num_stages: int | None, idle: bool, trips: bool
    ) -> None:
        self.groups, self.family, self.num_stages, self.idle = groups, family, num_stages, idle
        self.limit = min(limit, float_info.max)
        self.layers = groups.tables.num_layers
        self.most = min(self.layers, len(family.order)) if num_stages is None else num_stages
        self.made = self._made(limit)
        #: Whether there are stages for which round trips count.
        self.trips = trips and any((of.num_trips > 1).any() for made in self.made for of in made)
        self.levels = self._levels()
        self.rates = np.array([groups.rate(group) for group in family.groups])
        self.sizes = np.array([len(group) for group in family.groups])
        both, forward = self._least(lambda of: of.forward + of.backward), self._least(lambda of: of.forward)
        self.least_both, self.least_forward, self.with_both, self.with_forward = self._in_front(both, forward)
        #: The first layers with which stages may begin, [group, last layer + 1], and what is in front may end, [set].
        self.stage_begins, self.stage_ends = _finite(both)
        self.front_begins, self.front_ends = _finite(self.least_both)
        none, nothing = np.zeros(1, dtype=np.int64), np.zeros(1)
        self.tails = _Tails(none, none + self.layers, none, nothing + np.inf, nothing, nothing, nothing, none, none)
        #: Of every set, and of the next one, the number of its first tail.
        self.begin = np.array([0, 1])

    def _made(self, limit: float) -> list[list[Stages]]:
        """Of every group its stages, with so many behind as devices for them can be."""
        pairs = self.family.pairs
        behind = np.zeros(len(self.family.groups), dtype=np.int64)
        np.maximum.at(behind, pairs.group, [self.family.sets[rest].bit_count() for rest in pairs.rest])
        return [
            [self.groups.stages(group, b, limit) for b in range(min(most, self.most - 1) + 1)]
            for group, most in zip(self.family.groups, behind.tolist(), strict=True)
        ]

    def _levels(self) -> np.ndarray:
        """A number for each number of stages behind a stage: the same one where that makes no difference."""
        if self.num_stages is not None:
            return np.arange(self.most + 1)
        new = np.zeros(self.most + 1, dtype=bool)
        for stages in self.made:
            for behind in range(1, len(stages)):
                of, fewer = stages[behind], stages[behind - 1]
                new[behind] |= of is not fewer if self.trips else of.forward is not fewer.forward
        return np.cumsum(new)

    def _least(self, seconds: Callable[[Stages], np.ndarray]) -> np.ndarray:
        """With any number of stages behind, [group, first layer, last layer + 1]."""
        return np.stack([self.groups.table(np.minimum.reduce([*map(seconds, set(made))])) for made in self.made])

    def _in_front(
        self, stage_both: np.ndarray, stage_forward: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The least E_f + E_b, and E_f, of all steps in front, [set, first layer]: infinite where they take longer than
        the limit in a round of their own. And both with the stage between a set and a smaller one, [pair, last layer +
        1]."""
        groups, count, pairs = self.groups, self.groups.count, self.family.pairs
        both, forward, longest = (np.full((len(self.family.sets), self.layers + 1), np.inf) for _ in range(3))
        both[-1, 0] = forward[-1, 0] = longest[-1, 0] = 0.0
        with_both, with_forward = (np.full((pairs.group.size, self.layers + 1), np.inf) for _ in range(2))
        sent = groups.sent / max(groups.rates)
        exchanged = sent + groups.returned / max(groups.rates)
        for members in reversed(range(1, len(self.family.sets))):
            late = np.maximum(both[members], longest[members]) > self.limit
            both[members, late] = forward[members, late] = longest[members, late] = np.inf
            firsts = np.flatnonzero(~late[:-1])
            if not firsts.size:
                continue
            at = slice(*pairs.begin[members : members + 2])
            rests, heads = pairs.rest[at], pairs.group[at]
            step_both, step_forward = stage_both[heads[:, None], firsts], stage_forward[heads[:, None], firsts]
            with_both[at] = (both[members, firsts, None] + step_both).min(axis=1)
            with_forward[at] = (forward[members, firsts, None] + step_forward).min(axis=1)
            slowest = np.maximum(longest[members, firsts, None], count * step_both).min(axis=1)
            for least, reached in (
                (both, with_both[at] + exchanged),
                (forward, with_forward[at] + sent),
                (longest, np.maximum(slowest, count * exchanged)),
            ):
                least[rests] = np.minimum(least[rests], reached)
            if self.idle:
                one = rests[self.sizes[heads] == 1]
                for least in (both, forward, longest):
                    least[one] = np.minimum(least[one], least[members])
        return both, forward, with_both, with_forward

    def extend(self, begin: int, end: int) -> None:
        """All tails on sets of devices, from number `begin` to `end`, that are worth to be kept, from those on smaller
        ones."""
        pair, of = self._pairs(begin, end)
        behind = self._behind(pair, of)
        num_heads = int(behind.first.sum())
        parts = np.array_split(np.arange(behind.first.size), 1 + num_heads // AT_ONCE)
        found = [self._headed(behind[part]) for part in parts]
        if self.idle:
            alone = self.sizes[self.family.pairs.group[pair]] == 1
            tails = replace(self.tails[of[alone]], members=self.family.pairs.members[pair[alone]])
            found.append(tails[self._worth(tails.members, tails.first, tails.tail)])
        new = self._best(_Tails.together(found))
        ends = np.searchsorted(new.members, np.arange(begin, end), side="right")
        self.begin = np.concatenate((self.begin, self.begin[-1] + ends))
        self.tails = _Tails.together([self.tails, new])

    def _pairs(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """All pairs of the sets and a smaller one, with each tail on that: by number."""
        pairs = self.family.pairs
        numbers = np.arange(pairs.begin[begin], pairs.begin[end])
        first = self.begin[pairs.rest[numbers]]
        sizes = self.begin[pairs.rest[numbers] + 1] - first
        return np.repeat(numbers, sizes), _ranges(first, sizes)

    def _behind(self, pair: np.ndarray, of: np.ndarray) -> _Tails:
        """Tails with the communication step in front, before which a stage on `group` may be worth it; in the order of
        groups and stages."""
        groups, tails = self.groups, self.tails
        able = tails.stages[of] < self.most
        pair, of = pair[able], of[able]
        first, group = tails.first[of], self.family.pairs.group[pair]
        rate = np.minimum(self.rates[group], tails.rate[of])
        sent, returned = groups.sent[first] / rate, groups.returned[first] / rate
        tail = tails.tail[of].behind(sent, returned, 0.0, groups.count)
        worth = tail.pipe + self.with_both[pair, first] <= self.limit
        worth &= tail.latency + self.with_forward[pair, first] <= self.limit
        stages, members = tails.stages[of], self.family.pairs.members[pair]
        found = _Tails(members, first, stages, rate, tail.pipe, tail.reduce, tail.trip, group, of)[worth]
        return found[np.lexsort((found.stages, found.group))]

    def _headed(self, tails: _Tails) -> _Tails:
        """Tails with a stage in front, that begins with any layer."""
        groups = self.groups
        begin = np.maximum(self.stage_begins[tails.group, tails.first], self.front_begins[tails.members])
        end = np.minimum(self.stage_ends[tails.group, tails.first], self.front_ends[tails.members])
        sizes = np.maximum(end - begin, 0)
        which, first = np.repeat(np.arange(sizes.size), sizes), _ranges(begin, sizes)
        group, last, members = tails.group[which], tails.first[which], tails.members[which]
        forward, backward, num_trips = self._made_of(group, tails.stages[which], groups.case(first, last))
        size, rate = self.sizes[group], self.rates[group]
        all_reduce = 2 * (size - 1) * groups.tables.weight_bytes[1][first, last] / (size * rate)
        tail = tails.tail[which].behind(forward, backward, all_reduce, groups.count)
        if self.trips:
            tail = tail.returning(num_trips)
        worth = np.flatnonzero(self._worth(members, first, tail))
        found, tail = tails[which[worth]], tail[worth]
        found = replace(found, first=first[worth], stages=found.stages + 1, rate=rate[worth])
        return replace(found, pipe=tail.pipe, reduce=tail.reduce, trip=tail.trip)

    def _made_of(self, group: np.ndarray, behind: np.ndarray, case: np.ndarray) -> np.ndarray:
        """E_f, E_b and the number of round trips, [3, stages], of stages on groups, by number, with so many behind: in
        runs of those that are alike in both."""
        found = np.zeros((3, group.size))
        begins = np.flatnonzero(np.diff(group, prepend=-1) | np.diff(behind, prepend=-1))
        for begin, end in pairwise((*begins.tolist(), group.size)):
            stages, cases = self.made[group[begin]][behind[begin]], case[begin:end]
            found[0, begin:end] = stages.forward.take(cases)
            found[1, begin:end] = stages.backward.take(cases)
            if self.trips:
                found[2, begin:end] = stages.num_trips.take(cases)
        return found

    def _worth(self, members: np.ndarray, first: np.ndarray, tail: Tail) -> np.ndarray:
        """Whether a tail can be as fast as the limit, with what has to be in front."""
        in_time = tail.pipe + self.least_both[members, first] <= self.limit
        return in_time & (tail.latency + self.least_forward[members, first] <= self.limit)

    def _best(self, tails: _Tails) -> _Tails:
        """Those with the least to reduce of all that have no longer pipe, among those that are alike in all else; where
        round trips count, more than those."""
        rates = np.unique(tails.rate, return_inverse=True)[1]
        key = (tails.members * (self.layers + 1) + tails.first) * (self.most + 1) + self.levels[tails.stages]
        key = key * (rates.max(initial=0) + 1) + rates
        order = np.lexsort((tails.reduce, tails.pipe, key))
        tails, key = tails[order], key[order]
        if not order.size:
            return tails
        if self.trips:
            return self._no_worse(tails, key)
        other = np.concatenate(([0], np.cumsum(key[1:] != key[:-1])))
        reduce = np.unique(tails.reduce, return_inverse=True)[1] - order.size * other  # begins anew with every key
        least = np.minimum.accumulate(reduce)
        return tails[np.flatnonzero(np.concatenate(([True], reduce[1:] < least[:-1])))]

    def _no_worse(self, tails: _Tails, key: np.ndarray) -> _Tails:
        """Those that are not worse in all three than one of a few before them, in the order of key, pipe and reduce."""
        found, rest = np.arange(key.size), np.stack([key, tails.reduce, tails.trip])
        for back in range(1, COMPARED + 1):
            better = np.ones(found.size, dtype=bool)
            better[back:] = rest[0, back:] != rest[0, :-back]
            better[back:] |= (rest[1:, back:] < rest[1:, :-back]).any(axis=0)
            found, rest = found[better], rest[:, better]
        return tails[found]

    def best(self) -> list[Placed] | None:
        """The fastest of the whole model on all devices."""
        tails = self.tails
        whole = (tails.members == len(self.family.sets) - 1) & (tails.first == 0)
        if self.num_stages is not None:
            whole &= tails.stages == self.num_stages
        if not whole.any():
            return None
        at = int(np.argmin(np.where(whole, tails.tail.latency, np.inf)))
        found = []
        while tails.stages[at]:
            of = tails.of[at]
            layers = int(tails.first[at]), int(tails.first[of])
            stage = self.groups.stage(layers, self.family.groups[tails.group[at]], int(tails.stages[of]))
            assert stage is not None
            found.append(stage)
            at = of
        return found


def _finite(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where along the second axis the first finite value is, and one place behind the last one; nowhere: no place."""
    finite = np.isfinite(values)
    return finite.argmax(axis=1), np.where(finite.any(axis=1), values.shape[1] - finite[:, ::-1].argmax(axis=1), 0)


def _ranges(first: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Numbers from each first one on, so many, one range after the other."""
    return np.arange(sizes.sum()) + np.repeat(first - np.cumsum(sizes) + sizes, sizes)
