"""Devices that are lost, become slow, leave or join in virtual time: when it happens, when it is known, and what the
run goes on with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import OrreryError
from harness.faults import CRASH, JOIN, LEAVE, SLOW, Fault, due, joining, moment_of_event, noticed, unasked
from harness.plan import Phase, Plan
from harness.recovery import Change, Membership, Resumed
from harness.replication import REPLICATE
from harness.simulator import simulate
from harness.trace import Trace

#: Messages of which each waits for the one before, from the news of a new generation until it begins: the news, the
#: address that a device listens at, those of all; the connection and its mutual introduction; that it is ready; the
#: start. Counted in this project's protocol.
MESSAGES = 9
Replan = Callable[[Cluster, Change], Resumed | None]


@dataclass(frozen=True)
class _Turn:
    """What ends a plan before its end, in that round: seconds since the plan began when it happens, and when it is
    known; and the plan that the run goes on with from the round `trained` on."""

    happened: tuple[Fault, ...]
    in_round: int
    struck_s: float
    known_s: float
    resumed: Resumed
    trained: int


def run(
    plan: Plan, costs: Costs, cluster: Cluster, faults: Sequence[Fault], replan: Replan, heartbeat_timeout_s: float
) -> tuple[Trace, list[dict[str, Any]], float]:
    """The trace of what came after the last change, what is to be said of each recovery, and the seconds of the run.

    A crash closes a device's connections, and is known after one message; a device that hangs or is cut off is known to
    be lost when it has been silent for the timeout. One that leaves or joins does so at the next snapshot, and there it
    is known, too, how long each took for the round before. Planning takes no virtual time.
    Raises Broken where the run can't go on, OrreryError for a fault that never strikes.
    """
    course = _Course(costs, cluster, faults, replan, heartbeat_timeout_s)
    found: list[dict[str, Any]] = []
    began, regroup_s = 0, MESSAGES * cluster.latency_s
    while (turn := course.follow(plan, began)) is not None:
        again = max(turn.in_round - turn.trained, 0)
        after = turn.resumed.plan
        trace = simulate(replace(after, phases=tuple(_split(after.phases, again))), costs, course.actual)
        size = next(phase.batch_size for phase in plan.phases if phase.shards)
        rounds = turn.in_round - began
        found.append(
            {
                "fault": "; ".join(map(str, turn.happened)),
                "device": ", ".join(fault.device for fault in turn.happened),
                "in_round": turn.in_round,
                "back_to_round": turn.trained,
                "detect_s": turn.known_s - turn.struck_s,
                "replan_s": None,
                "regroup_s": regroup_s,
                "throughput_before_samples_per_s": rounds * size / turn.struck_s if rounds > 0 else None,
                **_phases(after, trace, again, size),
            }
        )
        course.clock_s += turn.known_s + regroup_s
        plan, began = after, turn.trained
    return course.trace, found, course.clock_s


class _Course:
    """Follows plans in virtual time, each up to what ends it."""

    def __init__(
        self, costs: Costs, cluster: Cluster, faults: Sequence[Fault], replan: Replan, heartbeat_timeout_s: float
    ) -> None:
        self.costs, self.testbed, self.replan = costs, cluster, replan
        self.heartbeat_timeout_s = heartbeat_timeout_s
        self.left = sorted(faults, key=lambda fault: fault.step)
        self.members = Membership(cluster, joining(faults))
        #: Devices that have become slow, with the time; and of each how many times as long it takes as before.
        self.slow: dict[str, tuple[Fault, float]] = {}
        #: When the plan began that is followed; in the end when all is over.
        self.clock_s = 0.0
        self.trace: Trace

    @property
    def actual(self) -> Cluster:
        """The devices of the testbed, as fast as they are."""
        factors = {device: fault.factor for device, (fault, _) in self.slow.items()}
        return replace(self.testbed, devices=tuple(d.slowed(factors.get(d.name, 1.0)) for d in self.testbed.devices))

    def follow(self, plan: Plan, began: int) -> _Turn | None:
        """What ends the plan, in front of which so many rounds were over; None: nothing does."""
        segment: list[Phase] = []  # since a device became slow
        rounds, agreed, passed_s = began, None, 0.0
        for phase in plan.phases:
            if phase.commits:
                agreed = rounds
                turn = self._turned(plan, began, rounds, segment, passed_s)
                if turn is not None:
                    return turn
            for fault in [fault for fault in self.left if _inside(fault, phase, rounds)]:
                before = fault.step - rounds if phase.shards else 0
                segment += [replace(phase, repeat=before)] if before else []
                if fault.kind != SLOW:
                    return self._lost(fault, plan, began, agreed, segment, phase, passed_s)
                passed_s += simulate(replace(plan, phases=tuple(segment)), self.costs, self.actual).total_s
                self.left.remove(fault)
                self.slow[fault.device] = fault, self.clock_s + passed_s
                segment, rounds, phase = [], fault.step, replace(phase, repeat=phase.repeat - before)
            segment.append(phase)
            rounds += phase.repeat if phase.shards else 0
        if self.left:
            raise OrreryError(
                f"The fault {str(self.left[0])!r} never strikes: the run is over before. Give another step."
            )
        self.trace = simulate(replace(plan, phases=tuple(segment)), self.costs, self.actual)
        self.clock_s += passed_s + self.trace.total_s
        return None

    def _lost(
        self,
        fault: Fault,
        plan: Plan,
        began: int,
        agreed: int | None,
        segment: Sequence[Phase],
        phase: Phase,
        passed_s: float,
    ) -> _Turn:
        """A device is lost in the next iteration of the phase, with an action that the fault is about."""
        whole = [*segment, replace(phase, repeat=1)]
        tail = whole[max((place for place, before in enumerate(whole) if before.commits), default=0) :]
        trace = simulate(replace(plan, phases=tuple(tail)), self.costs, self.actual)  # of a long one not all is kept
        passed_s += simulate(replace(plan, phases=tuple(whole)), self.costs, self.actual).total_s - trace.total_s
        moments = sorted(
            event.start_s
            for event in trace.events
            if event.phase == len(tail) - 1
            and event.device == fault.device
            and (fault.during in (None, "replication") or moment_of_event(event) == fault.during)
        )
        if fault.number >= len(moments):
            raise OrreryError(
                f"The fault {str(fault)!r} never strikes: {fault.device} has {len(moments)} such actions in that round."
            )
        self.left.remove(fault)
        self.slow.pop(fault.device, None)
        struck_s = passed_s + moments[fault.number]
        change = self.members.lost(fault.device, plan, began, agreed)
        resumed = self.replan(self.members.cluster, change)
        assert resumed is not None, "without a lost device a run can't go on as before"
        detect_s = self.testbed.latency_s if fault.kind == CRASH else self.heartbeat_timeout_s
        return _Turn((fault,), fault.step, struck_s, struck_s + detect_s, resumed, change.trained)

    def _turned(self, plan: Plan, began: int, rounds: int, segment: Sequence[Phase], passed_s: float) -> _Turn | None:
        """What is done with a snapshot: devices leave and join, and slow ones get less to do."""
        wanted = due(self.left, rounds)
        actual = {device: fault.factor for device, (fault, _) in self.slow.items()}
        found = noticed({d: actual.get(d, 1.0) for d in plan.devices}, self.members.slowness)
        if not wanted and not found:
            return None
        members = copy.copy(self.members)
        change = members.turned(plan, began, rounds, wanted, found)
        resumed = self.replan(members.cluster, change)
        if resumed is None:
            return None
        self.members = members
        self.left = [fault for fault in self.left if fault not in wanted]
        now_s = passed_s
        if segment:
            now_s += simulate(replace(plan, phases=tuple(segment)), self.costs, self.actual).total_s
        struck_s = now_s
        happened = list(wanted)
        for device, factor in found.items():
            fault, since_s = self.slow.get(device, (unasked(device, rounds, factor), self.clock_s + now_s))
            happened.append(fault)
            struck_s = min(struck_s, since_s - self.clock_s)
        for fault in wanted:
            self.slow.pop(fault.device, None)
        in_round = min(fault.step for fault in happened) if found else rounds
        return _Turn(tuple(happened), in_round, struck_s, now_s, resumed, change.trained)


def _inside(fault: Fault, phase: Phase, rounds: int) -> bool:
    """Whether the fault strikes in the phase, in front of which so many rounds are over."""
    if fault.kind in (LEAVE, JOIN):
        return False
    if fault.during == "replication":
        return phase.name == REPLICATE and rounds == fault.step
    return bool(phase.shards) and rounds <= fault.step < rounds + phase.repeat


def _split(phases: Sequence[Phase], again: int) -> Iterator[Phase]:
    """The phases, cut after the rounds that are done again, and after the one that was interrupted."""
    edges, rounds = [again, again + 1], 0
    for phase in phases:
        if not phase.shards:
            yield phase
            continue
        left = phase.repeat
        for edge in edges:
            if 0 < edge - rounds < left:
                yield replace(phase, repeat=edge - rounds)
                left -= edge - rounds
                rounds = edge
        yield replace(phase, repeat=left)
        rounds += left


def _phases(plan: Plan, trace: Trace, again: int, size: int) -> dict[str, Any]:
    """How long what came after the failure took, from a trace whose phases are cut by `_split`."""
    ends = [phase.start_s + phase.time_s for phase in trace.phases]
    training = [phase.name not in _moving(plan) for phase in trace.phases]
    first = training.index(True)
    transferred = ends[first - 1] if first else 0.0
    rounds, replayed, stepped, step_began = 0, transferred, None, transferred
    for phase, end, trains in zip(trace.phases, ends, training, strict=True):
        if trains:
            rounds += phase.repeat
            if rounds == again:
                replayed = end
            if rounds == again + 1 and stepped is None:
                stepped, step_began = end, max(replayed, phase.start_s)
    assert stepped is not None
    left = rounds - again - 1
    return {
        "transfer_s": transferred,
        "replay_s": replayed - transferred,
        "first_step_s": stepped - step_began,
        "moved_bytes": sum(phase.comm_bytes for phase in trace.phases[:first]),
        "throughput_after_samples_per_s": left * size / (trace.total_s - stepped) if left else None,
    }


def _moving(plan: Plan) -> set[str]:
    """Names of phases that compute nothing."""
    return {phase.name for phase in plan.phases if not phase.shards}
