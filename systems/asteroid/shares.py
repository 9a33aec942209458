"""Algorithm 1: how the devices of a group share the rows of each micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

from harness.schedules import split_within

Seconds = Sequence[Sequence[float]]


def balanced(total: int, capacities: Sequence[float], most: Sequence[int]) -> list[int] | None:
    """Memory-aware balancing: rows in proportion to capacity (eq. 9), as far as each device has memory for them.

    What is left goes to those that have room, again in proportion. None where there is not room for all.
    """
    return split_within(total, capacities, most)


def offloaded(rows: Sequence[int], seconds: Seconds, most: Sequence[int], block: int = 1) -> list[int]:
    """Straggler workload offloading: a block of rows from the slowest device to the fastest one that has memory to
    spare, again and again, while that makes the slowest one faster. `seconds[d][y]`: of y rows on device d.

    Capacities are those of a whole micro-batch, and time is not linear in rows: balance by them is a start.
    """
    found = list(rows)
    while True:
        times = [of[y] for of, y in zip(seconds, found, strict=True)]
        slowest = max(range(len(found)), key=times.__getitem__)
        moved = min(block, found[slowest])
        others = [d for d in range(len(found)) if d != slowest and found[d] + moved <= most[d]]
        if not moved or not others:
            return found
        target = min(others, key=times.__getitem__)
        after = list(found)
        after[slowest] -= moved
        after[target] += moved
        if max(of[y] for of, y in zip(seconds, after, strict=True)) >= times[slowest]:
            return found
        found = after
