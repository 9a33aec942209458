"""DAPPLE (PPoPP'21): synchronous pipelines of replicated stages, chosen by an estimate of their latency.

Its planner takes devices to be equal, and knows no memory. Two forms of it are here (`estimate`):

"released", after the released planner: of a few candidates that one is taken for which (M-1) block + one pass +
boundaries + max_i (AR_i - i block)+ is least. They come from a dynamic program that minimises the slowest block, for
every number of devices that make up one of several copies. All-reduces don't count there, and the slowest of several
stages never has less work per device than one stage has: so it finds one stage (derived), but where it must not
replicate any. To these it adds all ways to make two stages.

"pivot", after what the paper is said to do (assumed): a dynamic program over (layers, devices) whose value is the
latency Tw + Ts + Te around a pivot step, if one more stage takes all layers and devices that are left.

Every device is a machine of its own. Then FreshFirst and ScatterFirst both take the next devices that are free, there
is nothing that AppendFirst could append to, and the devices in use are always the first: placements don't differ.

Assumed, where devices and links are not equal: a layer takes the mean of its times on the devices, each link is as fast
as the slowest. Where the released code is of two minds, a block has both directions of a boundary, and an all-reduce
the layers of its own stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import numpy as np

from harness.cluster import Cluster
from harness.costs import BACKWARD, FORWARD, Costs
from harness.errors import unknown_name
from harness.layer_tables import LayerTables
from harness.plan import Plan
from harness.schedules import Stage, micro_batches
from harness.search import Group, Layout, balanced_groups, grouped_stages, plan_pipeline, stage_bytes, too_few
from harness.workload import Workload

RELEASED, PIVOT = ESTIMATES = ("released", "pivot")
PA, PB = WARMUPS = ("PA", "PB")
#: warmup: stage i of S keeps S - i micro-batches in flight ("PA"), or 2 (S - i) - 1 ("PB", which is said to be for
#: transfers that take about as long as passes, as over slow links); fewer where its devices have no memory for them.
OPTIONS: dict[str, object] = {"micro_batch_size": None, "estimate": RELEASED, "warmup": PB}

#: One number or many.
Index: TypeAlias = int | np.ndarray


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """The stages of least estimated latency, for the micro-batch size with which they simulate fastest."""
    estimate, warmup = options["estimate"], options["warmup"]
    if estimate not in ESTIMATES:
        raise unknown_name("value of dapple.estimate", str(estimate), ESTIMATES)
    if warmup not in WARMUPS:
        raise unknown_name("value of dapple.warmup", str(warmup), WARMUPS)
    tables = LayerTables(costs, cluster, workload.optimizer)

    def layout(size: int) -> Layout:
        profile = Profile.of(tables, size, len(micro_batches(workload.batch_size, size)))
        found = (released if estimate == RELEASED else pivoted)(profile, len(cluster.devices))
        stages = grouped_stages(costs, cluster, found)
        kept = in_flight(workload, costs, cluster, stages, size, str(warmup))
        return stages, lambda count: kept

    return plan_pipeline("dapple", workload, costs, cluster, layout, options)


@dataclass(frozen=True)
class Profile:
    """Seconds of one of `count` micro-batches of `rows` rows on any device: passes of the first l layers, transfers
    over the boundary in front of layer l, and `copy[x, y]`, what the gradients of the layers [x, y) take over a link.
    """

    rows: int
    count: int
    forward: np.ndarray
    backward: np.ndarray
    ahead: np.ndarray
    back: np.ndarray
    copy: np.ndarray

    @classmethod
    def of(cls, tables: LayerTables, rows: int, count: int) -> Profile:
        rate = min(tables.cluster.bandwidth.values())
        ahead, back = tables.boundary_bytes(rows)
        _, trained = tables.weight_bytes
        return cls(rows, count, *tables.mean_seconds(rows), ahead / rate, back / rate, trained / rate)

    @property
    def num_layers(self) -> int:
        return len(self.forward) - 1

    @property
    def both(self) -> np.ndarray:
        return self.forward + self.backward


def released(profile: Profile, num_devices: int) -> list[Group]:
    """The candidate with the least estimate, the first of equals."""
    able = [found for found in candidates(profile, num_devices) if all(size <= profile.rows for _, size in found[0])]
    if not able:
        raise too_few(profile.rows, profile.num_layers, num_devices)
    return min(able, key=lambda found: released_seconds(profile, *found))[0]


def candidates(profile: Profile, num_devices: int) -> Iterator[tuple[list[Group], int]]:
    """What the released planner ranks: stages, and of how many copies of a pipeline they consist, side by side."""
    layers = profile.num_layers
    if num_devices == 1:
        yield [((0, layers), 1)], 1
    for used in range(2, num_devices + 1):
        copies = num_devices // used
        yield [((0, layers), used * copies)], copies  # the devices that are left stay out
    for used in (num_devices, 2) if num_devices > 2 and num_devices % 2 == 0 else (num_devices,):
        if 2 <= used <= layers:
            copies = num_devices // used
            yield [(units, copies) for units in straight(profile, used, copies)], copies
    for cut in range(1, layers):
        for size in range(1, num_devices):
            yield [((0, cut), size), ((cut, layers), num_devices - size)], 1


def straight(profile: Profile, num_stages: int, copies: int) -> list[tuple[int, int]]:
    """Layers of so many stages of `copies` devices each, whose slowest block is fastest."""
    blocks = (profile.both[None, :] - profile.both[:, None]) / copies
    blocks = np.maximum(blocks, (profile.ahead + profile.back)[:, None])
    blocks[np.tril_indices(len(blocks))] = np.inf
    never = np.full_like(blocks, np.inf)
    found = balanced_groups(lambda size, _: blocks if size == 1 else never, profile.num_layers, num_stages)
    assert found is not None, "there are as many layers"
    return [units for units, _ in found]


def released_seconds(profile: Profile, groups: Sequence[Group], copies: int = 1) -> float:
    """The released planner's estimate of a round."""
    both, crossing = profile.both, profile.ahead + profile.back
    block = max(max((both[y] - both[x]) / size, crossing[x]) for (x, y), size in groups)
    one_pass = (both[-1] + sum(profile.ahead[x] for (x, _), _ in groups)) / copies
    late = max(2 * (size - 1) / size * profile.copy[units] - i * block for i, (units, size) in enumerate(groups))
    return float((profile.count - 1) * block + one_pass + max(late, 0.0))


def pivoted(profile: Profile, num_devices: int) -> list[Group]:
    """The stages of least latency by the dynamic program around a pivot, which keeps the best of every state."""
    layers = profile.num_layers
    # Of the first x layers on n devices: the round so far, its seconds with one stage for the rest, and the x and n in
    # front of its last stage.
    rounds = np.zeros((layers, num_devices, 4))
    seconds = np.full((layers, num_devices), np.inf)
    came = np.zeros((layers, num_devices, 2), dtype=int)
    seconds[0, 0] = _latency(_with_stage(profile, rounds[0, 0], 0, layers, num_devices))
    for x, n in np.ndindex(seconds.shape):
        sizes = np.arange(1, min(num_devices - n - 1, profile.rows) + 1)
        if seconds[x, n] < np.inf and len(sizes):
            y, size = np.arange(x + 1, layers)[:, None], sizes[None, :]
            longer = _with_stage(profile, rounds[x, n], x, y, size)
            reached = _latency(_with_stage(profile, longer, y, layers, num_devices - n - size))
            there = slice(x + 1, layers), slice(n + 1, n + 1 + len(sizes))
            better = reached < seconds[there]
            seconds[there][better] = reached[better]
            rounds[there][better] = longer[better]
            came[there][better] = x, n
    seconds[:, : max(num_devices - profile.rows, 0)] = np.inf  # one stage can't have all devices that are left
    if np.isinf(seconds).all():
        raise too_few(profile.rows, layers, num_devices)
    last, taken = layers, num_devices
    x, n = (int(i) for i in np.unravel_index(seconds.argmin(), seconds.shape))
    found = [((x, last), taken - n)]
    while x:
        last, taken = x, n
        x, n = (int(i) for i in came[x, n])
        found.append(((x, last), taken - n))
    return found[::-1]


def _with_stage(profile: Profile, before: np.ndarray, x: Index, y: Index, size: Index) -> np.ndarray:
    """A round with the boundary in front of layer x, and the layers [x, y) on `size` devices.

    A round warms up until its pivot Q works, is steady while that does, and ends with the passes and all-reduces that
    are left. Its steps are stages, and the boundaries between them:

        Tw + Ts + Te = sum_{a<=Q} F_a + (M-1) (F_Q + B_Q) + max_s (AR_s + sum_{a<=Q} B_a - sum_{a<s} B_a)

    The pivot is the step with the fewest bubbles, for which this is longest. So a round is known by four numbers:

        max_Q (M (F_Q + B_Q) + sum_{a<Q} (F_a + B_a)), max_s (AR_s - sum_{a<s} B_a), sum (F_a + B_a), sum B_a
    """
    forward, backward = ((t[y] - t[x]) / size for t in (profile.forward, profile.backward))
    reduce = 2 * (size - 1) / size * profile.copy[x, y]
    steady, late, both, back = np.moveaxis(before, -1, 0)
    for f, b, all_reduce in ((profile.ahead[x], profile.back[x], 0.0), (forward, backward, reduce)):
        steady = np.maximum(steady, profile.count * (f + b) + both)
        late = np.maximum(late, all_reduce - back)
        both, back = both + f + b, back + b
    return np.stack(np.broadcast_arrays(steady, late, both, back), axis=-1)


def _latency(found: np.ndarray) -> np.ndarray:
    """Tw + Ts + Te of rounds."""
    return found[..., 0] + found[..., 1]


def in_flight(
    workload: Workload, costs: Costs, cluster: Cluster, stages: Sequence[Stage], rows: int, warmup: str
) -> list[int]:
    """Micro-batches that each stage keeps in flight: by the rule, or as many as its devices have memory for.

    And no more than the stage in front, which hands it no more.
    """
    directions = (FORWARD, BACKWARD) if costs.training else (FORWARD,)
    kept = []
    for behind, stage in zip(range(len(stages), 0, -1), stages, strict=True):
        most = behind if warmup == PA else 2 * behind - 1
        for name, (low, high) in zip(stage.devices, stage.rows(rows), strict=True):
            standing, with_one = (
                stage_bytes(costs, workload.optimizer, *stage.units, high - low, ahead) for ahead in (0, 1)
            )
            passing = max(costs.workspace(*stage.units, direction, high - low) for direction in directions)
            room = cluster.device(name).memory_bytes - standing - passing
            if with_one > standing:
                most = min(most, int(room // (with_one - standing)))
        kept.append(max(most, 1))
    return list(accumulate(kept, min))
