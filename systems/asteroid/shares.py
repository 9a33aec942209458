"""Algorithm 1: how the devices of a group share the rows of each micro-batch, for many stages of the group at once.

Arrays are [devices, stages].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

#: Seconds of a device, by its place in the group, on a stage, by its number, for so many rows.
Seconds = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Shares(NamedTuple):
    """Rows of each device, and the most that it was given on the way to them.

    Who has room for these, less than before but some, takes the same rows again.
    """

    rows: np.ndarray
    given: np.ndarray


def shared(total: int, capacities: np.ndarray, most: np.ndarray, seconds: Seconds | None) -> Shares:
    """Both parts of algorithm 1; without `seconds` the first one. `most` rows must leave room for all."""
    start = balanced(total, capacities, most)
    if seconds is None:
        return start
    moved = offloaded(start.rows, seconds, most)
    return Shares(moved.rows, np.maximum(start.given, moved.given))


def balanced(total: int, capacities: np.ndarray, most: np.ndarray) -> Shares:
    """Memory-aware balancing: of each stage `total` rows, in proportion to capacity (eq. 9), as far as each device has
    memory for them. What is left goes to those that have room, again in proportion.

    As `harness.schedules.split_within`, stage by stage.
    """
    rows, given = most.copy(), np.zeros_like(most)
    free = most > 0
    stages = np.arange(rows.shape[1])
    while stages.size:
        taking, bound = free[:, stages], most[:, stages]
        left = total - np.where(taking, 0, bound).sum(axis=0)
        shares = _in_proportion(left, np.where(taking, capacities[:, stages], 0.0), taking)
        over = taking & (shares > bound)
        reached = np.where(taking & ~over, shares, bound)
        given[:, stages] = np.maximum(given[:, stages], reached)
        saturated = over.any(axis=0)
        rows[:, stages[~saturated]] = reached[:, ~saturated]
        free[:, stages] = taking & ~over
        stages = stages[saturated]
    return Shares(rows, given)


def _in_proportion(total: np.ndarray, weights: np.ndarray, taking: np.ndarray) -> np.ndarray:
    """Whole numbers in proportion to weights that sum to `total`: largest remainders, ties to the first."""
    exact = total * weights / sum(weights)
    counts = np.floor(exact)
    lacking = np.where(taking, counts - exact, np.inf)
    before = np.zeros(weights.shape, dtype=np.int16)  # how many devices are rounded up sooner
    for d in range(len(weights) - 1):
        sooner = lacking[d] <= lacking[d + 1 :]
        before[d + 1 :] += sooner
        before[d] += len(sooner) - np.add.reduce(sooner, axis=0, dtype=np.int16)
    return (counts + (before < total - counts.sum(axis=0))).astype(np.int64)


def offloaded(rows: np.ndarray, seconds: Seconds, most: np.ndarray, block: int = 1) -> Shares:
    """Straggler workload offloading: a block of rows from the slowest device to the fastest one that has memory to
    spare, again and again, while that makes the slowest one faster.

    Capacities are those of a whole micro-batch, and time is not linear in rows: balance by them is a start.
    """
    found, given = rows.copy(), rows.copy()
    stages = np.arange(rows.shape[1])
    held, times = rows, seconds(np.arange(len(rows))[:, None], stages, rows)
    while stages.size:
        slowest = times.argmax(axis=0)
        moved = np.minimum(block, np.take_along_axis(held, slowest[None], axis=0)[0])
        closed = held + moved > most[:, stages]
        np.put_along_axis(closed, slowest[None], True, axis=0)
        able = (moved > 0) & ~closed.all(axis=0)
        if not able.all():
            stages, slowest, moved = stages[able], slowest[able], moved[able]
            held, times, closed = held[:, able], times[:, able], closed[:, able]
        target = np.where(closed, np.inf, times).argmin(axis=0)
        each = np.arange(stages.size)
        before = times[slowest, each]
        held, times = held.copy(), times.copy()
        held[slowest, each] -= moved
        held[target, each] += moved
        given[target, stages] = np.maximum(given[target, stages], held[target, each])
        for changed in (slowest, target):
            times[changed, each] = seconds(changed, stages, held[changed, each])
        better = times.max(axis=0) < before
        stages, held, times = stages[better], held[:, better], times[:, better]
        found[:, stages] = held
    return Shares(found, given)
