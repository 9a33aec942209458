"""The plan's second reader: executes the action lists of one device with real tensors, queue by queue.

The caller's thread is the compute queue. A second thread sends, and the transport's own thread receives. A node starts
when its queue has come to it and the nodes it waits for have ended; the sums of a collective join no queue and are
done by whichever thread brings their last operand.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from queue import SimpleQueue

import torch
from torch import Tensor

from harness.cache import ActivationCache
from harness.datasets import batches
from harness.engine.checkpoint import BEGINNING, Progress
from harness.engine.model_shard import ModelShard, Saved
from harness.engine.program import Program, rows_of
from harness.engine.report import DeviceReport, PhaseMemory, PhaseTimes, watched_phases
from harness.engine.snapshots import Payload, Snapshot
from harness.engine.tensors import Bundle, buffer, dtype_name, empty_on_host, flat, on_host, part
from harness.errors import OrreryError, Unsupported
from harness.plan import Combine, Compute, Load, Phase, Plan, Recv, Send, Step, Store, Value, pieces
from harness.plan.actions import COMPUTE, NIC_IN, NIC_OUT, QUEUES, STORAGE, Action
from harness.plan.flow import is_piece
from harness.plan.updates import SERVED
from harness.plan.values import AXES, joined_axis
from harness.profile.track import Tracker
from harness.samples import Dataset
from harness.trace import EVENTS_KEPT, Event, kind_of, label_of, micro_batch_of
from harness.transport import Frame, Transport, TransportError
from harness.workload import Workload

#: Kinds of values that are the shard's own, once they have come.
STANDING = ("weights", "optimizer", "buffers")
#: How long `stop` waits for a thread that is amid an operator.
STOP_S = 10
#: The first is watched, which takes memory in another order than a run does; the second is as a run.
REHEARSALS = 2
#: Of what a paced device computes, the share by which it may be late before it is not that device any more: in the
#: rehearsal, which is one iteration and warms up, and in the whole run.
MOST_LATE_AT_FIRST, MOST_LATE = 0.5, 0.10


@dataclass
class Iteration:
    """One iteration on this device: what it holds, and what each of its nodes still waits for.

    `token`: of its request how many have been generated before. `losses`: of each update, summed over its rows here.
    `step`: how many updates there were before.
    """

    number: int
    phase: int
    index: int
    step: int
    program: Program
    sample_ids: Sequence[int]
    rehearsal: bool
    token: int = 0
    values: dict[Value, Payload] = field(default_factory=dict)
    landing: dict[Value, Tensor | Bundle] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    arriving: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        program = self.program
        self.waits, self.holds = dict(program.waits), list(program.holds)
        self.left, self.left_ahead = len(program.actions), len(program.ahead)
        self.admitted = dict.fromkeys(program.receives, 0)
        self.losses = [0.0] * len(program.phase.updates)


class _Ahead:
    """The sample ids of iterations, which have one batch or several, and a look at those of the next one."""

    def __init__(self, source: Iterator[list[int]]) -> None:
        self._source, self._seen = source, deque[list[int]]()

    def peek(self, phase: Phase) -> list[int]:
        count = len(phase.updates)
        while len(self._seen) < count:
            self._seen.append(next(self._source))
        return [number for batch in islice(self._seen, count) for number in batch]

    def next(self, phase: Phase) -> list[int]:
        found = self.peek(phase)
        for _ in phase.updates:
            self._seen.popleft()
        return found


class Worker:
    """One device of a plan that is being executed. `transport` is None where the plan has one device.

    `pace`: of every phase the seconds that each node of the compute and storage queues shall take. This machine does it
    faster, and then the device waits; one whose computing is late by more than a tenth of its time is refused.
    `slowness`: how many times as long as that it takes.
    `cache`: where it loads and stores.
    `begin`: what was done before the plan's first phase, with its `losses`. `phase_over(place, losses)` is called
    between phases, when what the next one begins with is there.
    `snapshot`: one that still counts, of which the first phase begins with the values. `commit(trained, losses,
    seconds)` is the barrier at which another one does, with those that the last round has computed. `fault(iteration,
    node)` is called before the node of a queue is begun.
    """

    def __init__(
        self,
        device: str,
        plan: Plan,
        programs: Sequence[Program],
        workload: Workload,
        shard: ModelShard,
        dataset: Dataset,
        transport: Transport | None = None,
        barrier: Callable[[], None] = lambda: None,
        progress: Callable[[int], None] = lambda number: None,
        pace: Sequence[Mapping[int, float]] = (),
        cache: ActivationCache | None = None,
        begin: Progress = BEGINNING,
        losses: Sequence[float] = (),
        phase_over: Callable[[int, Sequence[float]], None] = lambda place, losses: None,
        keeps_answers: bool = True,
        snapshot: Snapshot | None = None,
        commit: Callable[[int, Sequence[float], float], None] = lambda trained, losses, seconds: None,
        slowness: float = 1.0,
    ) -> None:
        self.device, self.plan, self.programs, self.workload = device, plan, programs, workload
        self.shard, self.dataset, self.transport = shard, dataset, transport
        self.barrier, self.progress, self.pace, self.cache = barrier, progress, pace, cache
        self.begin, self.losses, self.phase_over = begin, losses, phase_over
        self.keeps_answers = keeps_answers
        #: The snapshot that counts, and while it is not known whether all have the next one, that one.
        self.snapshots = [] if snapshot is None else [snapshot]
        self.commit = commit
        self.fault: Callable[[Iteration, int], None] | None = None
        self._lock = threading.Lock()
        self._compute_turn, self._send_turn, self._store_turn = (threading.Condition(self._lock) for _ in range(3))
        self._error: BaseException | None = None
        self._current: Iteration | None = None
        self._sender: threading.Thread | None = None
        self._sending: SimpleQueue[tuple[Iteration, int] | None] = SimpleQueue()
        self._storer: threading.Thread | None = None
        self._storing: SimpleQueue[tuple[Iteration, int] | None] = SimpleQueue()
        self._tracker: Tracker | None = None
        self._gradient_storages: set[int] = set()
        self._weight_storages: set[int] = set()
        #: Bytes of weights that stay from iteration to iteration, and are watched all the same.
        self._watched_weights = 0
        #: Of every request, or token of one, the samples and what the head, where it is here, has made of them.
        self.answers: list[tuple[Sequence[int], Tensor]] = []
        self._late_s = 0.0
        #: How many times as long the device takes as it is paced; and the seconds that it has computed in a round.
        self._slowness, self._round_s = slowness, 0.0
        #: When the storage queue was last done, when this iteration's loads could begin, and when the next one's can.
        self._stored_s = self._issued_s = self._issues_s = 0.0
        self._events: list[Event] = []
        self._busy = dict.fromkeys(QUEUES, 0.0)
        self._origin = 0.0
        self._sent: dict[str, int] = {}
        for program in programs:
            if program.storage and cache is None:
                raise Unsupported("load and store need a device with a store of its own")
            for value in program.phase.live.get(device, ()):
                if plan.tensors[value.name].kind == "weights":
                    shard.check(value)

    # The caller's thread

    def start(self) -> None:
        """Start the threads; from now on the peers may send."""
        self._sender = threading.Thread(target=self._send_all, name=f"{self.device} sending", daemon=True)
        self._sender.start()
        if self.cache is not None:
            self._storer = threading.Thread(target=self._store_all, name=f"{self.device} storing", daemon=True)
            self._storer.start()
        if self.transport is not None:
            self.transport.start(self)

    def rehearse(self) -> dict[str, int]:
        """The first iteration that is watched, without its update: most bytes made at once, all together and by kind.

        All devices rehearse together, once more without being watched, for memory is taken in another order then. It
        warms everything up, and everything that it changes is put back. Raises OrreryError for a paced device that is
        late then.
        """
        buffers = [buffer.clone() for buffer in self.shard.buffers()]
        self._tracker = tracker = Tracker()
        first = watched_phases(self.plan)[0]
        program, (ids, moved) = self.programs[first], self._samples()
        mine = (ids if program.phase.shards else moved).next(program.phase) if program.phase.micro_batches else ()
        for number in range(REHEARSALS):
            self._prefetch(program, mine, ())
            if self._tracker is not None:
                self._watch_weights(program, self._tracker)
            with self._tracker or nullcontext():
                iteration = self._iteration(number, first, 0, -1, mine, {}, rehearsal=True)
                self._run(iteration)
            self._finish(iteration)
            iteration.values.clear()
            self._tracker = None
            if number == 0:
                self._late_s = 0.0
                self._busy[COMPUTE] = 0.0
        self._check_pace("in the iteration before the run", MOST_LATE_AT_FIRST)
        for changed, before in zip(self.shard.buffers(), buffers, strict=True):
            changed.copy_(before)
        self._late_s = 0.0
        self._events.clear()
        self._busy = dict.fromkeys(QUEUES, 0.0)
        self._sent.clear()
        return self._moved(tracker, program)

    def _samples(self) -> tuple[_Ahead, _Ahead]:
        """The sample ids of what is left: of iterations that compute, and of those that move what they have made."""
        done = self.begin.trained, self.begin.moved
        ids, moved = (_Ahead(islice(batches(self.workload), count, None)) for count in done)
        return ids, moved

    def _moved(self, tracker: Tracker, program: Program) -> dict[str, int]:
        """What the watched iteration made at once, at most, and what is read for the next one meanwhile."""
        gradients, weights = self._gradient_storages, self._weight_storages
        repeated = program.phase.training and program.phase.repeat > 1
        ahead = sum(self.plan.bytes(value) for value in program.loads) if repeated else 0
        return {
            "moving": max(tracker.levels()) + ahead - self._watched_weights,
            "weights": max(tracker.levels(only=weights)) - self._watched_weights,
            "gradients": max(tracker.levels(only=gradients)),
            "activations": max(tracker.levels(without=gradients | weights)) + ahead,
        }

    def _watch_weights(self, program: Program, tracker: Tracker) -> None:
        """Follow what may go before the iteration ends, since its next version has memory of its own."""
        for name in program.renewed:
            for parameter in self.shard.weights(name):
                tracker.watch(parameter)
                self._note(parameter, self._weight_storages, tracker)
                self._watched_weights += parameter.nbytes

    def run(self, origin: float, moving: Mapping[str, int]) -> DeviceReport:
        """All phases. `origin`: the perf_counter time that the run's times count from. OrreryError as `rehearse`."""
        self._origin = origin
        losses: list[float] = [*self.losses]
        phases: list[PhaseTimes] = []
        carried: dict[Value, Payload] = dict(self.snapshots[0].values) if self.snapshots else {}
        memory: list[PhaseMemory] = []
        (ids, moved), number = self._samples(), 0
        watched = watched_phases(self.plan)
        mine: Sequence[int] = ()
        token = 0
        for place, program in enumerate(self.programs):
            phase = program.phase
            computes, last = bool(phase.shards), phase.repeat - 1
            if place in watched[1:]:
                rehearsed = mine if phase.decoding else ids.peek(phase)
                memory.append(self._watched(number, place, rehearsed, carried, token))
                number += 1
                self.barrier()  # who has nothing to do here would begin while others still rehearse
            spans: list[tuple[float, float]] = []
            sent = sum(self._sent.values())
            for index in range(phase.repeat):
                if phase.commits:
                    self._agree(phase, carried, losses)
                elif phase.is_request:
                    self.barrier()
                began, computed_s = time.perf_counter(), self._busy[COMPUTE]
                if not phase.decoding:
                    mine, token = (ids if computes else moved).next(phase) if phase.micro_batches else (), 0
                self._prefetch(program, mine, ids.peek(phase) if phase.training and index < last else ())
                iteration = self._iteration(REHEARSALS + number, place, index, len(losses), mine, carried, token=token)
                self._issued_s, self._issues_s = (self._issues_s if index else began), began
                self._run(iteration)
                if not phase.training or index == last:
                    self._finish(iteration)
                carried = self._carry(iteration)
                if computes:
                    self._round_s = self._busy[COMPUTE] - computed_s
                    losses += [loss / rows for loss, rows in zip(iteration.losses, phase.update_rows, strict=True)]
                number, token = number + 1, token + 1
                spans.append((began - origin, time.perf_counter() - origin))
                self.progress(number)
            phases.append(PhaseTimes(tuple(spans), sum(self._sent.values()) - sent))
            if place == watched[0]:
                memory.append(PhaseMemory(self._standing(carried), moving))
            if place + 1 < len(self.programs):
                self._hand_over(phase, self.programs[place + 1].phase, carried, len(losses))
                self.phase_over(place, losses)
        self._check_pace("in the run", MOST_LATE)
        return DeviceReport(
            device=self.device,
            losses=tuple(losses),
            phases=tuple(phases),
            events=tuple(self._events),
            busy_s=dict(self._busy),
            sent_bytes=dict(self._sent),
            memory=tuple(memory),
            late_s=self._late_s,
            recomputed=0 if self.cache is None else self.cache.recomputed,
        )

    def _agree(self, phase: Phase, carried: Mapping[Value, Payload], losses: Sequence[float]) -> None:
        """Wait until all have the snapshot that the phase commits; from then on it counts."""
        left = {value.name for value in phase.leaves_of(self.device)}
        values = {
            value: payload
            for value, payload in carried.items()
            if value.name in left and self.plan.tensors[value.name].kind == "snapshots"
        }
        self.snapshots.append(Snapshot(self.plan, len(losses), values))
        self.commit(len(losses), losses, self._round_s)
        del self.snapshots[:-1]

    def _watched(
        self, number: int, place: int, sample_ids: Sequence[int], carried: Mapping[Value, Payload], token: int
    ) -> PhaseMemory:
        """Rehearse the first iteration of a later phase, between it and the one before: no part of the run's time."""
        program = self.programs[place]
        self._gradient_storages.clear()  # of another tracker
        self._weight_storages.clear()
        self._watched_weights = 0
        kept = len(self._events), dict(self._busy), dict(self._sent), self._late_s
        self._prefetch(program, sample_ids, ())
        self._tracker = tracker = Tracker()
        self._watch_weights(program, tracker)
        with tracker:
            iteration = self._iteration(REHEARSALS + number, place, 0, -1, sample_ids, carried, True, token)
            self._run(iteration)
        self._finish(iteration)
        self._tracker = None
        events, self._busy, self._sent, self._late_s = kept
        del self._events[events:]
        return PhaseMemory(self._standing(carried), self._moved(tracker, program))

    def _standing(self, carried: Mapping[Value, Payload]) -> dict[str, int]:
        """Bytes by kind that stay from iteration to iteration: the shard's, and carried values beside it."""
        found = self.shard.standing_bytes()
        for value in carried:
            kind = self.plan.tensors[value.name].kind
            if kind in ("cache", "snapshots"):
                found[kind] = found.get(kind, 0) + self.plan.bytes(value)
        return found

    def stop(self) -> None:
        """End the threads, whatever they wait for. Idempotent."""
        self.fail(TransportError(f"{self.device} has stopped"))
        self._sending.put(None)
        self._storing.put(None)
        if self.transport is not None:
            self.transport.close()
        for thread in (self._sender, self._storer):
            if thread is not None:
                thread.join(STOP_S)

    def _iteration(
        self,
        number: int,
        phase: int,
        index: int,
        step: int,
        sample_ids: Sequence[int],
        carried: Mapping[Value, Payload],
        rehearsal: bool = False,
        token: int = 0,
    ) -> Iteration:
        """Begin an iteration: its sends are queued, and what belongs to it may come in."""
        program = self.programs[phase]
        iteration = Iteration(number, phase, index, step, program, sample_ids, rehearsal, token)
        by_name = {value.name: payload for value, payload in carried.items()}
        iteration.values = {value: by_name.get(value.name) for value in program.phase.live.get(self.device, ())}
        for value, holders in zip(program.freed, program.holds, strict=True):
            if not holders:  # nobody touches it before it goes
                self._let_go(iteration, value)
        with self._lock:
            self._current = iteration
        for node in program.sends:
            self._sending.put((iteration, node))
        for node in program.storage:
            self._storing.put((iteration, node))
        if self.transport is not None:
            self.transport.resume()
        self._combine_all(iteration, list(program.at_once))
        return iteration

    def _run(self, iteration: Iteration) -> None:
        """The compute queue of one iteration, and what the next one must find."""
        for node in iteration.program.compute:
            self._wait(iteration, node, self._compute_turn)
            if self.fault is not None and not iteration.rehearsal:
                self.fault(iteration, node)
            start = time.perf_counter()
            self._compute(iteration, node, iteration.program.actions[node])
            if self.shard.device.type == "cuda":
                torch.cuda.synchronize(self.shard.device)
            self._late_s += self._keep_pace(iteration, node, start)
            self._record(iteration, node, COMPUTE, start, time.perf_counter())
            self._done(iteration, node)
        with self._lock:
            while self._error is None and iteration.left_ahead:
                self._compute_turn.wait()
        self._check()

    def slow_down(self, factor: float) -> None:
        """From now on take so many times as long as the pace says."""
        self._slowness = factor

    def _keep_pace(self, iteration: Iteration, node: int, start: float) -> float:
        """Wait until the device that this one plays would be ready, too. Returns by how much it is late, if it is."""
        if not self.pace:
            return 0.0
        left = start + self.pace[iteration.phase].get(node, 0.0) * self._slowness - time.perf_counter()
        if left > 0:
            time.sleep(left)
        return max(0.0, -left)

    def _check_pace(self, when: str, most: float) -> None:
        busy = self._busy[COMPUTE]
        if self._late_s > most * (busy - self._late_s):
            raise OrreryError(
                f"{self.device} computed for {busy:.3g} s {when}, {self._late_s / (busy - self._late_s):.0%} longer "
                "than the device that it plays. Is the machine busy? Run again when it is quiet, on one with more "
                "cores, or with fewer or slower devices."
            )

    def _finish(self, iteration: Iteration) -> None:
        """Wait until every node of the iteration has ended, transfers too."""
        with self._lock:
            while self._error is None and iteration.left:
                self._compute_turn.wait()
        self._check()

    def _carry(self, iteration: Iteration) -> dict[Value, Payload]:
        names = {value.name for value in iteration.program.phase.leaves_of(self.device)}
        held = tuple(iteration.values.items())  # what is still being sent may go meanwhile
        return {value: payload for value, payload in held if value.name in names}

    def _prefetch(self, program: Program, sample_ids: Sequence[int], following: Sequence[int]) -> None:
        """Begin to read what this iteration loads, and the next one of the phase."""
        if self.cache is not None:
            for value in program.loads:
                for ids in (sample_ids, following):
                    if ids:
                        self.cache.prefetch(value.name, rows_of(program.phase, value, ids))

    def _hand_over(self, before: Phase, after: Phase, carried: dict[Value, Payload], updates: int) -> None:
        """Between phases: take over weights that have come, and let go of those that nobody needs any more.

        `updates`: how many there have been.
        """
        left = {value.name for value in after.live.get(self.device, ())}
        for value in before.live.get(self.device, ()):
            if value.name not in left and self.plan.tensors[value.name].kind == "weights":
                self.shard.release(value.name)
        for value, payload in carried.items():
            kind = self.plan.tensors[value.name].kind
            if isinstance(payload, Bundle) and kind in STANDING and not value.name.startswith(SERVED):
                self.shard.take_over(value.name, kind, payload, updates)
                carried[value] = None

    # What actions do

    def _compute(self, iteration: Iteration, node: int, action: Action) -> None:
        match action:
            case Compute(direction="forward"):
                self._forward(iteration, action)
            case Compute():
                self._backward(iteration, action)
            case Combine():
                self._combine(iteration, node, action)
            case Step():
                self._step(iteration, action)

    def _forward(self, iteration: Iteration, action: Compute) -> None:
        phase = iteration.program.phase
        first = sum(phase.micro_batches[: action.micro_batch])
        ids = iteration.sample_ids[first + action.rows[0] : first + action.rows[1]]
        read = self.dataset.batch(ids) if self.shard.reads_batch(action.units, phase.decoding) else {}
        if phase.decoding:
            assert self.workload.seq_len is not None
            read["cache_position"] = torch.tensor([self.workload.seq_len + iteration.token - 1])
        batch = {name: tensor.to(self.shard.device) for name, tensor in read.items()}
        entering = {value.name: self._tensor(iteration, value) for value in action.reads}
        if pieces.is_part(action):  # modules take views of theirs for granted
            entering = {name: tensor.contiguous() for name, tensor in entering.items()}
        update = phase.update_of(action.micro_batch)
        outputs, saved = self.shard.forward(action, batch, entering, iteration.step + update, ids, phase.decoding)
        if "loss" in outputs and not action.replica:
            iteration.losses[update] += outputs["loss"].item()
        elif "logits" in outputs and not self.workload.training and self.keeps_answers and not iteration.rehearsal:
            self.answers.append((ids, outputs["logits"]))
        for value in action.writes:
            iteration.values[value] = outputs.get(value.name, saved)

    def _backward(self, iteration: Iteration, action: Compute) -> None:
        saved = next(payload for value in action.reads if isinstance(payload := iteration.values[value], Saved))
        prefix, suffix = "grad:", f"@{action.units[1]}"
        arriving = {
            value.name.removeprefix(prefix).removesuffix(suffix): self._tensor(iteration, value)
            for value in action.reads
            if value.name.startswith(prefix) and value.name.endswith(suffix)
        }
        fresh = [value for value in action.accumulates if value not in iteration.values]
        for value in fresh:
            self.shard.drop_gradients(value.name)
        phase = iteration.program.phase
        leaving = self.shard.backward(saved, arriving, phase.update_rows[phase.update_of(action.micro_batch)])
        for value in action.writes:
            name = value.name.removeprefix(prefix).removesuffix(f"@{action.units[0]}")
            iteration.values[value] = leaving[name]
        for value in fresh:  # autograd adds to the same memory from now on
            iteration.values[value] = self.shard.gradients(value.name)
            if self._tracker is not None and phase.mini_batches:
                self._note_gradients(value.name, self._tracker)

    def _combine(self, iteration: Iteration, node: int, action: Combine) -> None:
        values, write = iteration.values, action.write
        if action.op == "concat" and action.in_place:
            values[write] = self._complete(iteration, action)
        elif action.op == "concat":
            found = [self._tensor(iteration, value) for value in action.reads]
            values[write] = torch.cat(found, _dimension(joined_axis(action.reads)))
        elif action.op == "square-sum":
            squares = [self._bundle(iteration, value).square_sum() for value in action.reads]
            values[write] = flat(torch.cat(squares).sum().reshape(1))
        elif not action.reads:
            values[write] = self._zeros(write)
        elif action.op == "sum":
            first, *others = action.reads
            total = self._held(iteration, first)
            if action.in_place:
                values.pop(first, None)
            else:
                total = total.clone()
            for value in others:
                total.add_(self._held(iteration, value))  # type: ignore[arg-type]
            values[write] = total
            if write.name in iteration.program.renewed:
                self._renew(iteration, write, total)
        else:
            (whole,) = action.reads
            piece = self._held(iteration, whole._replace(rows=write.rows, tokens=write.tokens, width=write.width))
            if not action.in_place:
                piece = self._copied(iteration, node, write, piece)
            values[write] = piece

    def _copied(self, iteration: Iteration, node: int, write: Value, piece: Tensor | Bundle) -> Tensor | Bundle:
        """A copy in memory of its own, or in that of the whole to which it belongs."""
        if node not in iteration.program.lands:
            return piece.clone()
        place = self._place(iteration, node, write, piece.dtype)
        place.copy_(piece)  # type: ignore[arg-type]
        return place

    def _complete(self, iteration: Iteration, action: Combine) -> Payload:
        """The result of a collective, whose pieces are all there and where they belong."""
        collective = iteration.program.collectives[action.write]
        if collective.kind == "all-reduce":
            return iteration.values.pop(collective.value)
        if collective.kind == "all-gather":
            return iteration.landing.pop(action.write)
        found = [self._held(iteration, value) for value in action.reads]
        if not found:
            return self._zeros(action.write)
        if len(found) == 1:
            return found[0]
        if self._is_flat(action.write):
            return Bundle(tuple(piece for bundle in found for piece in bundle.pieces))  # type: ignore[union-attr]
        return torch.cat(found, _dimension(collective.axis))  # type: ignore[arg-type]

    def _place(self, iteration: Iteration, node: int, piece: Value, dtype: torch.dtype) -> Tensor | Bundle:
        """Where the piece that the node brings lies in the result of its collective."""
        result = iteration.program.lands[node]
        collective = iteration.program.collectives[result]
        if collective.kind == "all-reduce":
            return self._held(iteration, piece._replace(version=collective.value.version))
        with self._lock:
            if result not in iteration.landing:
                whole = torch.empty(self._shape(result), dtype=dtype, device=self.shard.device)
                if self._tracker is not None:
                    self._tracker.watch(whole)
                iteration.landing[result] = flat(whole) if self._is_flat(result) else whole
        whole_or_flat = iteration.landing[result]
        if isinstance(whole_or_flat, Tensor):
            return part(whole_or_flat, result, piece)
        assert piece.width is not None
        return whole_or_flat.slice(*piece.width)

    def _shape(self, value: Value) -> tuple[int, ...]:
        """[rows, tokens, width] of an activation, [elements] of a flat value."""
        tensor = self.plan.tensors[value.name]
        width = value.width or (0, tensor.width)
        if self._is_flat(value):
            return (width[1] - width[0],)
        tokens, rows = value.tokens or (0, tensor.tokens), value.rows
        assert rows is not None
        return rows[1] - rows[0], tokens[1] - tokens[0], width[1] - width[0]

    def _zeros(self, value: Value) -> Tensor | Bundle:
        if self.plan.tensors[value.name].kind == "gradients":
            self.shard.drop_gradients(value.name)
            return self.shard.gradients(value.name)
        if self._is_flat(value):
            return flat(torch.zeros(self._shape(value), device=self.shard.device))
        return torch.zeros(self._shape(value), dtype=self.shard.layered_dtype, device=self.shard.device)

    def _renew(self, iteration: Iteration, write: Value, content: Payload) -> None:
        """Weights that have been pulled are computed with from now on; passes in flight have the ones before."""
        assert isinstance(content, Bundle)
        for value, payload in tuple(iteration.values.items()):  # others may come in meanwhile
            if value.name == write.name and payload is None:
                iteration.values[value] = self.shard.weights_bundle(write.name)
        self.shard.move_weights(write.name, content)
        iteration.values[write] = None
        self._note_weights(write.name)

    def _note_arrival(self, value: Value, tensor: Tensor, tracker: Tracker) -> None:
        """Gradients that are pushed and weights that are pulled count as what they are."""
        kind = self.plan.tensors[value.name].kind
        storages = {"gradients": self._gradient_storages, "weights": self._weight_storages}.get(kind)
        if storages is not None:
            self._note(tensor, storages, tracker)

    def _note_gradients(self, name: str, tracker: Tracker) -> None:
        for parameter in self.shard.trained(name):
            self._note(parameter.grad, self._gradient_storages, tracker)

    def _note_weights(self, name: str) -> None:
        if self._tracker is not None:
            for parameter in self.shard.weights(name):
                self._note(parameter, self._weight_storages, self._tracker)

    def _step(self, iteration: Iteration, action: Step) -> None:
        if any(value.name.startswith(SERVED) for value in action.writes):
            self._serve(iteration, action)
            return
        names = [value.name for value in action.gradients]
        if iteration.program.phase.mini_batches:  # those of a later one may have been made since
            for value in action.gradients:
                self.shard.take_gradients(value.name, self._bundle(iteration, value))
        if self._tracker is not None:
            for name in names:
                self._note_gradients(name, self._tracker)
        for value in action.kept:
            iteration.values[value] = self.shard.renew_weights(value.name)
            self._note_weights(value.name)
        if not iteration.rehearsal:
            norm = None if action.norm is None else self._bundle(iteration, action.norm).pieces[0]
            self.shard.step(names, norm)
        for name in names:
            self.shard.drop_gradients(name)  # what is still being sent is held as a value
        for value in action.writes:
            before = value._replace(version=value.version - 1)
            iteration.values[value] = None if before in action.kept else iteration.values.pop(before)

    def _serve(self, iteration: Iteration, action: Step) -> None:
        """An update of a parameter server's weights."""
        for value in action.kept:
            iteration.values[value] = self.shard.renew_weights(value.name)
            self._note_weights(value.name)
        for weights, gradient in zip(action.writes, action.gradients, strict=True):
            if not iteration.rehearsal:
                self.shard.serve(weights.name, self._bundle(iteration, gradient))
        for value in action.writes:
            before = value._replace(version=value.version - 1)
            if before not in action.kept:
                iteration.values.pop(before)
            iteration.values[value] = self.shard.weights_bundle(value.name)  # which a later update may leave

    @staticmethod
    def _note(tensor: Tensor | None, storages: set[int], tracker: Tracker) -> None:
        """The tensor's storage, if it is watched, is one of these."""
        number = None if tensor is None else tracker.number(tensor)
        if number is not None:
            storages.add(number)

    # Values as tensors

    def _held(self, iteration: Iteration, value: Value) -> Tensor | Bundle:
        return self._bundle(iteration, value) if self._is_flat(value) else self._tensor(iteration, value)

    def _tensor(self, iteration: Iteration, value: Value) -> Tensor:
        """The tensor of a value, which may be a piece of one held."""
        payload = iteration.values.get(value)
        if payload is None:
            whole = next(held for held in tuple(iteration.values) if held.name == value.name and is_piece(value, held))
            payload = iteration.values[whole]
            assert isinstance(payload, Tensor)
            return part(payload, whole, value)
        assert isinstance(payload, Tensor)
        return payload

    def _bundle(self, iteration: Iteration, value: Value) -> Bundle:
        """A flat value: one that is held, or a range of one; or of the weights."""
        payload = iteration.values.get(value)
        if isinstance(payload, Bundle):
            return payload
        whole, payload = value._replace(width=None), None
        if self.plan.tensors[value.name].kind == "weights":
            payload = self.shard.weights_bundle(value.name)
        elif self.plan.tensors[value.name].kind == "optimizer":
            payload = self.shard.state_bundle(value.name)
        elif value.name.startswith("buffers@"):
            payload = self.shard.buffers_bundle(value.name)
        elif (payload := iteration.values.get(whole)) is None:
            whole = next(held for held in tuple(iteration.values) if is_piece(value, held) and held.name == value.name)
            payload = iteration.values[whole]
        assert isinstance(payload, Bundle)
        if value.width is None:
            return payload
        first = 0 if whole.width is None else whole.width[0]
        return payload.slice(value.width[0] - first, value.width[1] - first)

    # The sending thread

    def _send_all(self) -> None:
        try:
            while (item := self._sending.get()) is not None:
                iteration, node = item
                self._wait(iteration, node, self._send_turn)
                if self.fault is not None and not iteration.rehearsal:
                    self.fault(iteration, node)
                action = iteration.program.actions[node]
                assert isinstance(action, Send)
                start = time.perf_counter()
                self._send(iteration, action, iteration.program.nbytes[node])
                self._record(iteration, node, NIC_OUT, start, time.perf_counter())
                self._done(iteration, node)
        except BaseException as error:
            self.fail(error)

    def _send(self, iteration: Iteration, action: Send, nbytes: int) -> None:
        assert self.transport is not None
        value, peer = action.value, action.peer
        if self._is_flat(value):
            bundle = self._bundle(iteration, value)
            staged = [on_host(piece) for piece in bundle.pieces]
            shape: tuple[int, ...] = (bundle.width,)
        else:
            staged = [on_host(self._tensor(iteration, value))]
            shape = tuple(staged[0].shape)
        if nbytes != (held := sum(piece.nbytes for piece in staged)):
            raise OrreryError(
                f"{self.device} has {held} bytes of {value} for {peer}, and the plan says {nbytes}. "
                "Plan again for this workload."
            )
        frame = Frame(
            self.transport.generation,
            iteration.number,
            iteration.sent.get(peer, 0),
            dtype_name(staged[0]),
            shape,
            nbytes,
        )
        iteration.sent[peer] = frame.tag + 1
        self.transport.send(peer, frame, [buffer(piece) for piece in staged])
        self._sent[peer] = self._sent.get(peer, 0) + nbytes

    # The storing thread

    def _store_all(self) -> None:
        try:
            while (item := self._storing.get()) is not None:
                iteration, node = item
                self._wait(iteration, node, self._store_turn)
                action = iteration.program.actions[node]
                start = time.perf_counter()
                self._load_or_store(iteration, action)
                if self.pace and isinstance(action, Load):
                    start = max(self._stored_s, self._issued_s)
                self._keep_pace(iteration, node, start)
                self._stored_s = time.perf_counter()
                self._record(iteration, node, STORAGE, start, time.perf_counter())
                self._done(iteration, node)
        except BaseException as error:
            self.fail(error)

    def _load_or_store(self, iteration: Iteration, action: Action) -> None:
        assert self.cache is not None and isinstance(action, (Load, Store))
        ids = rows_of(iteration.program.phase, action.value, iteration.sample_ids)
        if isinstance(action, Store):
            self.cache.put(action.value.name, ids, self._tensor(iteration, action.value))
            return
        tensor = self.cache.get(action.value.name, ids).to(self.shard.device)
        if self._tracker is not None:
            self._tracker.watch(tensor)
        iteration.values[action.value] = tensor

    def _is_flat(self, value: Value) -> bool:
        return self.plan.tensors[value.name].kind != "activations"

    # The transport's receiving thread

    def admit(self, source: str, frame: Frame) -> Sequence[memoryview] | None:
        """Memory for the next value from the source; None before this device begins the iteration it belongs to."""
        iteration = self._current
        if iteration is None:
            return None
        count = iteration.admitted.get(source, 0)
        expected = iteration.program.receives.get(source, ())
        if frame.iteration > iteration.number and count == len(expected):
            return None
        if frame.iteration != iteration.number or count >= len(expected) or frame.tag != count:
            raise TransportError(
                f"{self.device} got frame {frame.tag} of iteration {frame.iteration} from {source}, and expects frame "
                f"{count} of {len(expected)} of iteration {iteration.number}. Both must run the same plan."
            )
        node = expected[count]
        action = iteration.program.actions[node]
        assert isinstance(action, Recv)
        if frame.nbytes != iteration.program.nbytes[node]:
            raise TransportError(
                f"{self.device} got {frame.nbytes} bytes from {source} for {action.value}, which has "
                f"{iteration.program.nbytes[node]} in the plan. Both must run the same plan and model."
            )
        iteration.admitted[source] += 1
        if node in iteration.program.lands and self.shard.device.type == "cpu":
            place = self._place(iteration, node, action.value, getattr(torch, frame.dtype))
            found = [place] if isinstance(place, Tensor) else list(place.pieces)
            if all(piece.is_contiguous() for piece in found):
                iteration.values[action.value] = place
                return [buffer(piece) for piece in found]
        tensor = empty_on_host(frame.shape, frame.dtype, self.shard.device)
        if self._tracker is not None:
            self._tracker.watch(tensor)
            if iteration.program.phase.mini_batches:
                self._note_arrival(action.value, tensor, self._tracker)
        iteration.arriving[node] = tensor
        return [buffer(tensor)]

    def arrived(self, source: str, frame: Frame, start_s: float, end_s: float) -> None:
        iteration = self._current
        assert iteration is not None
        node = iteration.program.receives[source][frame.tag]
        action = iteration.program.actions[node]
        assert isinstance(action, Recv)
        tensor = iteration.arriving.pop(node, None)
        if tensor is not None:
            tensor = tensor.to(self.shard.device)
            if node in iteration.program.lands:
                place = self._place(iteration, node, action.value, tensor.dtype)
                place.copy_(tensor if isinstance(place, Tensor) else flat(tensor))  # type: ignore[arg-type]
                iteration.values[action.value] = place
            else:
                iteration.values[action.value] = flat(tensor) if self._is_flat(action.value) else tensor
        self._record(iteration, node, NIC_IN, start_s, end_s)
        self._done(iteration, node)

    def lost(self, error: BaseException) -> None:
        self.fail(error)

    # What the threads share

    def fail(self, error: BaseException) -> None:
        """The first error ends the run: it is raised in the caller's thread, and every thread stops."""
        with self._lock:
            if self._error is None:
                self._error = error
            self._compute_turn.notify()
            self._send_turn.notify()
            self._store_turn.notify()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _wait(self, iteration: Iteration, node: int, turn: threading.Condition) -> None:
        """Until the nodes that the node waits for have ended. One thread waits for a `turn`."""
        if iteration.waits[node]:
            with self._lock:
                while self._error is None and iteration.waits[node]:
                    turn.wait()
        self._check()

    def _done(self, iteration: Iteration, node: int) -> None:
        """The node has ended; do the sums that it was the last to delay."""
        self._combine_all(iteration, self._end(iteration, node))

    def _combine_all(self, iteration: Iteration, ready: list[int]) -> None:
        """Do the unqueued nodes that are ready, and those that they were the last to delay."""
        while ready:
            node = ready.pop()
            action = iteration.program.actions[node]
            assert isinstance(action, Combine)
            self._combine(iteration, node, action)
            ready += self._end(iteration, node)

    def _end(self, iteration: Iteration, node: int) -> list[int]:
        """Let go of what nobody needs any more, and wake who may go on. Returns sums that are due."""
        program, ready, gone = iteration.program, [], []
        with self._lock:
            iteration.left -= 1
            iteration.left_ahead -= node in program.ahead
            if not (iteration.left and iteration.left_ahead):
                self._compute_turn.notify()
            for follower in program.then.get(node, ()):
                iteration.waits[follower] -= 1
                if not iteration.waits[follower]:
                    if follower in program.unqueued:
                        ready.append(follower)
                    elif follower in program.nbytes:
                        self._send_turn.notify()
                    elif isinstance(program.actions[follower], (Load, Store)):
                        self._store_turn.notify()
                    else:
                        self._compute_turn.notify()
            for index in program.held_by.get(node, ()):
                iteration.holds[index] -= 1
                if not iteration.holds[index]:
                    gone.append(self._let_go(iteration, program.freed[index]))
        del gone  # outside of the lock: large memory takes its time to go
        return ready

    def _let_go(self, iteration: Iteration, value: Value) -> Payload:
        """The value is gone; so are weights that others are to take the place of. Returns what it was made of."""
        payload = iteration.values.pop(value, None)
        if payload is None and value.name in iteration.program.renewed:
            self.shard.release(value.name)
        return payload

    def _record(self, iteration: Iteration, node: int, queue: str, start: float, end: float) -> None:
        self._busy[queue] += end - start
        if iteration.index >= EVENTS_KEPT:
            return
        action = iteration.program.actions[node]
        transfer = isinstance(action, (Send, Recv))
        self._events.append(
            Event(
                device=self.device,
                queue=queue,
                kind=kind_of(action),
                label=label_of(action),
                start_s=start - self._origin,
                end_s=end - self._origin,
                phase=iteration.phase,
                iteration=iteration.index,
                micro_batch=micro_batch_of(action),
                nbytes=iteration.program.nbytes[node] if transfer else 0,
                peer=action.peer if isinstance(action, (Send, Recv)) else "",
            )
        )


def _dimension(axis: str) -> int:
    """Of an activation, [rows, tokens, width]."""
    return AXES.index(axis)
