"""A window of readings as energy: the trapezoid between readings, and the rules by which a window has no figure."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

#: A window in which nothing was read for longer says nothing.
MOST_GAP_S = 1.0
#: Of fewer readings no figure is given.
FEWEST_SAMPLES = 10


class Unreadable(Exception):
    """What was read is no power. Whatever the window was, it has no figure."""


@dataclass(frozen=True)
class Window:
    """What was measured between begin and end. Without `energy_j` there is a `reason`.

    A counter of energy knows no single powers: its mean is energy over time, and what only samples say is None.
    `largest_gap_s` is between neighbouring readings, those just outside of the window included.
    """

    duration_s: float
    energy_j: float | None = None
    mean_w: float | None = None
    min_w: float | None = None
    max_w: float | None = None
    samples: int | None = None
    achieved_hz: float | None = None
    largest_gap_s: float | None = None
    reason: str | None = None


def checked(watts: float) -> float:
    """A power as it can be: finite, and not below zero."""
    if not math.isfinite(watts) or watts < 0:
        raise Unreadable(f"A power of {watts:g} W was read, and nothing can draw that. Check how the meter is wired.")
    return watts


def integrate(times_ns: Sequence[int], watts: Sequence[float], begin_ns: int, end_ns: int) -> Window:
    """Energy between begin and end by the trapezoid, exact for constant and for linear power.

    `times_ns` ascend. Between two readings power is a line, before the first and after the last it is theirs. So
    adjacent windows of the same readings add up to the whole.
    """
    duration_s, samples = (end_ns - begin_ns) / 1e9, len(times_ns)
    if not samples:
        return Window(duration_s, samples=0, reason="Nothing was read.")
    span_s = (times_ns[-1] - times_ns[0]) / 1e9
    between = (times_ns[i + 1] - times_ns[i] for i in range(samples - 1))
    gap_s = max(times_ns[0] - begin_ns, end_ns - times_ns[-1], *between, 0) / 1e9
    achieved_hz = (samples - 1) / span_s if span_s > 0 else None
    window = partial(Window, duration_s, samples=samples, achieved_hz=achieved_hz, largest_gap_s=gap_s)
    if gap_s > MOST_GAP_S:
        return window(reason=f"Nothing was read for {gap_s:.3g} s, and {MOST_GAP_S:g} s is the most. {GAP_REMEDY}")
    if samples < FEWEST_SAMPLES:
        return window(reason=f"There are {samples} readings, and no figure is given below {FEWEST_SAMPLES}.")
    points = [(begin_ns, _at(begin_ns, times_ns, watts))]
    points += [point for point in zip(times_ns, watts, strict=True) if begin_ns < point[0] < end_ns]
    points += [(end_ns, _at(end_ns, times_ns, watts))]
    energy_j = math.fsum((after - before) / 1e9 * (p + q) / 2 for (before, p), (after, q) in pairwise(points))
    powers = [power for _, power in points]
    return window(energy_j=energy_j, mean_w=energy_j / duration_s, min_w=min(powers), max_w=max(powers))


GAP_REMEDY = "Is the meter connected, and does it give at least 2 readings per second?"


def _at(time_ns: int, times_ns: Sequence[int], watts: Sequence[float]) -> float:
    """The power at a time, on the line between its neighbours."""
    after = bisect_left(times_ns, time_ns)
    if after == len(times_ns):
        return watts[-1]
    if after == 0:
        return watts[0]
    share = (time_ns - times_ns[after - 1]) / (times_ns[after] - times_ns[after - 1])
    return watts[after - 1] + share * (watts[after] - watts[after - 1])
