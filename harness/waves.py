"""Pipelines beside each other that synchronise by waves: HetPipe's Wave Synchronous Parallel (ATC 2020, section 5).

A *virtual worker* is a group of devices, one stage each, through which whole mini-batches follow each other, W of them
in flight. All stages compute a mini-batch with the same weights: those with the updates of their own worker's
mini-batches up to W before it. A *wave* is W mini-batches. After each a worker pushes the sum of its gradients to a
parameter server, which adds those of all workers and updates the global weights; they are pulled with a clock distance
D: before the last mini-batch of wave c + 1 + D begins, the worker takes the global weights, in which are all updates of
the waves up to c, and adds what it has done itself since. With D = 0 it waits for all others once per wave.

The server is spread over the devices: each range of units that no worker cuts is served by a device that computes with
it, the workers taking turns, and a parameter that stages share likewise. Its sums and updates are in that device's
compute queue, after the wave D later, and whoever waits for a pull computes nothing meanwhile. The pull brings exactly
the updates that the distance demands, never more; mini-batches come in rounds, at whose end all weights are the same.
Plain SGD only: updates of others are added to one's own, which is exact where an update is linear in the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import Unsupported
from harness.plan import Action, Combine, Free, Phase, Plan, Recv, Send, Shard, Step, Tensor, Value
from harness.plan.updates import LOCAL, SERVED
from harness.plan.values import Range
from harness.schedules import Pipeline, Stage, StageWorker, gradients_of, next_version
from harness.search import Estimated, fastest, first_fitting, layers_of, straight_stages
from harness.stashing import Group, StashingPipeline, StashingWorker, rounds
from harness.workload import Workload


@dataclass(frozen=True)
class Waves:
    """Virtual workers, each of straight stages over the whole model. `wave`: mini-batches of a wave, and in flight.

    `distance`: the clock distance D.
    """

    costs: Costs
    workers: tuple[tuple[Stage, ...], ...]
    wave: int
    distance: int = 0
    optimizer: str = "sgd"
    clip: bool = False

    def __post_init__(self) -> None:
        if self.optimizer != "sgd":
            raise Unsupported(
                f"updates of virtual workers add up with plain SGD, and not with {self.optimizer}. Set optimizer sgd"
            )

    @cached_property
    def pipelines(self) -> tuple[WavePipeline, ...]:
        """One for each worker."""
        edges = sorted({edge for stages in self.workers for stage in stages for edge in stage.units})
        plain = [Pipeline(self.costs, stages) for stages in self.workers]
        apart = tuple(sorted({name for pipeline in plain for name in pipeline.tied}))
        return tuple(
            WavePipeline(
                self.costs, stages, self.optimizer, self.clip, regions=tuple(pairwise(edges)), apart=apart,
                waves=self, number=number,
            )
            for number, stages in enumerate(self.workers)
        )  # fmt: skip

    @cached_property
    def holders(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """Trained weights -> the devices of each worker that compute with them, in pipeline order."""
        found: dict[str, list[list[str]]] = {}
        for number, pipeline in enumerate(self.pipelines):
            for stage in pipeline.stages:
                for weights, names, _ in pipeline.groups(stage):
                    if self.costs.parameters[names[0]].trainable:
                        found.setdefault(weights, [[] for _ in self.workers])[number] += stage.devices
        return {weights: tuple(map(tuple, devices)) for weights, devices in found.items()}

    @cached_property
    def servers(self) -> Mapping[str, str]:
        """Trained weights -> the device that serves them."""
        count = len(self.workers)
        return {weights: devices[i % count][0] for i, (weights, devices) in enumerate(self.holders.items())}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor the phases name."""
        found: dict[str, Tensor] = {}
        for pipeline in self.pipelines:
            found |= pipeline.tensors
        return found | {served(weights): found[weights] for weights in self.holders}

    def phase(self, batches: Sequence[int], name: str = "train", repeat: int = 1) -> Phase:
        """One round of mini-batches of these row counts, which are dealt to the workers in turn."""
        phases = [
            pipeline.phase(batches, in_flight_of(self.wave, len(pipeline.stages)), name, repeat)
            for pipeline in self.pipelines
        ]
        shards: dict[str, Shard] = {}
        for number, part in enumerate(phases):
            for device, shard in part.shards.items():
                mine = range(number, len(batches), len(phases))
                rows = tuple(r if m in mine else (0, 0) for m, r in enumerate(shard.micro_batch_rows))
                shards[device] = replace(shard, micro_batch_rows=rows)
        live = {device: values for part in phases for device, values in part.live.items()}
        for weights, server in self.servers.items():
            live[server] = (*live[server], Value(served(weights)))
        shared = [weights for weights in self.holders if weights.startswith("weights:")]
        return replace(
            phases[0],
            shards=shards,
            actions={device: actions for part in phases for device, actions in part.actions.items()},
            live=live,
            tied={gradients_of(w): tuple(d for devices in self.holders[w] for d in devices) for w in shared},
        )


@dataclass(frozen=True)
class WavePipeline(StashingPipeline):
    """The pipeline of virtual worker `number`. Its weights are grouped by the ranges that no worker cuts."""

    waves: Waves | None = None
    number: int = 0

    @property
    def worker(self) -> type[StageWorker]:
        return _WaveWorker

    def groups(self, stage: Stage) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
        inside = tuple(r for r in self.regions if stage.units[0] <= r[0] and r[1] <= stage.units[1])
        return Pipeline(self.costs, self.stages, regions=inside, apart=(*self.apart, *self.tied)).groups(stage)


class _WaveWorker(StashingWorker):
    def __init__(
        self, pipeline: WavePipeline, p: int, i: int, rows: tuple[Range, ...], batches: tuple[int, ...]
    ) -> None:
        super().__init__(pipeline, p, i, rows, batches)
        assert pipeline.waves is not None
        self.waves, self.number = pipeline.waves, pipeline.number
        self.workers = len(self.waves.workers)
        self.mine = range(self.number, len(batches), self.workers)
        #: Waves of a round: those of the first worker, who has most.
        self.num_waves = -(-len(range(0, len(batches), self.workers)) // self.waves.wave)
        #: By weights and wave, the sum of this worker's gradients, as long as it is needed.
        self.sums: dict[tuple[str, int], Value] = {}
        self.served = 0  # waves

    def groups(self, ahead: Sequence[int]) -> list[Group]:
        """All stages update when the first one can, so that they compute a mini-batch with the same weights."""
        return [replace(group, lag=ahead[0] - ahead[self.p]) for group in super().groups(ahead)]

    def update(self, groups: Sequence[Group], turn: int) -> Iterator[Action]:
        wave, place = divmod(turn, self.waves.wave)
        ends, last = place == self.waves.wave - 1, wave == self.num_waves - 1
        pulls = ends and not last and wave >= self.waves.distance
        gradients = yield from self.summed(groups, self.mine[turn])
        if turn + self.waves.wave < len(self.mine) and not pulls:  # else nobody computes with it
            yield self.step(groups, gradients)
        for group, gradient in zip(groups, gradients, strict=True):
            yield from self._add(group, gradient, wave, place)
        if ends or turn == len(self.mine) - 1:
            for group in groups:
                yield from self._push(group, wave)
        if pulls:
            yield from self._serve(groups, wave - self.waves.distance)
            yield from self._pull(groups, wave + 1 - self.waves.distance)
            for own in range(wave + 1 - self.waves.distance, wave + 1):
                yield self.step(groups, tuple(self.sums[group.weights.name, own] for group in groups))
            yield from self._forget(groups, wave)

    def finish(self, groups: Sequence[Group]) -> Iterator[Action]:
        for wave in range(self.served, self.num_waves):
            yield from self._serve(groups, wave)
        yield from self._pull(groups, self.num_waves)
        if self.sums:
            yield Free(tuple(self.sums.values()))

    def _add(self, group: Group, gradient: Value, wave: int, place: int) -> Iterator[Action]:
        """Add a mini-batch's gradient to the sum of its wave."""
        key = group.weights.name, wave
        if place == 0:
            self.sums[key] = gradient
            return
        total = self.sums[key]
        self.sums[key] = next_version(total)
        yield Combine("sum", (total, gradient), self.sums[key], in_place=True)
        yield Free((gradient,))

    def _pushed(self, weights: str, number: int, wave: int) -> Value | None:
        """The sum that a worker pushes of a wave, if it has any mini-batch of it."""
        mine = range(number, len(self.batches), self.workers)[wave * self.waves.wave :][: self.waves.wave]
        if not mine:
            return None
        summed = len(self.waves.holders[weights][number]) > 1
        return Value(gradients_of(weights), mine[0], version=len(mine) - 1 + summed)

    def _push(self, group: Group, wave: int) -> Iterator[Action]:
        weights = group.weights.name
        server = self.waves.servers[weights]
        if server != self.device == self.waves.holders[weights][self.number][0]:
            yield Send(self.sums[weights, wave], server)

    def _serve(self, groups: Sequence[Group], wave: int) -> Iterator[Action]:
        """Of the weights that this device serves: sum up the pushes of a wave, update, and send whoever will pull."""
        self.served = wave + 1
        for group in groups:
            weights = group.weights.name
            if self.waves.servers[weights] != self.device:
                continue
            own: list[Value] = []
            pushed: list[Value] = []
            for number, devices in enumerate(self.waves.holders[weights]):
                value = self._pushed(weights, number, wave)
                if value is not None and devices[0] == self.device:
                    own.append(value)
                elif value is not None:
                    yield Recv(value, devices[0])
                    pushed.append(value)
            total = (pushed + own)[0]
            if len(pushed + own) > 1:
                total = total._replace(version=total.version + self.waves.wave + 1)
                yield Combine("sum", (*pushed, *own), total, in_place=True)
            before = Value(served(weights), version=wave)
            # Who has pushed this wave has the old ones already; to others they may still be on their way.
            heard = self.waves.distance == 0 and len(pushed + own) == self.workers
            kept = () if heard else (before,)
            yield Step(self._units(group), (total,), (before,), (next_version(before),), kept=kept)
            if spent := (*kept, *((total, *pushed[1:]) if pushed else ())):
                yield Free(spent)
            if wave + 1 + self.waves.distance < self.num_waves or wave + 1 == self.num_waves:
                for devices in self.waves.holders[weights]:
                    for device in devices:
                        if device != self.device:
                            yield Send(next_version(before), device)

    def _units(self, group: Group) -> Range:
        _, _, place = group.weights.name.partition("@")
        if not place:
            return self.stage.units
        first, last = map(int, place.split(":"))
        return first, last

    def _pull(self, groups: Sequence[Group], version: int) -> Iterator[Action]:
        """Take the global weights of that version for one's own."""
        needed = self.needed()
        for group in groups:
            server = self.waves.servers[group.weights.name]
            pulled = Value(served(group.weights.name), version=version)
            if server != self.device:
                yield Recv(pulled, server)
            old = group.weights._replace(version=self.newest[group.weights])
            if old not in needed:
                yield Free((old,))
            self.newest[group.weights] += 1
            yield Combine("sum", (pulled,), next_version(old), in_place=server != self.device)

    def _forget(self, groups: Sequence[Group], wave: int) -> Iterator[Action]:
        """Let go of the sums that nobody needs after the end of a wave."""
        for group in groups:
            serves = self.waves.servers[group.weights.name] == self.device
            oldest = wave + 1 - self.waves.distance + (not serves and self.waves.distance > 0)
            spent = [key for key in self.sums if key[0] == group.weights.name and key[1] < oldest]
            if spent:
                yield Free(tuple(self.sums.pop(key) for key in spent))


def served(weights: str) -> str:
    """The name of the server's copy of the value `weights...`."""
    return SERVED + weights.removeprefix(LOCAL)


def in_flight_of(wave: int, num_stages: int) -> list[int]:
    """How many mini-batches each stage of a worker has in flight."""
    return [wave, *(min(wave, num_stages - p) for p in range(1, num_stages))]


def plan_waves(
    method: str,
    workload: Workload,
    costs: Costs,
    cluster: Cluster,
    groupings: Sequence[Sequence[Sequence[str]]],
    distance: int,
    batches_per_flush: int,
) -> Plan:
    """The fastest of the `groupings` into virtual workers, which are device names in pipeline order.

    Whole batches are mini-batches. A wave has as many as the longest worker has stages, or fewer where memory is short.
    Raises OutOfMemory where nothing fits.
    """

    def largest_wave(workers: Sequence[Sequence[str]]) -> Estimated:
        waves = range(max(map(len, workers)), 0, -1)
        planned = partial(_plan, method, workload, costs, cluster, workers, distance, batches_per_flush)
        return first_fitting([partial(planned, wave) for wave in waves], costs, cluster)

    return fastest([partial(largest_wave, workers) for workers in groupings], costs, cluster)


def _plan(
    method: str,
    workload: Workload,
    costs: Costs,
    cluster: Cluster,
    workers: Sequence[Sequence[str]],
    distance: int,
    batches_per_flush: int,
    wave: int,
) -> Plan:
    cut = tuple(tuple(_stages(workload, costs, cluster, devices, wave, distance)) for devices in workers)
    waves = Waves(costs, cut, wave, distance, workload.optimizer, clip=workload.clip_norm is not None)
    built: dict[tuple[tuple[int, ...], int], Phase] = {}
    phases: list[Phase] = []
    for batches, repeat in rounds(workload, batches_per_flush, first=(2 + distance) * wave * len(workers)):
        if (batches, repeat) not in built:
            built[batches, repeat] = waves.phase(batches, f"round of {len(batches)}", repeat)
        phases.append(built[batches, repeat])
    return Plan(
        method=method,
        num_units=len(costs.units),
        tensors=waves.tensors,
        phases=tuple(phases),
        summary={
            "virtual_workers": [list(devices) for devices in workers],
            "layer_cuts": [[layers_of(costs, stage.units) for stage in stages] for stages in cut],
            "micro_batch_size": workload.batch_size,
            "num_micro_batches": 1,
            "wave": wave,
            "local_staleness": wave - 1,
            "clock_distance": distance,
            "batches_per_flush": max(len(phase.micro_batches) for phase in phases),
        },
    )


def _stages(
    workload: Workload, costs: Costs, cluster: Cluster, devices: Sequence[str], wave: int, distance: int
) -> list[Stage]:
    """Stages of a worker, balanced among the cuts that fit its devices.

    Beside the versions in flight a stage has gradients that wait for the first one, the sums of the waves that it has
    not got back yet, and about one server's copy.
    """
    own = replace(cluster, devices=tuple(cluster.device(name) for name in devices))
    ahead = in_flight_of(wave, len(devices))
    copies = [wave + 2 + distance for _ in ahead]
    return straight_stages(workload, costs, own, workload.batch_size, lambda _: ahead, copies=copies)
