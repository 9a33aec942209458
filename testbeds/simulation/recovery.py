"""Devices that are lost in virtual time: when it happens, when it is known, and what the run goes on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import OrreryError
from harness.faults import CRASH, SILENCE_S, Fault, moment_of_event
from harness.plan import Phase, Plan
from harness.recovery import Loss, Losses, Resumed
from harness.replication import REPLICATE
from harness.simulator import simulate
from harness.trace import Trace

#: Messages of which each waits for the one before, from the news of a new generation until it begins: the news, the
#: address that a device listens at, those of all; the connection and its mutual introduction; that it is ready; the
#: start. Counted in this project's protocol.
MESSAGES = 9


@dataclass(frozen=True)
class _Struck:
    """When a fault strikes, in seconds since its plan began, and the rounds of the plan's last snapshot then."""

    at_s: float
    agreed: int | None


def run(
    plan: Plan, costs: Costs, cluster: Cluster, faults: Sequence[Fault], replan: Callable[[Loss], Resumed]
) -> tuple[Trace, list[dict[str, Any]], float]:
    """The trace from the last failure on, what is to be said of each recovery, and the seconds of the whole run.

    A crash closes a device's connections, and is known after one message; a device that hangs or is cut off is known to
    be lost when it has been silent for long enough. Planning takes no virtual time.
    Raises Broken where the run can't go on, OrreryError for a fault that never strikes.
    """
    losses, began, gone_s = Losses(), 0, 0.0
    found: list[dict[str, Any]] = []
    left = cluster
    for fault in sorted(faults, key=lambda fault: fault.step):
        struck = _struck(plan, costs, left, fault, began)
        detect_s = cluster.latency_s if fault.kind == CRASH else SILENCE_S
        loss = losses.another(fault.device, plan, began, struck.agreed)
        resumed = replan(loss)
        left = replace(left, devices=tuple(device for device in left.devices if device.name != fault.device))
        again = fault.step - loss.trained
        trace = simulate(replace(resumed.plan, phases=tuple(_split(resumed.plan.phases, again))), costs, left)
        rounds = fault.step - began
        size = next(phase.batch_size for phase in plan.phases if phase.shards)
        found.append(
            {
                "fault": str(fault),
                "device": fault.device,
                "in_round": fault.step,
                "back_to_round": loss.trained,
                "detect_s": detect_s,
                "replan_s": None,
                "regroup_s": MESSAGES * cluster.latency_s,
                "throughput_before_samples_per_s": rounds * size / struck.at_s if rounds else None,
                **_phases(resumed.plan, trace, again, size),
            }
        )
        gone_s += struck.at_s + detect_s + MESSAGES * cluster.latency_s
        plan, began = resumed.plan, loss.trained
    return trace, found, gone_s + trace.total_s


def _struck(plan: Plan, costs: Costs, cluster: Cluster, fault: Fault, began: int) -> _Struck:
    """Simulate up to the round, or the snapshot, in which it happens."""
    before: list[Phase] = []
    rounds, agreed = began, None
    for phase in plan.phases:
        if phase.shards and fault.during != "replication" and rounds <= fault.step < rounds + phase.repeat:
            if fault.step > rounds:
                before.append(replace(phase, repeat=fault.step - rounds))
            last = replace(phase, repeat=1)
            break
        if fault.during == "replication" and phase.name == REPLICATE and rounds == fault.step:
            last = replace(phase)
            break
        if phase.commits:
            agreed = rounds
        rounds += phase.repeat if phase.shards else 0
        before.append(phase)
    else:
        raise OrreryError(f"The fault {str(fault)!r} never strikes: the run is over before. Give another step.")
    trace = simulate(replace(plan, phases=(*before, last)), costs, cluster)
    moments = sorted(
        event.start_s
        for event in trace.events
        if event.phase == len(before)
        and event.device == fault.device
        and (fault.during in (None, "replication") or moment_of_event(event) == fault.during)
    )
    if fault.number >= len(moments):
        raise OrreryError(
            f"The fault {str(fault)!r} never strikes: {fault.device} has {len(moments)} such actions in that round."
        )
    return _Struck(moments[fault.number], agreed)


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
