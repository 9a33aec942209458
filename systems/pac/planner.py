"""PAC's planner: which layers go to which group of devices (section 5.2, equations 2 to 6).

A stage is a range of layers on a group of consecutive devices, which share the rows of each micro-batch. For every
number of stages a dynamic program finds the split whose slowest stage is fastest (equations 2 and 3); among those the
one with the shortest beginning, execution and ending phases is taken (equations 4 to 6).

Where the paper is silent: the stage that is k-th from the end keeps min(M, k) micro-batches in flight, as 1F1B does;
devices are taken in rank order; equal splits go to fewer stages and to the later cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from harness.cluster import Cluster
from harness.costs import Costs
from harness.layer_tables import LayerTables
from harness.schedules import split

EVEN, SPEED = SHARES = ("even", "speed")


@dataclass(frozen=True)
class Split:
    """A way to cut the model: of each stage, in order, its layers [first, last) and the number of its devices."""

    layers: tuple[tuple[int, int], ...]
    groups: tuple[int, ...]

    def devices(self) -> Iterator[tuple[int, int]]:
        """Of each stage the devices [first, last)."""
        first = 0
        for size in self.groups:
            yield first, first + size
            first += size


class Profile(LayerTables):
    """What the equations ask for: times of layers, sizes of activations, gradients and weights, budgets, bandwidth.

    `together[x, y]` says whether the layers [x, y) may be one stage of several.
    """

    def __init__(
        self,
        costs: Costs,
        cluster: Cluster,
        optimizer: str = "sgd",
        shares: str = EVEN,
        budgets: Sequence[float] | None = None,
        together: np.ndarray | None = None,
    ) -> None:
        super().__init__(costs, cluster, optimizer, budgets)
        self.shares = shares
        count = self.num_layers + 1
        self.together = np.ones((count, count), dtype=bool) if together is None else together

    def rows(self, first: int, last: int, micro_batch: int) -> list[int]:
        """Rows of a micro-batch that each of the devices [first, last) takes."""
        return split(micro_batch, self.weights(first, last))

    def weights(self, first: int, last: int) -> list[float]:
        """In what proportion the devices [first, last) share rows."""
        return [1.0] * (last - first) if self.shares == EVEN else self.speeds[first:last]

    def stage_seconds(self, layers: tuple[int, int], devices: tuple[int, int], micro_batch: int) -> tuple[float, float]:
        """e_f and e_b of a stage: of the slowest of its devices."""
        forward = backward = slowest = 0.0
        for device, rows in zip(range(*devices), self.rows(*devices, micro_batch), strict=True):
            f, b = (float(t[layers[1]] - t[layers[0]]) for t in self.layer_seconds(device, rows))
            if rows and f + b > slowest:
                forward, backward, slowest = f, b, f + b
        return forward, backward

    def transfer_seconds(self, cut: int, micro_batch: int, before: int, after: int) -> tuple[float, float]:
        """c_f and c_b over the boundary in front of layer `cut`, between groups of so many devices."""
        unit = self.costs.layers[cut][0]
        rows = -(-micro_batch // min(before, after))
        tensors = [self.costs.tensors[name] for name in self.costs.carried(unit)]
        forward = sum(tensor.bytes(rows) for tensor in tensors)
        backward = sum(tensor.bytes(rows) for tensor in tensors if tensor.needs_grad)
        rate = min(self.cluster.bandwidth.values())
        return forward / rate + self.cluster.latency_s, backward / rate + self.cluster.latency_s

    def all_reduce_seconds(self, layers: tuple[int, int], group: int) -> float:
        """AR of a stage: a ring over the gradients of what is trained."""
        if group == 1:
            return 0.0
        first, last = self.costs.layers[layers[0]][0], self.costs.layers[layers[1] - 1][1]
        _, trained = self.costs.weight_bytes(first, last)
        rate = min(self.cluster.bandwidth.values())
        return 2 * (group - 1) * (trained / group / rate + self.cluster.latency_s)


def phases(profile: Profile, found: Split, micro_batch: int, count: int) -> tuple[float, float, float]:
    """Seconds of the beginning, execution and ending phase of one mini-batch of `count` micro-batches (eqs 4 and 5)."""
    e = [
        profile.stage_seconds(layers, devices, micro_batch)
        for layers, devices in zip(found.layers, found.devices(), strict=True)
    ]
    c = [
        profile.transfer_seconds(layers[0], micro_batch, before, after)
        for layers, before, after in zip(found.layers[1:], found.groups, found.groups[1:], strict=False)
    ]
    reduces = [profile.all_reduce_seconds(*stage) for stage in zip(found.layers, found.groups, strict=True)]
    beginning = sum(e[i][0] + c[i][0] for i in range(len(c)))
    execution = count * sum(e[-1])
    ending = max(reduces[i] + sum(e[j][1] + c[j][1] for j in range(i, len(c))) for i in range(len(e)))
    return beginning, execution, ending


def best_split(
    profile: Profile,
    micro_batch: int,
    count: int,
    grouping: Sequence[int] | None = None,
    num_stages: int | None = None,
) -> Split | None:
    """The split that equations 2 to 6 choose for `count` micro-batches of `micro_batch` rows; None where none fits.

    `grouping` fixes the numbers of devices per stage, `num_stages` that of stages.
    """
    best: tuple[float, Split] | None = None
    for found in splits(profile, micro_batch, count, grouping):
        if num_stages not in (None, len(found.groups)):
            continue
        seconds = sum(phases(profile, found, micro_batch, count))
        if best is None or seconds < best[0]:
            best = seconds, found
    return None if best is None else best[1]


def splits(
    profile: Profile,
    micro_batch: int,
    count: int,
    grouping: Sequence[int] | None = None,
) -> Iterator[Split]:
    """For every number of stages, from one on, the split on all devices whose slowest stage is fastest (eqs 2 and 3).

    From the back: W[k][n, x] is the best slowest stage for the layers from x on, on the last n devices in k stages.
    """
    num_devices, num_layers = len(profile.devices), profile.num_layers
    groups = None if grouping is None else list(grouping)
    stages = min(num_devices, num_layers)
    if groups is not None:
        stages = len(groups)
    previous = np.full((num_devices + 1, num_layers + 1), np.inf)
    previous[0, num_layers] = 0.0
    choices: list[tuple[np.ndarray, np.ndarray]] = []
    tables = _Tables(profile, micro_batch, count)
    for k in range(1, stages + 1):
        slowest = np.full_like(previous, np.inf)
        cut, size = (np.zeros(previous.shape, dtype=np.int64) for _ in range(2))
        for n in range(k, num_devices + 1):
            sizes = range(1, n - k + 2) if groups is None else [groups[-k]]
            for m in sizes:
                rest = n - m
                if rest < 0 or m > micro_batch or not np.isfinite(previous[rest]).any():
                    continue
                first = num_devices - n
                seconds = tables.seconds(first, first + m, k, alone=k == 1 and rest == 0 and n == num_devices)
                reached = np.maximum(seconds, previous[rest][None, :])
                ends = num_layers - np.argmin(reached[:, ::-1], axis=1)
                values = reached[np.arange(num_layers + 1), ends]
                better = values < slowest[n]
                slowest[n][better], cut[n][better], size[n][better] = values[better], ends[better], m
        choices.append((cut, size))
        previous = slowest
        if np.isfinite(slowest[num_devices, 0]) and (groups is None or k == stages):
            yield _traced(choices, num_devices, num_layers)


def _traced(choices: Sequence[tuple[np.ndarray, np.ndarray]], num_devices: int, num_layers: int) -> Split:
    layers, groups = [], []
    x, n = 0, num_devices
    for cut, size in reversed(choices):
        last, m = int(cut[n, x]), int(size[n, x])
        layers.append((x, last))
        groups.append(m)
        x, n = last, n - m
    assert (x, n) == (num_layers, 0)
    return Split(tuple(layers), tuple(groups))


class _Tables:
    """T of equation 3 for all ranges of layers at once: seconds, infinite where a device would need too much memory."""

    def __init__(self, profile: Profile, micro_batch: int, count: int) -> None:
        self.profile, self.micro_batch, self.count = profile, micro_batch, count
        self._made: dict[tuple[object, ...], np.ndarray] = {}
        shape = (profile.num_layers + 1, profile.num_layers + 1)
        self._backwards = np.tril(np.ones(shape, dtype=bool))  # [x, y) with y <= x

    def seconds(self, first: int, last: int, k: int, alone: bool) -> np.ndarray:
        """For the devices [first, last) as the stage that is k-th from the end. `alone`: it is the only stage."""
        profile, in_flight = self.profile, min(k, self.count)
        rows = profile.rows(first, last, self.micro_batch)
        working = {
            (profile.kinds[d], count, profile.budgets[d]): d
            for d, count in zip(range(first, last), rows, strict=True)
            if count
        }
        key = (frozenset(working), in_flight, alone)
        if key not in self._made:
            slowest = np.zeros(self._backwards.shape)
            for (_, count, budget), device in working.items():
                total = np.add(*profile.layer_seconds(device, count))
                seconds = total[None, :] - total[:, None]
                seconds[profile.bytes(count, in_flight) > budget] = np.inf
                slowest = np.maximum(slowest, seconds)
            slowest[self._backwards] = np.inf
            if not alone:
                slowest[~profile.together] = np.inf
            self._made[key] = slowest
        return self._made[key]
