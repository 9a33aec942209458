"""How a run on emulated devices goes on when one of them is lost, and how long each part of that took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness.engine import DeviceReport
from harness.errors import Broken
from harness.faults import CUT, Fault
from harness.fleet.coordinator import Agreed, Lost
from harness.fleet.job import Job
from harness.plan import Phase, Plan
from harness.recovery import Loss, Losses, Resumed

#: What is known of a recovery that no other failure interrupts.
LATER = ("transfer_s", "replay_s", "first_step_s", "throughput_after_samples_per_s")
Replan = Callable[[Loss], Resumed]


@dataclass
class _Generation:
    """One plan's part of the run: rounds that were over before it, and times of `time.monotonic`."""

    plan: Plan
    began: int
    go: float = 0.0
    #: Of the failure that ended it.
    fault: Fault | None = None
    device: str = ""
    rounds: int = 0
    struck: float = 0.0
    detected: float = 0.0
    replanned: float = 0.0


@dataclass
class Rescue:
    """Leads a run from one plan to the next. `jobs(plan, rounds, losses, restore)` makes the jobs of a generation,
    `cut(device)` takes its link down, `fence(device)` sees to it that a lost device is gone. `began`: rounds that were
    over before the plan.
    """

    plan: Plan
    replan: Replan
    faults: Sequence[Fault]
    jobs: Callable[[Plan, Agreed | None, Mapping[str, Sequence[str]]], Sequence[Job]]
    cut: Callable[[str], object]
    fence: Callable[[str], None]
    began: int = 0
    generations: list[_Generation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generations.append(_Generation(self.plan, self.began))
        self._losses = Losses()
        self._struck: set[str] = set()
        self._agreed: Agreed | None = None

    # What the coordinator asks for

    def struck(self, device: str, at: float) -> bool:
        now = self.generations[-1]
        now.fault = next(f for f in self.faults if f.device == device)
        self._struck.add(device)
        now.struck, now.rounds = at, now.fault.step
        if now.fault.kind != CUT:
            return False
        self.cut(device)
        now.struck = time.monotonic()
        return True

    def recover(self, lost: Lost, agreed: Agreed | None) -> Sequence[Job]:
        now = self.generations[-1]
        now.detected, now.device = time.monotonic(), lost.device
        if now.fault is None or now.fault.device != lost.device:  # nobody made it happen
            now.fault, now.struck, now.rounds = None, now.detected, agreed.trained if agreed else now.began
        newest = agreed.trained if agreed is not None and agreed is not self._agreed else None
        self._agreed = agreed
        self.fence(lost.device)
        loss = self._losses.another(lost.device, now.plan, now.began, newest)
        try:
            found = self.replan(loss)
        except Broken as broken:
            raise Broken(f"{lost}. {broken}") from lost
        self.generations.append(_Generation(found.plan, loss.trained))
        made = self.jobs(found.plan, agreed, found.restore)
        now.replanned = time.monotonic()
        return made

    def regrouped(self) -> None:
        self.generations[-1].go = time.monotonic()

    # What is left to say afterwards

    def check(self) -> None:
        """Raises Broken where a fault that was asked for has not happened."""
        for fault in self.faults:
            if fault.device not in self._struck:
                raise Broken(
                    f"The fault {str(fault)!r} never struck: the device has no such action then. Give another step, "
                    "moment or number."
                )

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
        "fault": str(before.fault) if before.fault else f"{before.device} was lost",
        "device": before.device,
        "in_round": before.rounds,
        "back_to_round": after.began,
        "detect_s": before.detected - before.struck,
        "replan_s": before.replanned - before.detected,
        "regroup_s": after.go - before.replanned,
    }
    size = next(phase.batch_size for phase in before.plan.phases if phase.shards)
    passed = (before.struck - before.go) / dilation
    rounds = before.rounds - before.began
    found["throughput_before_samples_per_s"] = rounds * size / passed if rounds > 0 else None
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
    again = before.rounds - after.began
    found |= {"transfer_s": transferred / dilation, "moved_bytes": moved}
    found["replay_s"] = (ends[again - 1] - origin - transferred) / dilation if again else 0.0
    first_start = max(starts[again], ends[again - 1] if again else origin + transferred)
    found["first_step_s"] = (ends[again] - first_start) / dilation
    rest = trained - again - 1
    took = (begin - ends[again]) / dilation
    found["throughput_after_samples_per_s"] = rest * size / took if rest and took > 0 else None
    return found
