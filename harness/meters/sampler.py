"""Reading a meter at a rate from the begin to the end of a window, whatever tells the time and says when it ends."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from typing import Protocol

from harness.meters.measurement import Facts
from harness.meters.window import MOST_GAP_S, Unreadable, Window, checked, integrate

#: A meter that breaks is no reason to break the run that is measured.
BREAKAGES = (Unreadable, OSError, ValueError, ArithmeticError, LookupError)


class Watch(Protocol):
    """Time as a meter sees it in a window."""

    def now_ns(self) -> int:
        """As `time.monotonic_ns`."""
        ...

    def begun(self) -> None:
        """Say that the window is open: the work that is to be measured starts now."""
        ...

    def ended(self, until_ns: int | None) -> bool:
        """Wait until then, or without end. True as soon as the end is asked for."""
        ...

    def pause(self, seconds: float) -> None:
        """Wait after the end."""
        ...


class Probe(Protocol):
    """What a meter does in the sampling process, to which it is pickled."""

    @property
    def facts(self) -> Facts: ...
    def window(self, watch: Watch) -> Window: ...


Read = Callable[[], tuple[int, float]]


def timed(read_w: Callable[[], float]) -> tuple[int, float]:
    """A power with the time in the middle of reading it. A reading as long as a gap that is too long is none."""
    before_ns = time.monotonic_ns()
    watts = read_w()
    after_ns = time.monotonic_ns()
    if after_ns - before_ns > MOST_GAP_S * 1e9:
        raise Unreadable(f"A reading took {(after_ns - before_ns) / 1e9:.3g} s, and {MOST_GAP_S:g} s is the most.")
    return (before_ns + after_ns) // 2, watts


def sampled(read: Read, rate_hz: float, watch: Watch) -> Window:
    """Read at a rate from begin to end, once before and once after. `read`: (time in ns, W).

    A reading no later than the one before is the same one: some meters say what they have said before.
    """
    times_ns, watts = array("q"), array("d")
    period_ns = round(1e9 / rate_hz)
    broken: str | None = None

    def once() -> None:
        nonlocal broken
        try:
            at_ns, power = read()
            if not times_ns or at_ns > times_ns[-1]:
                watts.append(checked(power))
                times_ns.append(at_ns)
        except BREAKAGES as error:
            broken = str(error) or type(error).__name__

    once()
    due_ns = begin_ns = watch.now_ns()
    watch.begun()
    while broken is None:
        due_ns = max(due_ns + period_ns, watch.now_ns())
        if watch.ended(due_ns):
            break
        once()
    if broken is not None:
        watch.ended(None)
    end_ns = watch.now_ns()
    while broken is None:
        once()
        if broken is not None or times_ns[-1] >= end_ns or watch.now_ns() - end_ns > MOST_GAP_S * 1e9:
            break
        watch.pause(period_ns / 1e9)
    if broken is not None:
        return Window((end_ns - begin_ns) / 1e9, samples=len(times_ns), reason=broken)
    return integrate(times_ns, watts, begin_ns, end_ns)
