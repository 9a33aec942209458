"""The plan's second reader: executes the action list of a device with the real modules.

One device so far: what a plan of several devices adds is the transport, behind sends and receives.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.datasets import sample_order
from harness.errors import OrreryError, Unsupported
from harness.models.layered import Layered
from harness.optimizers import optimizer_for
from harness.plan import Action, Commit, Compute, Free, Phase, Plan, Step, Value
from harness.plan.values import KINDS
from harness.profile.track import Tracker
from harness.samples import Dataset
from harness.trace import EVENTS_KEPT, Event, PhaseTrace, Trace, kind_of, label_of, micro_batch_of
from harness.workload import Workload


@dataclass(frozen=True)
class Execution:
    """What really happened: the trace, and the loss of every iteration (mean over its samples)."""

    trace: Trace
    losses: tuple[float, ...]
    metric: float | None = None
    max_rel_error: float | None = None


def execute(plan: Plan, workload: Workload, layered: Layered, dataset: Dataset) -> Execution:
    """Run the plan of a single device in this process. `layered` is trained in place.

    Before the clock starts one iteration is rehearsed without its update: it warms up, and it is watched tensor
    by tensor for the memory columns. Raises OrreryError for a data set that is smaller than the workload says.
    """
    if len(dataset) < workload.num_samples:
        raise OrreryError(
            f"The data set {workload.dataset} has {len(dataset)} training samples here, and the run was planned for "
            f"{workload.num_samples}. Pass --num-samples {len(dataset)}."
        )
    worker = _Worker(plan, workload, layered, dataset)
    memory = worker.rehearse()
    return worker.run(memory)


@dataclass(frozen=True)
class _Memory:
    """Most bytes made in one iteration at once, all together and by kind."""

    moving: int
    gradients: int
    activations: int


class _Worker:
    """A device's tensors by value, its optimizer, and its clock."""

    def __init__(self, plan: Plan, workload: Workload, layered: Layered, dataset: Dataset) -> None:
        self.plan, self.workload, self.layered, self.dataset = plan, workload, layered, dataset
        self.device = plan.devices[0]
        self.trainable = [p for p in layered.root.parameters() if p.requires_grad]
        self.optimizer = optimizer_for(workload, self.trainable) if workload.training else None
        self.values: dict[Value, Tensor] = {}
        self.loss = 0.0
        layered.root.train(workload.training)
        torch.manual_seed(workload.seed)

    def rehearse(self) -> _Memory:
        """The first iteration without its update, watched; everything it changes is put back."""
        buffers = [buffer.clone() for buffer in self.layered.root.buffers()]
        state = torch.get_rng_state()
        phase = self.plan.phases[0]
        batches = self._batches(phase, next(self._sample_ids()))
        tracker = Tracker()
        with tracker:
            for action in self._actions(phase):
                if not isinstance(action, Step):
                    self._do(action, phase, batches)
        gradients = {n for p in self.trainable if p.grad is not None and (n := tracker.number(p.grad)) is not None}
        memory = self._memory(tracker, gradients)
        for parameter in self.trainable:
            parameter.grad = None
        for buffer, before in zip(self.layered.root.buffers(), buffers, strict=True):
            buffer.copy_(before)
        torch.set_rng_state(state)
        return memory

    def _memory(self, tracker: Tracker, gradients: set[int]) -> _Memory:
        return _Memory(
            moving=max(tracker.levels()),
            gradients=sum(tracker.alive[number] for number in gradients),
            activations=max(tracker.levels(without=gradients)),
        )

    def _standing(self) -> dict[str, int]:
        """Bytes that stay from iteration to iteration, by kind."""
        states: list[dict[str, object]] = list(self.optimizer.state.values()) if self.optimizer is not None else []
        tensors: dict[str, list[Tensor]] = {
            "weights": list(self.layered.root.parameters()),
            "buffers": list(self.layered.root.buffers()),
            "optimizer": [t for state in states for t in state.values() if isinstance(t, Tensor)],
        }
        return {kind: sum(t.numel() * t.itemsize for t in held) for kind, held in tensors.items()}

    def run(self, memory: _Memory) -> Execution:
        events: list[Event] = []
        phases: list[PhaseTrace] = []
        losses: list[float] = []
        busy = 0.0
        ids = self._sample_ids()
        origin = time.perf_counter()
        for number, phase in enumerate(self.plan.phases):
            began = time.perf_counter()
            lengths: list[float] = []
            for iteration in range(phase.repeat):
                iteration_began = time.perf_counter()
                batches = self._batches(phase, next(ids))
                self.loss = 0.0
                for action in self._actions(phase):
                    start = time.perf_counter()
                    self._do(action, phase, batches)
                    end = time.perf_counter()
                    if isinstance(action, (Free, Commit)):
                        continue
                    busy += end - start
                    if iteration < EVENTS_KEPT:
                        events.append(self._event(action, start - origin, end - origin, number, iteration))
                losses.append(self.loss / phase.batch_size)
                lengths.append(time.perf_counter() - iteration_began)
            ended = time.perf_counter()
            phases.append(PhaseTrace(phase.name, phase.repeat, began - origin, ended - began, 0, tuple(lengths)))
        total = time.perf_counter() - origin
        standing = self._standing()
        moving = {"gradients": memory.gradients, "activations": memory.activations}
        trace = Trace(
            mode="emulated",
            devices=(self.device,),
            total_s=total,
            events=tuple(events),
            phases=tuple(phases),
            busy_s={self.device: {"compute": busy, "nic-out": 0.0, "nic-in": 0.0, "storage": 0.0}},
            link_bytes={},
            peak_bytes={self.device: sum(standing.values()) + memory.moving},
            memory_bytes={self.device: dict.fromkeys(KINDS, 0) | standing | moving},
        )
        return Execution(trace, tuple(losses) if self.workload.training else ())

    def _actions(self, phase: Phase) -> Sequence[Action]:
        return phase.actions[self.device]

    def _event(self, action: Action, start: float, end: float, phase: int, iteration: int) -> Event:
        return Event(
            self.device,
            "compute",
            kind_of(action),
            label_of(action),
            start,
            end,
            phase,
            iteration,
            micro_batch_of(action),
        )

    def _sample_ids(self) -> Iterator[list[int]]:
        """The samples of each iteration, epoch after epoch, each epoch in an order of its own."""
        total, size, epoch = self.workload.num_samples, self.workload.batch_size, 0
        while True:
            order = sample_order(total, epoch, self.workload.seed)
            yield from (order[i : i + size] for i in range(0, total, size))
            epoch += 1

    def _batches(self, phase: Phase, sample_ids: Sequence[int]) -> list[dict[str, Tensor]]:
        """The rows of every micro-batch, from the device's own copy of the data."""
        batches = []
        first = 0
        for rows in phase.micro_batches:
            batches.append(self.dataset.batch(sample_ids[first : first + rows]))
            first += rows
        return batches

    def _do(self, action: Action, phase: Phase, batches: Sequence[Mapping[str, Tensor]]) -> None:
        match action:
            case Compute(direction="forward"):
                self._forward(action, batches[action.micro_batch])
            case Compute():
                self._backward(action, phase.batch_size)
            case Step():
                assert self.optimizer is not None
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            case Free():
                for value in action.values:
                    self.values.pop(value, None)
            case Commit():
                pass
            case _:
                raise Unsupported(f"{type(action).__name__.lower()} needs a second device or a store")

    def _forward(self, action: Compute, batch: Mapping[str, Tensor]) -> None:
        """The whole model on one micro-batch; the loss holds the graph, and the graph what autograd saved."""
        with torch.set_grad_enabled(self.workload.training):
            written = self.layered.run(*action.units, dict(batch))
        if self.workload.training:
            self.loss += written["loss"].item()
            (saved,) = action.writes
            self.values[saved] = written["loss"]

    def _backward(self, action: Compute, batch_size: int) -> None:
        """Gradients of the mean loss over the whole batch: micro-batches and replicas just add up."""
        (saved,) = action.reads
        (self.values[saved] / batch_size).backward()
