"""What each device saw of a run, and the trace of them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor

from harness.plan import Plan
from harness.plan.values import KINDS
from harness.replication import REPLICATE
from harness.trace import Event, Peak, PhaseTrace, Trace


@dataclass(frozen=True)
class PhaseTimes:
    """When the device began and ended each iteration of a phase, in seconds since the origin, and the bytes it sent.

    The last iteration ends when all of its transfers have, so that the phase is over with it.
    """

    iterations: tuple[tuple[float, float], ...]
    sent_bytes: int


@dataclass(frozen=True)
class PhaseMemory:
    """`standing[kind]`: bytes that stay from iteration to iteration. `moving`: the most that one iteration makes
    besides: "moving" all together, "gradients" and "activations" alone.
    """

    standing: Mapping[str, int]
    moving: Mapping[str, int]

    @property
    def peak(self) -> int:
        return sum(self.standing.values()) + self.moving["moving"]

    def of(self, kind: str) -> int:
        return self.standing.get(kind, 0) + (self.moving.get(kind, 0) if kind in KINDS else 0)

    def as_peak(self) -> Peak:
        return Peak(self.peak, {kind: self.of(kind) for kind in KINDS})


def watched_phases(plan: Plan) -> list[int]:
    """The places of the phases whose memory is watched: the first, or where that takes a snapshot the first that
    computes; and the first that reads a cache, or decodes."""
    first = 0
    if plan.phases[0].name == REPLICATE:
        first = next(number for number, phase in enumerate(plan.phases) if phase.shards)
    others = [number for number, phase in enumerate(plan.phases) if phase.cached or phase.decoding]
    return sorted({first, *others[:1]})


@dataclass(frozen=True)
class DeviceReport:
    """One device of a run. `losses`: of each iteration, its rows' part of the mean over the batch.

    `memory`: of the phases that are watched (`watched_phases`), in order. `late_s`: of a device that is paced, by how
    much its computing took longer than it was to. `recomputed`: entries of its cache that were damaged.
    """

    device: str
    losses: tuple[float, ...]
    phases: tuple[PhaseTimes, ...]
    events: tuple[Event, ...]
    busy_s: Mapping[str, float]
    sent_bytes: Mapping[str, int]
    memory: tuple[PhaseMemory, ...]
    late_s: float = 0.0
    recomputed: int = 0
    process_peak_bytes: int = 0


@dataclass(frozen=True)
class Execution:
    """What really happened: the trace, and the loss of every iteration (mean over its samples).

    `emulation` is what an emulated testbed measured of itself. `trained`: the trained parameters, where asked for.
    `resumed_after_epoch`: the run had been killed, and the trace is of what was left; the losses are of all of it.
    `recoveries`: of each failure the fields of a record's `Recovery`; the trace is of what came after the last one, and
    `whole_s` is how long all of it took.
    """

    trace: Trace
    losses: tuple[float, ...]
    metric: float | None = None
    max_rel_error: float | None = None
    dilation: float = 1.0
    emulation: Mapping[str, object] | None = None
    trained: Mapping[str, Tensor] | None = None
    resumed_after_epoch: int | None = None
    recoveries: Sequence[Mapping[str, object]] = ()
    whole_s: float | None = None


def execution(plan: Plan, reports: Sequence[DeviceReport], training: bool, dilation: float = 1.0) -> Execution:
    """The reports of all devices as one; times are divided by the dilation of the testbed."""
    reports = [_scaled(report, 1 / dilation) for report in sorted(reports, key=lambda r: plan.devices.index(r.device))]
    begin = min(report.phases[0].iterations[0][0] for report in reports)
    phases, ended = [], begin
    watched = {number: place for place, number in enumerate(watched_phases(plan))}
    for number, phase in enumerate(plan.phases):
        mine = [report.phases[number] for report in reports]
        spans = list(zip(*(p.iterations for p in mine), strict=True))
        starts = [min(start for start, _ in span) for span in spans]
        ends = [max(end for _, end in span) for span in spans]
        if not phase.is_request:
            started = max(starts[0], ended) if phase.decoding else starts[0]
            lengths = tuple(after - before for before, after in pairwise([started, *ends]))
        else:  # requests: what lies between one and the next is no part of either
            lengths = tuple(end - start for start, end in zip(starts, ends, strict=True))
        ended = ends[-1]
        sent = sum(p.sent_bytes for p in mine)
        memory = {r.device: r.memory[watched[number]].as_peak() for r in reports} if number in watched else {}
        phases.append(
            PhaseTrace(
                phase.name,
                phase.repeat,
                starts[0] - begin,
                sum(lengths),
                sent,
                lengths,
                memory=memory,
                decoding=phase.decoding,
            )
        )
    moments = [replace(e, start_s=e.start_s - begin, end_s=e.end_s - begin) for r in reports for e in r.events]
    trace = Trace(
        mode="emulated",
        devices=tuple(report.device for report in reports),
        total_s=sum(phase.time_s for phase in phases),
        events=tuple(sorted(moments, key=lambda event: event.start_s)),
        phases=tuple(phases),
        busy_s={report.device: report.busy_s for report in reports},
        link_bytes={(r.device, peer): nbytes for r in reports for peer, nbytes in r.sent_bytes.items()},
        peak_bytes={r.device: max(memory.peak for memory in r.memory) for r in reports},
        memory_bytes={r.device: {kind: max(m.of(kind) for m in r.memory) for kind in KINDS} for r in reports},
        process_peak_bytes={r.device: r.process_peak_bytes for r in reports},
    )
    losses = tuple(map(sum, zip(*(report.losses for report in reports), strict=True)))
    return Execution(trace, losses if training else (), dilation=dilation)


def _scaled(report: DeviceReport, factor: float) -> DeviceReport:
    """The report with every time multiplied."""
    if factor == 1:
        return report
    return replace(
        report,
        phases=tuple(
            PhaseTimes(tuple((start * factor, end * factor) for start, end in p.iterations), p.sent_bytes)
            for p in report.phases
        ),
        events=tuple(replace(e, start_s=e.start_s * factor, end_s=e.end_s * factor) for e in report.events),
        busy_s={queue: seconds * factor for queue, seconds in report.busy_s.items()},
        late_s=report.late_s * factor,
    )
