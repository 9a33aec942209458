"""Participant selection: which sets of devices could run a workload, and what each could reach at best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import NamedTuple

from harness.cluster import Cluster, Device
from harness.costs import BACKWARD, FORWARD, Costs
from harness.errors import OrreryError
from harness.search import micro_batch_sizes
from harness.workload import Workload

#: With more sets than this they are not all listed: those that lack few devices, and those that are few, are.
MOST_LISTED = 2**12


class Bound(NamedTuple):
    """What no run on a set of devices can be below; of energy where all powers are known."""

    seconds: float
    joules: float | None


def sets_of_devices(cluster: Cluster) -> list[tuple[str, ...]]:
    """Sets that differ in what their devices are, all devices first; of devices that are alike those in front.

    With more than `MOST_LISTED` sets, from both ends: as few left away, or as few taking part, as there is room for.
    """
    groups: dict[tuple[Device, float], list[str]] = {}
    for device in cluster.devices:
        groups.setdefault((replace(device, name=""), cluster.bandwidth[device.name]), []).append(device.name)
    alike = list(groups.values())
    every = 1
    for names in alike:
        every *= len(names) + 1
    if every <= MOST_LISTED:
        counts = [chosen for chosen in product(*(range(len(names), -1, -1) for names in alike)) if any(chosen)]
        found = {_in_order(cluster, alike, chosen): None for chosen in counts}
    else:
        found = _from_both_ends(cluster, alike)
    return sorted(found, key=lambda names: (-len(names), [cluster.names.index(name) for name in names]))


def _from_both_ends(cluster: Cluster, alike: Sequence[Sequence[str]]) -> dict[tuple[str, ...], None]:
    whole = [len(names) for names in alike]
    found = {_in_order(cluster, alike, whole): None}
    for size in range(1, len(alike) + 1):
        for chosen in combinations(range(len(alike)), size):
            few = [int(place in chosen) for place in range(len(alike))]
            found[_in_order(cluster, alike, few)] = None
            without = [count - taken for count, taken in zip(whole, few, strict=True)]
            if any(without):
                found[_in_order(cluster, alike, without)] = None
            if len(found) >= MOST_LISTED:
                return found
    return found


def _in_order(cluster: Cluster, alike: Sequence[Sequence[str]], counts: Sequence[int]) -> tuple[str, ...]:
    chosen = {name for names, count in zip(alike, counts, strict=True) for name in names[:count]}
    return tuple(name for name in cluster.names if name in chosen)


def bound(workload: Workload, costs: Costs, devices: Sequence[Device]) -> Bound:
    """No plan that does every pass of every sample is below this, whoever does what of it.

    Each device alone would need t; together they need at least 1 / sum(1 / t), and the passes cost at least what they
    do on the device with the fewest joules for them. Where a cache could spare the frozen part, it is spared.
    """
    if costs.training and costs.cacheable:
        costs = costs.cached
    try:
        alone = [_seconds(workload, costs, device) for device in devices]
    except OrreryError:  # the rate of one is unknown: whoever plans for it says so
        return Bound(0.0, 0.0)
    seconds = 1 / sum(1 / each for each in alone) if all(alone) else 0.0
    powers = [(d.idle_w, d.load_w) for d in devices if d.idle_w is not None and d.load_w is not None]
    if len(powers) < len(devices):
        return Bound(seconds, None)
    cheapest = min((load - idle) * each for (idle, load), each in zip(powers, alone, strict=True))
    return Bound(seconds, cheapest + seconds * sum(idle for idle, _ in powers))


def _seconds(workload: Workload, costs: Costs, device: Device) -> float:
    """Of the device alone for all passes, with the micro-batches in which a row takes it least."""
    directions = (FORWARD, BACKWARD) if costs.training else (FORWARD,)
    total = 0.0
    for batch_size, repeat in workload.batches():
        passes = (
            sum(costs.seconds(device, 0, len(costs.units), direction, rows) for direction in directions) / rows
            for rows in micro_batch_sizes(batch_size)
        )
        total += min(passes) * batch_size * repeat
    return total
