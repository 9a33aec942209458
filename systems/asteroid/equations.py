"""How long a round of hybrid pipeline parallelism takes by Asteroid's equations 4 to 6 and 11.

They are known from re-implementations that agree, not from the paper's print. The print of equation 11 is unknown: this
is the form that equation 6 needs (derived).

A pipeline of P stages has 2P-1 steps: stages, and between them communication steps. All times are seconds, those of
passes for one micro-batch; a round has `count` micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Step:
    """E_f, E_b and T_a of a step: of a stage its slowest device's passes, and its all-reduce."""

    forward: float
    backward: float
    all_reduce: float = 0.0

    @property
    def both(self) -> float:
        return self.forward + self.backward


def in_flight(behind: int) -> int:
    """K_p = 2 (P - p) - 1, the micro-batches that a stage begins with, for one with so many stages `behind` it.

    That keeps a pipe of 2P - 1 steps full (said to be of section 3.2).
    """
    return 2 * behind + 1


def dominant(steps: Sequence[Step], count: int) -> int:
    """dm, the step with the fewest bubbles: the first that makes the execution of the first step longest (eq. 11)."""
    reached = [count * step.both + sum(before.both for before in steps[:s]) for s, step in enumerate(steps)]
    return max(range(len(steps)), key=lambda s: (reached[s], -s))


def latency(steps: Sequence[Step], count: int, dm: int | None = None) -> float:
    """Waiting, execution and all-reduce of the step for which they are longest together (eqs. 4 to 6)."""
    dm = dominant(steps, count) if dm is None else dm
    longest = 0.0
    for s, step in enumerate(steps):
        waiting = sum(before.forward for before in steps[:s])
        if s <= dm:
            beside = sum(between.both for between in steps[s:dm])
        else:
            beside = -sum(between.both for between in steps[dm:s])
        longest = max(longest, waiting + count * steps[dm].both + beside + step.all_reduce)
    return longest


Seconds = float | np.ndarray


@dataclass(frozen=True)
class Tail:
    """The last steps of a pipeline, as far as their latency depends on what comes before; or many of them, as arrays.

    With the dominant step of eq. 11, equations 4 to 6 are `pipe` + `reduce`:

        pipe   = max_c ( M E^c + sum_{i<c} E^i )
        reduce = max_s ( T_a^s - sum_{i<s} E_b^i )

    so that steps in front change both without knowing the others. Zero for both is the tail without any step.

    They take it that K_p micro-batches are in flight, as by the rule. A stage that keeps fewer waits until they come
    back: M / K_p times one after the other a micro-batch goes from it to the last stage, and back. So `pipe` may be
    bounded from below by these round trips, too, with what `trip` is of the steps from the stage on (derived):

        trip = sum E,    pipe >= M / K_p trip + sum_{i<p} E^i

    By the rule there are as many steps on the way as micro-batches in flight, or all are, and this is no bound.
    """

    pipe: np.ndarray
    reduce: np.ndarray
    trip: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> Tail:
        return Tail(self.pipe[chosen], self.reduce[chosen], self.trip[chosen])

    @property
    def latency(self) -> np.ndarray:
        return self.pipe + self.reduce

    def behind(self, forward: Seconds, backward: Seconds, all_reduce: Seconds, count: int) -> Tail:
        """The tail with a step in front, which has these E_f, E_b and T_a."""
        both = forward + backward
        return Tail(
            np.maximum(count * both, self.pipe + both),
            np.maximum(all_reduce, self.reduce - backward),
            self.trip + both,
        )

    def returning(self, num_trips: Seconds) -> Tail:
        """Bounded by so many round trips from its first step."""
        return replace(self, pipe=np.maximum(self.pipe, num_trips * self.trip))


def tail(steps: Sequence[Step], count: int, kept: Sequence[int] = ()) -> Tail:
    """All of these steps; bounded by round trips where it is said what each stage keeps in flight."""
    found = Tail(np.zeros(()), np.zeros(()), np.zeros(()))
    for place, step in reversed(list(enumerate(steps))):
        found = found.behind(step.forward, step.backward, step.all_reduce, count)
        if kept and place % 2 == 0:
            found = found.returning(count / kept[place // 2])
    return found
