"""How a run on emulated devices goes on when one of them is lost, becomes slow, leaves or joins, and how long each part
of that took."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness.cluster import Cluster
from harness.engine import DeviceReport
from harness.errors import Broken
from harness.faults import CUT, JOIN, LEAVE, SLOW, Fault, due, noticed, unasked
from harness.fleet.coordinator import Agreed, Lost
from harness.fleet.job import Job
from harness.plan import Phase, Plan
from harness.recovery import Change, Membership, Resumed

#: What is known of a recovery that no other failure interrupts.
LATER = ("transfer_s", "replay_s", "first_step_s", "throughput_after_samples_per_s")
Replan = Callable[[Cluster, Change], Resumed | None]
#: Of each phase of a plan the seconds that each device of a cluster computes in an iteration.
Expected = Callable[[Plan, Cluster], Sequence[Mapping[str, float]]]


@dataclass
class _Generation:
    """One plan's part of the run: rounds that were over before it, and times of `time.monotonic`."""

    plan: Plan
    began: int
    go: float = 0.0
    #: Of what ended it: what it was, in which round, when it happened, and when it was known.
    happened: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    rounds: int = 0
    struck: float = 0.0
    detected: float = 0.0
    replanned: float = 0.0


@dataclass
class Rescue:
    """Leads a run from one plan to the next, with the devices that are its `members`.

    `jobs(plan, agreed, restore, faults, slowness)` makes the jobs of a generation: `faults` are those that have not
    happened yet. `cut(device)` takes its link down, `slow(device, factor)` gives it so much less of a core,
    `fence(device)` sees to it that a lost device is gone, `prepare(device)` that one can join. `expected`: None where
    devices have no speed of their own. `began`: rounds that were over before the plan.
    """

    plan: Plan
    replan: Replan
    faults: Sequence[Fault]
    members: Membership
    jobs: Callable[
        [Plan, Agreed | None, Mapping[str, Sequence[str]], Sequence[Fault], Mapping[str, float]], Sequence[Job]
    ]
    cut: Callable[[str], object]
    slow: Callable[[str, float], object]
    fence: Callable[[str], None]
    prepare: Callable[[str], None]
    expected: Expected | None
    began: int = 0
    generations: list[_Generation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generations.append(_Generation(self.plan, self.began))
        self._left = list(self.faults)
        self._agreed: Agreed | None = None
        #: Of this generation's devices that have been lost, or made slow, when and by what.
        self._struck: dict[str, tuple[Fault, float]] = {}
        self._slow: dict[str, tuple[Fault, float]] = {}
        self._seconds: Sequence[Mapping[str, float]] | None = None
        if self.expected is not None:
            self._seconds = self.expected(self.plan, self.members.cluster)

    # What the coordinator asks for

    def struck(self, fault: Fault, at: float) -> bool:
        self._left.remove(fault)
        if fault.kind == SLOW:
            self._slow[fault.device] = fault, at
            self.slow(fault.device, fault.factor)
            return False
        self._struck[fault.device] = fault, at
        if fault.kind != CUT:
            return False
        self.cut(fault.device)
        self._struck[fault.device] = fault, time.monotonic()
        return True

    def turn(self, agreed: Agreed, seconds: Mapping[str, float]) -> Sequence[Job] | None:
        now = self.generations[-1]
        wanted = due(self._left, agreed.trained)
        found = self._noticed(agreed.trained, seconds)
        if not wanted and not found:
            return None
        detected = time.monotonic()
        members = copy.copy(self.members)
        change = members.turned(now.plan, now.began, agreed.trained, wanted, found)
        resumed = self.replan(members.cluster, change)
        if resumed is None:
            return None
        self.members = members
        self._left = [fault for fault in self._left if fault not in wanted]
        slow = [
            self._slow.get(device, (unasked(device, agreed.trained, factor), detected))
            for device, factor in found.items()
        ]
        happened = (*wanted, *(fault for fault, _ in slow))
        now.happened, now.devices = tuple(map(str, happened)), tuple(fault.device for fault in happened)
        now.rounds = min(fault.step for fault in happened) if found else agreed.trained
        now.struck, now.detected = min((at for _, at in slow), default=detected), detected
        for fault in wanted:
            self._slow.pop(fault.device, None)
            if fault.kind == JOIN:
                self.prepare(fault.device)
        return self._following(resumed, agreed, change)

    def recover(self, lost: Lost, agreed: Agreed | None) -> Sequence[Job]:
        now = self.generations[-1]
        now.detected, now.devices = time.monotonic(), (lost.device,)
        fault, now.struck = self._struck.get(lost.device, (None, now.detected))
        if fault is None:  # nobody made it happen
            now.rounds, now.happened = agreed.trained if agreed else now.began, (f"{lost.device} was lost",)
        else:
            now.rounds, now.happened = fault.step, (str(fault),)
        newest = agreed.trained if agreed is not None and agreed is not self._agreed else None
        self._struck.pop(lost.device, None)
        self._slow.pop(lost.device, None)
        self.fence(lost.device)
        change = self.members.lost(lost.device, now.plan, now.began, newest)
        try:
            resumed = self.replan(self.members.cluster, change)
        except Broken as broken:
            raise Broken(f"{lost}. {broken}") from lost
        assert resumed is not None, "without a lost device a run can't go on as before"
        return self._following(resumed, agreed, change)

    def _following(self, resumed: Resumed, agreed: Agreed | None, change: Change) -> Sequence[Job]:
        """The jobs of the next generation."""
        self._agreed, self._seconds = agreed, None
        slowness = {device: fault.factor for device, (fault, _) in self._slow.items()}
        made = self.jobs(resumed.plan, agreed, resumed.restore, self._left, slowness)
        self.generations[-1].replanned = time.monotonic()
        self.generations.append(_Generation(resumed.plan, change.trained))
        return made

    def _noticed(self, trained: int, seconds: Mapping[str, float]) -> dict[str, float]:
        """The devices that took another time for the last round than known, with how many times as long."""
        if self.expected is None:
            return {}
        now = self.generations[-1]
        if self._seconds is None:
            self._seconds = self.expected(now.plan, self.members.cluster)
        rounds = now.began
        for phase, expected in zip(now.plan.phases, self._seconds, strict=True):
            if phase.shards and rounds < trained <= rounds + phase.repeat:
                return noticed(seconds, expected)
            rounds += phase.repeat if phase.shards else 0
        return {}  # the generation has done none

    def regrouped(self) -> None:
        self.generations[-1].go = time.monotonic()

    # What is left to say afterwards

    def check(self) -> None:
        """Raises Broken where a fault that was asked for has not happened."""
        for fault in self._left:
            why = "no snapshot follows" if fault.kind in (LEAVE, JOIN) else "the device has no such action then"
            raise Broken(f"The fault {str(fault)!r} never struck: {why}. Give another step, moment or number.")

    @property
    def last(self) -> _Generation:
        return self.generations[-1]

    def whole(self, before: Plan) -> Plan:
        """A plan with every round that counts, once, in the shards that it was done in. `before`: the plan of which the
        run may have done the first rounds in another life."""
        phases: list[Phase] = list(before.phases)
        following = [generation.began for generation in self.generations[1:]]
        for generation, end in zip(self.generations, [*following, None], strict=True):
            phases = list(_first_rounds(phases, generation.began))
            phases += _first_rounds(generation.plan.phases, None if end is None else end - generation.began)
        return replace(self.plan, phases=tuple(phases))

    def whole_s(self, reports: Sequence[DeviceReport], dilation: float) -> float:
        """From the beginning of the first generation to the end of the last one."""
        ended = max(phase.iterations[-1][1] for report in reports for phase in report.phases)
        return (self.last.go - self.generations[0].go + ended) / dilation

    def recoveries(self, reports: Sequence[DeviceReport], dilation: float) -> list[dict[str, Any]]:
        """One for every failure; seconds of the testbed's devices, but for detection and planning, which are real."""
        return [
            _recovery(before, after, reports if after is self.last else (), dilation)
            for before, after in zip(self.generations, self.generations[1:], strict=False)
        ]


def _first_rounds(phases: Sequence[Phase], count: int | None) -> list[Phase]:
    """The phases that train, as far as the first rounds; None: all of them."""
    found: list[Phase] = []
    for phase in (phase for phase in phases if phase.shards):
        repeat = phase.repeat if count is None else min(count, phase.repeat)
        if count is not None:
            count -= repeat
        if repeat:
            found.append(replace(phase, repeat=repeat))
    return found


def _recovery(
    before: _Generation, after: _Generation, reports: Sequence[DeviceReport], dilation: float
) -> dict[str, Any]:
    """From the failure that ended one generation to the first new round of the next one."""
    found: dict[str, Any] = {
        "fault": "; ".join(before.happened),
        "device": ", ".join(before.devices),
        "in_round": before.rounds,
        "back_to_round": after.began,
        "detect_s": before.detected - before.struck,
        "replan_s": before.replanned - before.detected,
        "regroup_s": after.go - before.replanned,
    }
    size = next(phase.batch_size for phase in before.plan.phases if phase.shards)
    passed = (before.struck - before.go) / dilation
    rounds = before.rounds - before.began
    found["throughput_before_samples_per_s"] = rounds * size / passed if rounds > 0 and passed > 0 else None
    if not reports:  # it was interrupted by the next failure
        return {**found, **dict.fromkeys((*LATER, "moved_bytes"))}
    ends: list[float] = []
    begin = transferred = 0.0
    moved = trained = 0
    starts: list[float] = []
    origin = min(report.phases[0].iterations[0][0] for report in reports)
    for place, phase in enumerate(after.plan.phases):
        spans = list(zip(*(report.phases[place].iterations for report in reports), strict=True))
        over = [max(end for _, end in span) for span in spans]
        if phase.shards:
            starts += [min(start for start, _ in span) for span in spans]
            ends += over
            trained += phase.repeat
        elif not ends:
            transferred = over[-1] - origin
            moved += sum(report.phases[place].sent_bytes for report in reports)
        begin = over[-1]
    again = max(before.rounds - after.began, 0)
    found |= {"transfer_s": transferred / dilation, "moved_bytes": moved}
    found["replay_s"] = (ends[again - 1] - origin - transferred) / dilation if again else 0.0
    first_start = max(starts[again], ends[again - 1] if again else origin + transferred)
    found["first_step_s"] = (ends[again] - first_start) / dilation
    rest = trained - again - 1
    took = (begin - ends[again]) / dilation
    found["throughput_after_samples_per_s"] = rest * size / took if rest and took > 0 else None
    return found
