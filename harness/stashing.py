"""Pipelines that don't wait for their updates: PipeDream's weight stashing (SOSP 2019, sections 3.2 and 3.3).

Mini-batches follow each other down the pipeline, whole, and each has an update of its own at every stage. A forward
pass takes the newest weights of its stage; its backward pass takes the same ones, which the stage keeps until then. A
stage that has k mini-batches in flight computes with weights that lack the k - 1 updates before, and keeps k versions.

Our phases begin and end with an empty pipeline, so mini-batches come in rounds, between which it drains. The rows of a
mini-batch are shared among the replicas of a stage, whose gradients are summed before each update; PipeDream's replicas
take whole mini-batches in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from harness.cluster import Cluster
from harness.costs import FORWARD, Costs
from harness.errors import OrreryError, Unsupported
from harness.plan import Action, Collective, Combine, Commit, Free, Phase, Plan, Step, Value
from harness.plan.values import Range
from harness.schedules import Pipeline, Stage, StageWorker, in_flight, next_version, one_f_one_b, state_of
from harness.search import first_fitting, summary
from harness.workload import Workload


@dataclass(frozen=True)
class StashingPipeline(Pipeline):
    """Stages in order; every micro-batch is a mini-batch with an update of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.costs.training:
            raise Unsupported("weights are stashed between updates, and inference has none")
        if self.clip:
            raise Unsupported(
                "the norm of all gradients is known when the first stage has its own, and later stages update before. "
                "Leave clip_norm away"
            )

    @property
    def worker(self) -> type[StageWorker]:
        return StashingWorker

    def phase(self, batches: Sequence[int], warmup: Sequence[int], name: str = "train", repeat: int = 1) -> Phase:
        """One round of mini-batches of these row counts; stage p keeps warmup[p] of them in flight."""
        return replace(super().phase(batches, warmup, name, repeat), mini_batches=True)


@dataclass(frozen=True)
class Group:
    """Weights that are updated together with all copies of them, `lag` mini-batches behind this stage's own passes.

    Tied weights are updated when the first stage that holds them has its gradient, which is the last to have it. Later
    stages are `lag` mini-batches ahead of it, so that all copies have the same versions for the same mini-batch.
    """

    weights: Value
    state: tuple[Value, ...]
    gradient: Value
    devices: tuple[str, ...]
    lag: int


class StashingWorker(StageWorker):
    """`mine`: the mini-batches that come down this pipeline, in order."""

    def __init__(self, pipeline: Pipeline, p: int, i: int, rows: tuple[Range, ...], batches: tuple[int, ...]) -> None:
        super().__init__(pipeline, p, i, rows, batches)
        self.mine: Sequence[int] = range(len(batches))
        self.newest: dict[Value, int] = dict.fromkeys(self.weights, 0)
        self.began: dict[int, tuple[Value, ...]] = {}

    def iteration(self, warmup: Sequence[int]) -> Iterator[Action]:
        count = len(self.mine)
        groups = self.groups([in_flight(ahead, count) for ahead in warmup])
        for direction, turn in one_f_one_b(warmup[self.p], count):
            m = self.mine[turn]
            if not self._active(m):
                pass
            elif direction == FORWARD:
                self.began[m] = self.current()
                yield from self._forward(m)
            else:
                yield from self._backward(m)
                yield from self._let_go(m)
            if direction != FORWARD:
                yield from self._updates(groups, turn)
        for turn in range(count, count + max((group.lag for group in groups), default=0)):
            yield from self._updates(groups, turn)
        yield from self.finish(groups)
        yield Commit()

    def finish(self, groups: Sequence[Group]) -> Iterator[Action]:
        """What is left to be done when all updates are."""
        yield from ()

    def current(self) -> tuple[Value, ...]:
        """The newest weights."""
        return tuple(value._replace(version=version) for value, version in self.newest.items())

    def needed(self) -> set[Value]:
        """The weights of the mini-batches in flight."""
        return {value for weights in self.began.values() for value in weights}

    def groups(self, ahead: Sequence[int]) -> list[Group]:
        """ahead[p]: how many mini-batches stage p has in flight."""
        stage_of = {device: p for p, stage in enumerate(self.pipeline.stages) for device in stage.devices}
        return [
            Group(
                weights,
                tuple(value for value in self.state if value.name == state_of(weights.name)),
                gradient,
                devices,
                ahead[stage_of[devices[0]]] - ahead[self.p],
            )
            for weights, (gradient, devices) in zip(self.trained, self.gradients, strict=True)
        ]

    def _weights(self, m: int) -> tuple[Value, ...]:
        return self.began[m]

    def _gradients(self, m: int) -> tuple[Value, ...]:
        return tuple(value._replace(micro_batch=m) for value, _ in self.gradients)

    def _let_go(self, m: int) -> Iterator[Action]:
        """Of the weights of mini-batch m those that nobody needs any more."""
        mine = self.began.pop(m)
        needed = self.needed().union(self.current())
        if spent := tuple(value for value in mine if value not in needed):
            yield Free(spent)

    def _updates(self, groups: Sequence[Group], turn: int) -> Iterator[Action]:
        """The updates that are due after this device's backward pass of that turn."""
        for lag in sorted({group.lag for group in groups}):
            if 0 <= turn - lag < len(self.mine):
                yield from self.update([group for group in groups if group.lag == lag], turn - lag)

    def update(self, groups: Sequence[Group], turn: int) -> Iterator[Action]:
        """The update of the mini-batch of that turn."""
        gradients = yield from self.summed(groups, self.mine[turn])
        yield self.step(groups, gradients)
        yield Free(gradients)

    def summed(self, groups: Sequence[Group], m: int) -> Generator[Action, None, tuple[Value, ...]]:
        """The gradients of mini-batch m, of all its rows."""
        found: list[Value] = []
        for group in groups:
            gradient = group.gradient._replace(micro_batch=m)
            if not self._active(m):
                yield Combine("sum", (), gradient)
            if len(group.devices) > 1:
                yield Collective("all-reduce", gradient, next_version(gradient), group.devices)
                gradient = next_version(gradient)
            found.append(gradient)
        return tuple(found)

    def step(self, groups: Sequence[Group], gradients: tuple[Value, ...]) -> Step:
        """The update of the newest weights, which stay for the passes that began with them."""
        needed = self.needed()
        weights = tuple(group.weights._replace(version=self.newest[group.weights]) for group in groups)
        versions = [(value, self.newest[group.weights]) for group in groups for value in group.state]
        reads = weights + tuple(value._replace(version=version) for value, version in versions)
        kept = tuple(value for value in weights if value in needed)
        self.newest.update((group.weights, self.newest[group.weights] + 1) for group in groups)
        return Step(self.stage.units, gradients, reads, tuple(map(next_version, reads)), kept=kept)


def rounds(workload: Workload, most: int, first: int) -> list[tuple[tuple[int, ...], int]]:
    """The run as (rows of each mini-batch, repeat) in order: rounds of at most `most` mini-batches, none across epochs.

    The run begins with one of `first` mini-batches, because before the clock starts the first round is rehearsed. The
    smaller last mini-batch of an epoch joins a round that has room.
    """
    found: list[tuple[tuple[int, ...], int]] = []
    for size, repeat in workload.batches():
        if size < workload.batch_size:
            batches, times = found[-1]
            if times == 1 and len(batches) < most:
                found[-1] = (*batches, size), 1
            else:
                found.append(((size,), repeat))
            continue
        if not found:
            head = min(first, most, repeat)
            found.append(((size,) * head, 1))
            repeat -= head
        whole, rest = divmod(repeat, most)
        found += [((size,) * count, times) for count, times in ((most, whole), (rest, 1)) if count and times]
    return found


def plan_stashing(
    method: str,
    workload: Workload,
    costs: Costs,
    cluster: Cluster,
    stages: Callable[[int], Sequence[Stage]],
    batches_per_flush: object,
) -> Plan:
    """Whole batches as mini-batches, of which stage p of P has P - p in flight; fewer where memory is short.

    `stages(depth)` is what the method decides, for at most `depth` in flight. `batches_per_flush`: mini-batches of a
    round, an option. Raises OutOfMemory where not even one in flight fits.
    """
    if type(batches_per_flush) is not int or batches_per_flush < 1:
        raise OrreryError(f"batches_per_flush is {batches_per_flush!r}; it must be a whole number from 1 up.")
    planned = partial(_plan, method, workload, costs, stages, batches_per_flush)
    depths = range(len(cluster.devices), 0, -1)
    return first_fitting([partial(planned, depth) for depth in depths], costs, cluster).plan


def _plan(
    method: str,
    workload: Workload,
    costs: Costs,
    stages: Callable[[int], Sequence[Stage]],
    batches_per_flush: int,
    depth: int,
) -> Plan:
    chosen = tuple(stages(depth))
    warmup = [min(len(chosen) - p, depth) for p in range(len(chosen))]
    pipeline = StashingPipeline(costs, chosen, workload.optimizer, clip=workload.clip_norm is not None)
    built: dict[tuple[tuple[int, ...], int], Phase] = {}
    phases: list[Phase] = []
    for batches, repeat in rounds(workload, batches_per_flush, first=2 * len(chosen)):
        if (batches, repeat) not in built:
            built[batches, repeat] = pipeline.phase(batches, warmup, f"round of {len(batches)}", repeat)
        phases.append(built[batches, repeat])
    return Plan(
        method=method,
        num_units=len(costs.units),
        tensors=pipeline.tensors,
        phases=tuple(phases),
        summary={
            **dict(summary(costs, chosen, workload.batch_size, phases[0])),
            "num_micro_batches": 1,
            "in_flight": warmup,
            "staleness": [ahead - 1 for ahead in warmup],
            "batches_per_flush": max(len(phase.micro_batches) for phase in phases),
        },
    )
