"""Algorithm 2 as re-implementations that agree have it: of every state the tail that is best by itself.

Devices stand in an order, and a stage has consecutive ones. From the back: Q(l, n, p) is the least latency of the last
l layers on the last n devices in p stages. Of equal ones the tail of the fewest layers, then of the fewest devices,
stands behind the first stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from systems.asteroid.equations import Tail
from systems.asteroid.groups import Groups, Placed


def planned(
    groups: Groups, order: Sequence[int], num_stages: int | None = None, idle: bool = False
) -> list[Placed] | None:
    """The stages that algorithm 2 finds, in so many stages or in any number; None: nothing fits.

    With `idle` the first of the last n devices may be left away.
    """
    states = _States(groups, order, num_stages or min(groups.tables.num_layers, len(order)))
    for n in range(1, len(order) + 1):
        for rest in range(n):
            states.add_heads(n, rest)
        if idle:
            states.add_idle(n)
    latency = (states.pipe + states.reduce)[:, len(order), 0]
    p = int(np.argmin(latency)) if num_stages is None else num_stages
    return states.stages(p) if np.isfinite(latency[p]) else None


class _States:
    """Of every Q(l, n, p), [p, n, first layer]: the tail, the slowest link of the group in front, and how it began."""

    def __init__(self, groups: Groups, order: Sequence[int], most: int) -> None:
        self.groups, self.order, self.most = groups, order, most
        layers = groups.tables.num_layers
        shape = (most + 1, len(order) + 1, layers + 1)
        self.pipe, self.reduce, self.rate = np.full(shape, np.inf), np.zeros(shape), np.full(shape, np.inf)
        self.cut, self.head, self.rest = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        self.pipe[0, 0, layers] = 0.0

    def add_heads(self, n: int, rest: int) -> None:
        """Put the group between the last `rest` and the last n devices in front of what there is on those."""
        groups = self.groups
        group = self.order[len(self.order) - n : len(self.order) - rest]
        slowest, all_reduce = groups.rate(group), groups.all_reduce(group)
        known = None
        for p in range(1, min(self.most, rest + 1) + 1):
            if not np.isfinite(self.pipe[p - 1, rest]).any():
                continue
            stages = groups.stages(group, p - 1)
            if stages is not known:
                known, forward, backward = stages, groups.table(stages.forward), groups.table(stages.backward)
            rate = np.minimum(slowest, self.rate[p - 1, rest])
            tail = Tail(self.pipe[p - 1, rest], self.reduce[p - 1, rest], np.zeros(()))
            tail = tail.behind(groups.sent / rate, groups.returned / rate, 0.0, groups.count)
            tail = tail.behind(forward, backward, all_reduce, groups.count)
            self._keep(tail, p, n, rest, slowest)

    def _keep(self, tail: Tail, p: int, n: int, rest: int, rate: float) -> None:
        """Of the tails, [first layer, first layer behind the first stage], those that are better than what there is."""
        latency = tail.latency
        firsts = np.arange(len(latency))
        cut = latency.shape[1] - 1 - np.argmin(latency[:, ::-1], axis=1)
        reached, before = latency[firsts, cut], (self.pipe[p, n] + self.reduce[p, n])[:-1]
        later = cut > self.cut[p, n, :-1]
        better = np.isfinite(reached) & ((reached < before) | ((reached == before) & later))
        x = firsts[better]
        y = cut[better]
        self.pipe[p, n, x], self.reduce[p, n, x] = tail.pipe[x, y], tail.reduce[x, y]
        self.rate[p, n, x], self.cut[p, n, x], self.head[p, n, x], self.rest[p, n, x] = rate, y, n, rest

    def add_idle(self, n: int) -> None:
        """Leave the first of the last n devices away where that is faster."""
        everything = (self.pipe, self.reduce, self.rate, self.cut, self.head, self.rest)
        better = (self.pipe + self.reduce)[:, n - 1] < (self.pipe + self.reduce)[:, n]
        for part in everything:
            part[:, n][better] = part[:, n - 1][better]

    def stages(self, p: int) -> list[Placed]:
        """Those of the whole model on all devices, in order."""
        found, n, x = [], len(self.order), 0
        for behind in reversed(range(p)):
            at = behind + 1, n, x
            head, rest, cut = int(self.head[at]), int(self.rest[at]), int(self.cut[at])
            group = self.order[len(self.order) - head : len(self.order) - rest]
            stage = self.groups.stage((x, cut), group, behind)
            assert stage is not None
            found.append(stage)
            n, x = rest, cut
        return found
