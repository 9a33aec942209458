"""Several devices in one process: a worker, a transport and a shard each, in threads."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from harness import datasets, reference
from harness.cache import ActivationCache
from harness.costs import Costs
from harness.engine import DeviceReport, Execution, ModelShard, Worker, execution, programs
from harness.engine.checkpoint import BEGINNING, Progress, epoch_ends, file_digest, path_of, restore, save
from harness.engine.program import held, peers
from harness.manifest import sample_keys
from harness.models import shards
from harness.plan import Plan
from harness.schedules import Pipeline, Stage, micro_batches
from harness.transport import PeerLost, Transport
from harness.workload import Workload

#: A thread that takes longer hangs.
TIMEOUT_S = 60


@dataclass(frozen=True)
class Outcome:
    """What became of one device: its shard and report, or the error that ended it; `ended_s` by `perf_counter`.

    `answers`: of inference, the samples and logits of every request.
    """

    shard: ModelShard | None
    report: DeviceReport | None
    error: BaseException | None
    ended_s: float
    answers: Sequence[tuple[Sequence[int], Tensor]] = ()


@dataclass(frozen=True)
class Trained:
    """What a run on several devices leaves: its execution, and of each device its report and what it holds by name.

    `state` has weights and the optimizer's state, as `reference.state` names them.
    """

    execution: Execution
    reports: Mapping[str, DeviceReport]
    shards: Mapping[str, ModelShard]

    @property
    def state(self) -> dict[str, dict[str, Tensor]]:
        return {name: reference.state(shard.layered.root, shard.optimizers) for name, shard in self.shards.items()}


def by_hand(
    costs: Costs, workload: Workload, stages: Sequence[Stage], micro_batch_size: int, warmup: Sequence[int]
) -> Plan:
    """The workload on these stages, without a planner."""
    pipeline = Pipeline(costs, tuple(stages), workload.optimizer, clip=workload.clip_norm is not None)
    sizes = {batch: micro_batches(batch, micro_batch_size) for batch, _ in workload.batches()}
    phases = tuple(pipeline.phase(sizes[batch], warmup, repeat=repeat) for batch, repeat in workload.batches())
    return Plan("by-hand", len(costs.units), pipeline.tensors, phases)


def run_devices(
    plan: Plan,
    workload: Workload,
    folder: Path,
    data_dir: Path | None = None,
    before: Callable[[str, ModelShard], object] = lambda device, shard: None,
    pace: Sequence[Mapping[str, Mapping[int, float]]] = (),
    state: Path | None = None,
    done: Progress = BEGINNING,
) -> Trained:
    """Run the plan for real, over loopback. Raises what the first device to fail raised.

    `before(device, shard)` is called when the shard is loaded; `pace` as `harness.simulator.own_seconds` gives it.
    `state` and `done` as `outcomes` takes them.
    """
    plan = replace(plan, phases=plan.phases[done.phases :])
    plans = dict.fromkeys(plan.devices, plan)
    found = outcomes(plans, workload, folder, data_dir, before, pace=pace, state=state, done=done)
    failed = [outcome for outcome in found.values() if outcome.error is not None]
    if failed:
        first = min(failed, key=lambda outcome: (secondary(outcome), outcome.ended_s))
        assert first.error is not None
        raise first.error
    reports = {name: outcome.report for name, outcome in found.items() if outcome.report is not None}
    kept = {name: outcome.shard for name, outcome in found.items() if outcome.shard is not None}
    return Trained(execution(plan, list(reports.values()), workload.training), reports, kept)


def secondary(outcome: Outcome) -> bool:
    """Whether the device only met another one's end."""
    return isinstance(outcome.error, threading.BrokenBarrierError | PeerLost)


def outcomes(
    plans: Mapping[str, Plan],
    workload: Workload,
    folder: Path,
    data_dir: Path | None = None,
    before: Callable[[str, ModelShard], object] = lambda device, shard: None,
    progress: Callable[[str, int, Transport], object] = lambda device, number, transport: None,
    pace: Sequence[Mapping[str, Mapping[int, float]]] = (),
    state: Path | None = None,
    done: Progress = BEGINNING,
) -> dict[str, Outcome]:
    """Each device runs its own plan, which should be the same; `progress` is called after each iteration.

    A workload's weights are written into `folder` once. In the folder `state` the devices write what they have after
    every epoch, and where something is `done` they go on from there; then caches stay.
    """
    weights = folder / f"weights{hash(workload)}.safetensors"
    if not weights.exists():
        shards.write(workload, weights)
    dataset = datasets.load(workload, data_dir)
    secret = secrets.token_bytes(32)
    transports = {device: Transport(device, secret, 1) for device in plans}
    addresses = {device: transport.listen("127.0.0.1") for device, transport in transports.items()}
    together = threading.Barrier(len(plans), timeout=TIMEOUT_S)
    found: dict[str, Outcome] = {}

    def device_main(device: str) -> None:
        transport, plan = transports[device], plans[device]
        shard, report, failure, worker = None, None, None, None
        cache = ActivationCache(folder / f"cache-{device}", {}, sample_keys(dataset, workload.num_samples))
        try:
            mine = programs(plan, device)
            layered = shards.load(workload, weights, *held(plan, device))
            shard = ModelShard(layered, workload, plan, torch.device("cpu"))
            losses, live = [], plan.phases[0].live[device]
            if state is not None and done.epochs:
                path = path_of(state, done.epochs, device)
                losses = restore(path, file_digest(path), shard, live, done.trained)
            shard.complete(weights, live)
            before(device, shard)
            ends = {} if state is None else epoch_ends(plan, workload, done)

            def phase_over(place: int, losses: Sequence[float]) -> None:
                if state is not None and place in ends:
                    save(path_of(state, ends[place].epochs, device), shard, plan.phases[place + 1].live[device], losses)

            outgoing, incoming = peers(mine)
            transport.connect({peer: addresses[peer] for peer in outgoing}, incoming, timeout_s=20)
            worker = Worker(
                device,
                plan,
                mine,
                workload,
                shard,
                dataset,
                transport,
                barrier=together.wait,
                progress=lambda number: progress(device, number, transport),
                pace=[phase[device] for phase in pace],
                cache=cache if any(program.storage for program in mine) else None,
                begin=done,
                losses=losses,
                phase_over=phase_over,
            )
            worker.start()
            moving = worker.rehearse()
            together.wait()
            report = worker.run(time.perf_counter(), moving)
            together.wait()
        except BaseException as error:
            failure = error
            together.abort()
        finally:
            transport.close()
            if worker is not None:
                worker.stop()
            if state is None:
                cache.clear()
            cache.close()
            given = () if worker is None else worker.answers
            found[device] = Outcome(shard, report, failure, time.perf_counter(), given)

    threads = [threading.Thread(target=device_main, args=(device,), daemon=True) for device in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert not any(thread.is_alive() for thread in threads), "a device hangs"
    return found
