"""The plan's first reader: discrete events in virtual time.

Time is counted in whole picoseconds, so that a run repeats to the bit and a periodic iteration is exactly periodic.
Compute, sends and storage work in list order, so an iteration is a longest path through its graph; only transfers
compete, for the receiving port and for a shared medium, and those are served in the order in which they become ready,
iteration by iteration.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from harness.cluster import Cluster, Device
from harness.costs import Costs
from harness.errors import OrreryError
from harness.garbage import no_collection
from harness.ledger import Ledger
from harness.plan.actions import COMPUTE, NIC_IN, QUEUE_OF, QUEUES, STORAGE, Combine, Compute, Load, Send, Step, Store
from harness.plan.flow import linked
from harness.plan.graph import Graph, check_order
from harness.plan.pieces import fraction
from harness.plan.plan import Phase, Plan
from harness.trace import EVENTS_KEPT, Event, PhaseTrace, Trace, kind_of, label_of, micro_batch_of

PICOSECONDS = 10**12
#: Memory traffic of a combination, in times the bytes that it writes (a square-sum: reads). A sum reads two operands.
TRAFFIC = {"sum": 3, "concat": 2, "slice": 2, "square-sum": 1}
#: Longest cycle, in iterations, that the periodicity check looks for.
LONGEST_CYCLE = 4


@dataclass
class _State:
    """When each queue, carried value and medium is free, and when each device began the last iteration. Picoseconds."""

    queue: list[int]
    begun: list[int]
    live: dict[tuple[int, str], int] = field(default_factory=dict)
    medium: dict[str, int] = field(default_factory=dict)

    def wait_for_all(self) -> None:
        """Nothing begins before everything has ended."""
        self.queue = [self.latest] * len(self.queue)

    @property
    def latest(self) -> int:
        return max((*self.queue, *self.live.values()))

    def shift(self, graph: Graph, media: Sequence[str], by: int) -> None:
        """Move everything that the phase touches later by `by`."""
        for queue in (*graph.ends, *graph.receiving):
            self.queue[queue] += by
        self.begun = [time + by for time in self.begun]
        for key in graph.live_writers:
            self.live[key] += by
        for medium in media:
            self.medium[medium] += by

    def vector(self, graph: Graph, media: Sequence[str]) -> np.ndarray:
        return np.array(
            [self.queue[q] for q in (*graph.ends, *graph.receiving)]
            + [self.live[k] for k in graph.live_writers]
            + [self.medium[m] for m in media]
            + (self.begun if graph.loads else []),
            dtype=np.int64,
        )


@dataclass
class _Timed:
    """A phase's graph with the time that each node takes on this cluster."""

    phase: Phase
    graph: Graph
    duration: list[int]
    latency: list[int]
    medium: dict[int, str]
    workspace: dict[int, tuple[int, int]]
    busy: list[int]
    link_bytes: dict[tuple[str, str], int]

    @property
    def media(self) -> list[str]:
        return sorted(set(self.medium.values()))


def simulate(plan: Plan, costs: Costs, cluster: Cluster, most: int | None = None) -> Trace:
    """Run the plan in virtual time, of each phase `most` iterations. Raises InvalidPlan, and OrreryError where a
    device's rate is unknown."""
    with no_collection():
        return _simulate(plan, costs, cluster, most)


def _simulate(plan: Plan, costs: Costs, cluster: Cluster, most: int | None) -> Trace:
    prepared: dict[int, _Timed] = {}
    devices = plan.devices
    state = _State([0] * (len(QUEUES) * len(devices)), [0] * len(devices))
    ledger = Ledger(devices)
    kept: list[_Kept] = []
    busy = [0] * len(state.queue)
    link_bytes: dict[tuple[str, str], int] = {}
    phases: list[PhaseTrace] = []
    spans: list[tuple[int, int]] = []
    now = 0
    for number, phase in enumerate(plan.phases):
        repeat = phase.repeat if most is None else min(phase.repeat, most)
        timed = prepared.get(id(phase))
        seen = timed is not None
        if timed is None:
            timed = prepared[id(phase)] = _time(phase, plan, costs, cluster)
        began = now
        state.begun = [state.queue[len(QUEUES) * device + QUEUES.index(COMPUTE)] for device in range(len(devices))]
        lengths: list[float] = []
        for iteration, before, start, end in _iterations(timed, state, repeat):
            ledger.add(timed.graph, start, end, timed.workspace, before)
            if iteration < EVENTS_KEPT and not seen:
                kept.append(_Kept(timed, number, iteration, start, end))
            ended = max(map(int.__add__, end, timed.latency), default=before)
            lengths.append((ended - before) / PICOSECONDS)
            now = max(now, ended)
        now = max((now, *(state.queue[q] for q in timed.graph.ends), *state.live.values()))
        for queue, time in enumerate(timed.busy):
            busy[queue] += time * repeat
        for ends, nbytes in timed.link_bytes.items():
            link_bytes[ends] = link_bytes.get(ends, 0) + nbytes * repeat
        phases.append(
            PhaseTrace(
                phase.name,
                repeat,
                began / PICOSECONDS,
                (now - began) / PICOSECONDS,
                sum(timed.link_bytes.values()) * repeat,
                tuple(lengths),
                sum(timed.busy[QUEUES.index(COMPUTE) :: len(QUEUES)]) * repeat / PICOSECONDS,
                busy_s=_by_device(devices, [time * repeat for time in timed.busy]),
                link_bytes={ends: nbytes * repeat for ends, nbytes in timed.link_bytes.items()},
                decoding=phase.decoding,
            )
        )
        spans.append((began, now))
    peaks = ledger.settle(spans)
    return Trace(
        mode="simulated",
        devices=devices,
        total_s=now / PICOSECONDS,
        events=_Events(kept),
        phases=tuple(replace(phase, memory=memory) for phase, memory in zip(phases, peaks.spans, strict=True)),
        busy_s=_by_device(devices, busy),
        link_bytes=link_bytes,
        peak_bytes={name: peak.nbytes for name, peak in peaks.run.items()},
        memory_bytes={name: peak.kinds for name, peak in peaks.run.items()},
        memory_timeline={
            name: tuple((time / PICOSECONDS, nbytes) for time, nbytes in points)
            for name, points in peaks.timeline.items()
        },
    )


def _by_device(devices: Sequence[str], busy: Sequence[int]) -> dict[str, dict[str, float]]:
    """Seconds of each queue of each device, from picoseconds of all queues."""
    return {
        name: {queue: busy[len(QUEUES) * d + q] / PICOSECONDS for q, queue in enumerate(QUEUES)}
        for d, name in enumerate(devices)
    }


def estimate(plan: Plan, costs: Costs, cluster: Cluster) -> Trace:
    """Two iterations of each distinct phase: enough to compare candidate plans, and what they hold at once."""
    distinct = {id(phase): phase for phase in plan.phases}
    return simulate(replace(plan, phases=tuple(distinct.values())), costs, cluster, most=2)


class Demand(NamedTuple):
    """Of an iteration the passes of each device, and all else together, as if it were done one after the other, with
    the time that transfers are on their way. Picoseconds."""

    passes: Mapping[str, int]
    rest: int


def demands(plan: Plan, costs: Costs, cluster: Cluster) -> list[Demand]:
    """What an iteration of each phase demands, whatever waits for what. Raises as `simulate`."""
    found = []
    for phase in plan.phases:
        timed = _time(phase, plan, costs, cluster)
        passes, rest = dict.fromkeys(plan.devices, 0), 0
        for node, action in enumerate(timed.graph.actions):
            if isinstance(action, Compute):
                passes[timed.graph.devices[timed.graph.device[node]]] += timed.duration[node]
            else:
                rest += timed.duration[node] + timed.latency[node]
        found.append(Demand(passes, rest))
    return found


def own_seconds(plan: Plan, costs: Costs, cluster: Cluster) -> list[dict[str, dict[int, float]]]:
    """Of every phase the seconds of each node that a device does by itself: computes, stores. Raises as `simulate`."""
    found: dict[int, dict[str, dict[int, float]]] = {}
    for phase in plan.phases:
        if id(phase) in found:
            continue
        timed = _time(phase, plan, costs, cluster)
        graph, seconds = timed.graph, found.setdefault(id(phase), {device: {} for device in plan.devices})
        for node, action in enumerate(graph.actions):
            if node not in graph.unqueued and QUEUE_OF[type(action)] in (COMPUTE, STORAGE):
                seconds[graph.devices[graph.device[node]]][node] = timed.duration[node] / PICOSECONDS
    return [found[id(phase)] for phase in plan.phases]


def _time(phase: Phase, plan: Plan, costs: Costs, cluster: Cluster) -> _Timed:
    """Link the phase and give every node its duration."""
    graph = linked(phase, plan)
    costs = phase.chain(costs)
    devices = [cluster.device(name) for name in graph.devices]
    links = {
        (a, b): cluster.link(graph.devices[a], graph.devices[b])
        for a, b in {(graph.device[n], graph.peer[n]) for n in range(len(graph)) if graph.peer[n] >= 0}
    }
    timed = _Timed(phase, graph, [0] * len(graph), [0] * len(graph), {}, {}, [0] * (4 * len(devices)), {})
    sent: dict[tuple[int, int], int] = {}
    passes: dict[tuple[object, ...], tuple[float, tuple[int, int]]] = {}
    for node, action in enumerate(graph.actions):
        device, nbytes = devices[graph.device[node]], graph.nbytes[node]
        seconds = 0.0
        if isinstance(action, Send):
            ends = (graph.device[node], graph.peer[node])
            line = links[ends]
            seconds = nbytes / line.bandwidth
            timed.latency[node] = round(line.latency_s * PICOSECONDS)
            if line.medium is not None:
                timed.medium[node] = line.medium
            sent[ends] = sent.get(ends, 0) + nbytes
            timed.busy[len(QUEUES) * ends[1] + QUEUES.index(NIC_IN)] += round(seconds * PICOSECONDS)
        elif isinstance(action, Compute):
            rows, fresh = action.rows[1] - action.rows[0], node in graph.makes_gradients
            key = (device.kind, action.units, action.direction, rows, action.tokens, action.width, fresh)
            if key not in passes:
                passes[key] = _pass(action, costs, device, fresh)
            seconds, timed.workspace[node] = passes[key]
        elif isinstance(action, Combine):
            seconds = nbytes * TRAFFIC[action.op] / device.memory_bandwidth
        elif isinstance(action, Step):
            seconds = costs.update_seconds(device, *action.units, nbytes)
        elif isinstance(action, (Load, Store)):
            rate = device.storage_read if isinstance(action, Load) else device.storage_write
            if rate is None:
                raise OrreryError(f"The storage rate of {device.profile} is unknown, and this plan needs it.")
            seconds = nbytes / rate
        timed.duration[node] = time = round(seconds * PICOSECONDS)
        if node not in graph.unqueued:
            timed.busy[len(QUEUES) * graph.device[node] + QUEUES.index(QUEUE_OF[type(action)])] += time
    timed.link_bytes.update({(graph.devices[a], graph.devices[b]): nbytes for (a, b), nbytes in sent.items()})
    return timed


def _pass(action: Compute, costs: Costs, device: Device, fresh: bool) -> tuple[float, tuple[int, int]]:
    """Seconds of a pass, and its workspace, of activations and of gradients, which are `fresh` where it makes them."""
    first, last = action.units
    rows = action.rows[1] - action.rows[0]
    share = fraction(action, costs)
    workspace = int(costs.workspace(first, last, action.direction, rows) * share)
    # Weight gradients made on the way belong to the worst moment of the pass as far as they exist by then.
    worst = costs.workspace(first, last, action.direction, rows, True) if fresh else 0
    return costs.seconds(device, first, last, action.direction, rows, share), (workspace, max(0, worst - workspace))


def _iterations(timed: _Timed, state: _State, repeat: int) -> Iterator[tuple[int, int, list[int], list[int]]]:
    """Simulate iterations until they are periodic, then jump over whole cycles.

    Gives of each its number, when all before it had ended, and the starts and ends of its nodes.
    """
    graph, media = timed.graph, timed.media
    history: list[np.ndarray] = []
    left, number = repeat, 0
    while left:
        if timed.phase.is_request:
            state.wait_for_all()
        before = state.latest
        start, end = _iteration(timed, state)
        yield number, before, start, end
        left -= 1
        number += 1
        history.append(state.vector(graph, media))
        for cycle in range(1, min(LONGEST_CYCLE, len(history) - 1) + 1):
            if left < cycle:
                break
            step = history[-1] - history[-1 - cycle]
            if step.size and (step == step[0]).all():
                jumps = left // cycle
                state.shift(graph, media, int(step[0]) * jumps)
                left -= jumps * cycle
                history.clear()
                break


def _iteration(timed: _Timed, state: _State) -> tuple[list[int], list[int]]:
    """Start and end of every node of one iteration, from the state before it, which is advanced."""
    graph, duration, latency, medium = timed.graph, timed.duration, timed.latency, timed.medium
    then, behind, peer = graph.then, graph.behind, graph.peer
    earliest = [0] * len(graph)
    start, end = [0] * len(graph), [0] * len(graph)
    waits = graph.waits.copy()
    for queue, node in graph.begins.items():
        earliest[node] = max(earliest[node], state.queue[queue])
    for node in graph.loads:
        earliest[node] = max(earliest[node], state.begun[graph.device[node]])
    for node, device, name in graph.live_readers:
        earliest[node] = max(earliest[node], state.live.get((device, name), 0))
    ready = [node for node, count in enumerate(waits) if count == 0]
    # (possible start, when the data was ready, node) of transfers; a receive is issued with its device's iteration.
    requests: list[tuple[int, int, int]] = []
    issued = [state.queue[len(QUEUES) * device + QUEUES.index(COMPUTE)] for device in range(len(graph.devices))]

    def release(followers: list[int], time: int) -> None:
        for follower in followers:
            if time > earliest[follower]:
                earliest[follower] = time
            waits[follower] -= 1
            if not waits[follower]:
                ready.append(follower)

    while True:
        while ready:
            node = ready.pop()
            if peer[node] >= 0:
                begun = max(earliest[node], issued[peer[node]])
                heapq.heappush(requests, (begun, begun, node))
                continue
            start[node] = earliest[node]
            end[node] = done = earliest[node] + duration[node]
            release(behind[node], done)
            release(then[node], done)
        if not requests:
            break
        # Nothing else can run, so no request that is still unknown can start before the first of these.
        possible, wanted, node = heapq.heappop(requests)
        port = len(QUEUES) * peer[node] + QUEUES.index(NIC_IN)
        begun = max(possible, state.queue[port], state.medium.get(medium[node], 0) if node in medium else 0)
        if begun > possible:
            heapq.heappush(requests, (begun, wanted, node))
            continue
        start[node] = begun
        end[node] = state.queue[port] = done = begun + duration[node]
        if node in medium:
            state.medium[medium[node]] = done
        release(behind[node], done)
        release(then[node], done + latency[node])
    if any(waits):
        check_order(graph, f"phase {timed.phase.name!r}")
    state.begun = issued
    for queue, node in graph.ends.items():
        state.queue[queue] = end[node]
    for key, node in graph.live_writers.items():
        state.live[key] = end[node] + latency[node]
    return start, end


@dataclass(frozen=True)
class _Kept:
    timed: _Timed
    phase: int
    iteration: int
    start: list[int]
    end: list[int]


class _Events(Sequence[Event]):
    """Events in order of their start, made when they are looked at: a million of them cost nothing until then.

    What joins no queue is not among them: the sums of a collective go with its transfers.
    """

    def __init__(self, kept: list[_Kept]) -> None:
        self._kept = kept
        self._rows: list[tuple[int, int, int]] | None = None

    def _order(self) -> list[tuple[int, int, int]]:
        if self._rows is None:
            self._rows = [
                (k, node, side)
                for k, kept in enumerate(self._kept)
                for node in range(len(kept.start))
                if node not in kept.timed.graph.unqueued
                for side in range(1 + (kept.timed.graph.peer[node] >= 0))
            ]
            self._rows.sort(key=lambda row: (self._kept[row[0]].start[row[1]], row))
        return self._rows

    def __len__(self) -> int:
        return len(self._order())

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        k, node, side = self._order()[index]
        kept = self._kept[k]
        graph, action = kept.timed.graph, kept.timed.graph.actions[node]
        own, peer = graph.device[node], graph.peer[node]
        received = side == 1
        if received:
            own, peer = peer, own
        return Event(
            device=graph.devices[own],
            queue=NIC_IN if received else QUEUE_OF[type(action)],
            kind="recv" if received else kind_of(action),
            label=label_of(action),
            start_s=kept.start[node] / PICOSECONDS,
            end_s=kept.end[node] / PICOSECONDS,
            phase=kept.phase,
            iteration=kept.iteration,
            micro_batch=micro_batch_of(action),
            nbytes=graph.nbytes[node],
            peer=graph.devices[peer] if peer >= 0 else "",
        )
