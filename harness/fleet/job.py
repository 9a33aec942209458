"""What a worker process does for a plan: loads its shard and data, meets its peers, rehearses, runs, reports."""

from __future__ import annotations

import gc
import json
import resource
import shutil
import sys
import traceback
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness import models, samples
from harness.cache import ActivationCache
from harness.datasets import batches
from harness.engine import DeviceReport, ModelShard, Worker, check_samples, checkpoint, programs
from harness.engine.checkpoint import Progress, epoch_ends
from harness.engine.program import Program, held, peers, rows_of
from harness.engine.snapshots import Snapshot, restored
from harness.errors import Broken, OrreryError, Unsupported
from harness.fleet import faults, probe
from harness.fleet.channel import Channel, Closed, Message
from harness.fleet.mailbox import Mailbox, Regroup
from harness.fleet.processes import enter
from harness.fleet.supervisor import Pulse
from harness.heap import keep_freed_memory
from harness.manifest import sample_keys
from harness.models import shards
from harness.models.cuts import Piece
from harness.plan import Plan
from harness.plan.serial import from_json
from harness.reference import state
from harness.samples import Dataset
from harness.transport import PeerLost, Transport, TransportError
from harness.workload import Workload

WEIGHTS, SAMPLES = "weights.safetensors", "samples.safetensors"
REPORT = TypeAdapter(DeviceReport)
PIECE = TypeAdapter(Piece)
CONNECT_S = 60.0
ACCELERATORS = {"cpu": "cpu", "gpu": "cuda"}
#: A thread that has something to do gets its turn after this long: a receive must not wait for Python code.
SWITCH_S = 2e-4
#: In a generation that follows another one no iteration is watched: that would take time.
NOTHING_WATCHED = {"moving": 0, "gradients": 0, "activations": 0}


@dataclass(frozen=True)
class Job:
    """One device's part of a run. `folder` holds the weights and samples; `host` is the address to listen on.

    `enter` are files that take the process's id, which moves it into its control groups; `enter_computing` take that of
    the thread that computes, once the others run.
    `pace`: of every phase the seconds of each node that the device does by itself; none: as fast as it can.
    `latency_s` is added to every message. `save` writes the trained shard into the folder.
    `identity`: what the activation cache is of; it lies in `cache`, where it stays, or else in the folder.
    `state`: a folder for what the device has when an epoch is over. `done` is the progress before the plan's first
    phase, and `state_digest` that of the state which was written then.
    `recovers`: where a peer is lost, the worker waits for the job of the next generation. That one `follows` others:
    `losses` are those of the rounds that are done, and the values `restore` are as in the snapshot of that time.
    `faults` are what is to happen to the device, which takes `slowness` times as long as its pace says.
    """

    device: str
    plan: str
    workload: Mapping[str, Any]
    folder: str
    generation: int
    secret: str
    host: str
    port: int = 0
    latency_s: float = 0.0
    send_buffer_bytes: int | None = None
    accelerator: str = "cpu"
    enter: tuple[str, ...] = ()
    enter_computing: tuple[str, ...] = ()
    pace: Sequence[Mapping[str, float]] = ()
    save: bool = False
    identity: Mapping[str, Any] = field(default_factory=dict)
    cache: str | None = None
    state: str | None = None
    done: Mapping[str, int] = field(default_factory=dict)
    state_digest: str | None = None
    recovers: bool = False
    follows: bool = False
    losses: Sequence[float] = ()
    restore: Sequence[str] = ()
    faults: Sequence[Mapping[str, Any]] = ()
    slowness: float = 1.0


@dataclass
class _Member:
    """What a worker has of one generation, and leaves to the next one."""

    transport: Transport
    shard: ModelShard | None = None
    dataset: Dataset | None = None
    worker: Worker | None = None
    snapshots: Sequence[Snapshot] = ()

    def call_off(self, regroup: Regroup) -> None:
        if self.worker is not None:
            self.worker.fail(regroup)
        self.transport.close()


def work(channel: Channel, message: Message, pulse: Pulse) -> None:
    """Do the job, or the probe, that the message holds. What goes wrong is told to the coordinator:
    `{"failed": {kind, message, secondary, unsupported, refused, traceback}}`."""
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        if "probe" in message:
            probe.work(channel, message["probe"])
        else:
            _work(channel, Job(**message["plan"]), pulse)
    except Closed:
        raise
    except BaseException as error:
        failed = {
            "kind": type(error).__name__,
            "message": str(error),
            "secondary": isinstance(error, PeerLost),
            "unsupported": isinstance(error, Unsupported),
            "refused": isinstance(error, OrreryError),
            "traceback": traceback.format_exc(),
        }
        channel.send({"failed": failed})
        raise SystemExit(1) from error


def _work(channel: Channel, job: Job, pulse: Pulse) -> None:
    """One generation after the other, until one comes to its end."""
    enter(job.enter)
    sys.setswitchinterval(SWITCH_S)
    mailbox, before = Mailbox(channel, job.generation), None
    while True:
        member = _Member(
            Transport(
                job.device,
                bytes.fromhex(job.secret),
                job.generation,
                latency_s=job.latency_s,
                send_buffer_bytes=job.send_buffer_bytes,
            )
        )
        try:
            _take_part(mailbox, job, pulse, member, before)
            return
        except Regroup as found:
            regroup = found
        except TransportError as error:
            if not job.recovers:
                raise
            regroup = _called_off(mailbox, error)
        finally:
            if member.worker is not None:
                member.worker.stop()
            member.transport.close()
        before = member
        mailbox.begin(regroup)
        job = Job(**regroup.job)


def _called_off(mailbox: Mailbox, error: TransportError) -> Regroup:
    """Wait to be told how it goes on without the peer that is lost."""
    try:
        mailbox.check()
        mailbox.send({"lost": str(error)})
        while True:
            mailbox.receive()
    except Regroup as regroup:
        return regroup


def _take_part(mailbox: Mailbox, job: Job, pulse: Pulse, member: _Member, before: _Member | None) -> None:
    """One generation. What a later one needs is left with the member; `before`: what the one before has left."""
    if before is not None:
        member.shard, member.dataset, member.snapshots = before.shard, before.dataset, before.snapshots
    plan, workload, transport = from_json(job.plan), Workload(**job.workload), member.transport
    mine, begin = programs(plan, job.device), Progress(**job.done)
    cache: ActivationCache | None = None
    mailbox.on_call_off(member.call_off)
    try:
        mailbox.send({"listening": transport.listen(job.host, job.port)})
        snapshot = _snapshot(job, member)
        if member.shard is not None and snapshot is not None:
            shard, losses = _restored(job, plan, member.shard, snapshot), list(job.losses)
        else:
            shard, losses = _shard(job, plan, workload, begin)
            losses = [*job.losses] or losses
        dataset = member.dataset or samples.read(Path(job.folder) / SAMPLES)
        member.shard, member.dataset = shard, dataset
        check_samples(workload, dataset)
        if any(program.storage for program in mine):
            cache = _cache(job, plan, workload, dataset)
            if plan.phases[0].cached:
                _check_filled(cache, mine, workload)
        addresses = {name: tuple(address) for name, address in mailbox.receive()["peers"].items()}
        outgoing, incoming = peers(mine)
        transport.connect({peer: addresses[peer] for peer in outgoing}, incoming, timeout_s=CONNECT_S)

        def barrier(about: Message | None = None) -> None:
            mailbox.send({"reached": about or True})
            mailbox.receive()

        def commit(trained: int, losses: Sequence[float], seconds: float) -> None:
            barrier({"trained": trained, "losses": list(losses), "seconds": seconds})

        ends = epoch_ends(plan, workload, begin) if job.state is not None else {}

        def phase_over(place: int, losses: Sequence[float]) -> None:
            if place in ends:
                if cache is not None:
                    cache.sync()
                path = checkpoint.path_of(Path(job.state or ""), ends[place].epochs, job.device)
                digest = checkpoint.save(path, shard, plan.phases[place + 1].live[job.device], losses)
                mailbox.send({"saved": {"epochs": ends[place].epochs, "digest": digest}})

        worker = member.worker = Worker(
            job.device,
            plan,
            mine,
            workload,
            shard,
            dataset,
            transport,
            barrier,
            pulse.progress,
            [{int(node): seconds for node, seconds in phase.items()} for phase in job.pace],
            cache,
            begin,
            losses,
            phase_over,
            job.save,
            snapshot,
            commit,
            job.slowness,
        )
        if job.faults:
            worker.fault = faults.trigger(job.faults, mailbox, worker.slow_down)
        member.snapshots = worker.snapshots
        mailbox.check()
        worker.start()
        if before is None:
            enter(job.enter_computing)
        moving = NOTHING_WATCHED
        if not job.follows:
            moving = worker.rehearse()
            gc.collect()
            gc.freeze()  # what is there now stays: no need to look through it again and again
        mailbox.send({"ready": True})
        report = worker.run(mailbox.receive()["go"], moving)
        if job.save and workload.training:
            _save(shard, job)
        elif job.save and worker.answers:
            _save_answers(worker.answers, job)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        mailbox.send({"done": REPORT.dump_python(report, mode="json") | {"process_peak_bytes": peak}})
        mailbox.receive()  # all others are done, too: nobody misses us
    finally:
        if cache is not None and job.cache is None:
            cache.clear()
        elif cache is not None:
            cache.close()


def _snapshot(job: Job, member: _Member) -> Snapshot | None:
    """The one that all go back to; None: they begin anew, or this is the first generation."""
    trained = job.done.get("trained", 0)
    found = next((snapshot for snapshot in member.snapshots if snapshot.trained == trained), None)
    if found is None and job.restore:
        raise Broken(f"{job.device} has no snapshot of round {trained}.")
    return found


def _restored(job: Job, plan: Plan, before: ModelShard, snapshot: Snapshot) -> ModelShard:
    """The shard with what the device has of the snapshot, its own or another's. What is frozen is in the file."""
    phases = before.plan.phases
    before.forget({v for phase in phases for v in (*phase.live.get(job.device, ()), *phase.leaves_of(job.device))})
    shard = restored(snapshot, job.restore, before, plan)
    shard.complete(Path(job.folder) / WEIGHTS, plan.phases[0].live.get(job.device, ()))
    return shard


def _cache(job: Job, plan: Plan, workload: Workload, dataset: Dataset) -> ActivationCache:
    """A cache that, for what is damaged, reads the frozen weights once more and makes it again."""

    def recompute(names: Sequence[str], sample_ids: Sequence[int]) -> dict[str, Tensor]:
        layered = shards.load(workload, Path(job.folder) / WEIGHTS, 0, plan.num_units)
        with torch.no_grad():
            return layered.run(0, plan.num_units, dataset.batch(sample_ids), wanted=names)

    folder = Path(job.cache or Path(job.folder) / "cache") / job.device
    if job.cache is None:
        shutil.rmtree(folder, ignore_errors=True)  # of a worker that was killed
    return ActivationCache(folder, job.identity, sample_keys(dataset, workload.num_samples), recompute)


def _check_filled(cache: ActivationCache, mine: Sequence[Program], workload: Workload) -> None:
    """Refuse a cache that lacks something of what the device will load in an epoch. Its samples are the same in all."""
    wanted: dict[str, set[int]] = defaultdict(set)
    ids, left = batches(workload), workload.num_samples
    for program in mine:
        for _ in range(program.phase.repeat):
            if left > 0:
                batch = next(ids)
                left -= len(batch)
                for value in program.loads:
                    wanted[value.name].update(rows_of(program.phase, value, batch))
    for name, found in wanted.items():
        if absent := cache.absent(name, sorted(found)):
            raise OrreryError(
                f"The activation cache in {cache.folder} has no {name} of {len(absent)} of the {len(found)} samples "
                f"that the device needs, sample {absent[0]} among them. Fill it by a run with the same testbed, batch "
                "size and rows per device that trains its first epoch with the backbone."
            )


def _shard(job: Job, plan: Plan, workload: Workload, begin: Progress) -> tuple[ModelShard, list[float]]:
    """The model with weights for what this device holds in the beginning; what comes by a plan is left out.

    They are those of the file, or where the run goes on those that it had then; with the losses up to then.
    """
    weights, live = Path(job.folder) / WEIGHTS, plan.phases[0].live.get(job.device, ())
    layered = shards.load(workload, weights, *held(plan, job.device))
    shard = ModelShard(layered, workload, plan, torch.device(ACCELERATORS[job.accelerator]))
    losses: list[float] = []
    if job.state is not None and job.state_digest is not None:
        path = checkpoint.path_of(Path(job.state), begin.epochs, job.device)
        losses = checkpoint.restore(path, job.state_digest, shard, live, begin.trained)
    shard.complete(weights, live)
    return shard, losses


def _save(shard: ModelShard, job: Job) -> None:
    """The trained weights of this device by name, and what its optimizers keep of each; its buffers by themselves."""
    root = shard.layered.root
    buffers = {name: buffer for name, buffer in root.named_buffers() if not shards.absent(buffer)}
    pieces = {name: json.dumps(asdict(piece)) for name, piece in shard.layered.pieces.items()}
    for kind, tensors, about in (("trained", state(root, shard.optimizers), pieces), ("buffers", buffers, None)):
        kept = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        save_file(kept, _saved_file(Path(job.folder), kind, job.device), about)


def _save_answers(answers: Sequence[tuple[Sequence[int], Tensor]], job: Job) -> None:
    """The logits of every request, of every token of one that generates, with the samples that they are of."""
    samples = torch.tensor([sample for ids, _ in answers for sample in ids])
    logits = torch.cat([made.cpu() for _, made in answers])
    path = _saved_file(Path(job.folder), f"answers-{job.generation}", job.device)
    save_file({"samples": samples, "logits": logits}, path)


def answers(folder: Path, generation: int, devices: Sequence[str]) -> dict[int, Tensor]:
    """What the devices of that generation have answered: of each sample the logits [answers, labels or tokens]."""
    found: dict[int, list[Tensor]] = defaultdict(list)
    for path in (_saved_file(folder, f"answers-{generation}", device) for device in devices):
        if path.exists():
            saved = load_file(path)
            for sample, logits in zip(saved["samples"].tolist(), saved["logits"], strict=True):
                found[sample].append(logits)
    return {sample: torch.stack(logits) for sample, logits in found.items()}


def trained(folder: Path, device: str) -> dict[str, Tensor]:
    """What a device has saved of its weights and optimizers."""
    tensors: dict[str, Tensor] = load_file(_saved_file(folder, "trained", device))
    return tensors


def trained_pieces(folder: Path, device: str) -> dict[str, Piece]:
    """Of parameters of which a device has saved a part, which."""
    with safe_open(_saved_file(folder, "trained", device), framework="pt") as file:
        return {name: PIECE.validate_json(about) for name, about in (file.metadata() or {}).items()}


def trained_parameters(workload: Workload, folder: Path, devices: Sequence[str]) -> dict[str, Tensor]:
    """What the devices have trained together: every parameter once, for all that hold one, or a part, have the same.

    Raises Broken where one, or a part of it, is missing.
    """
    root = models.build(workload, device="meta").root
    saved = [(trained(folder, device), trained_pieces(folder, device)) for device in devices]
    found: dict[str, Tensor] = {}
    for name, parameter in root.named_parameters():
        holders = [(tensors[name], pieces.get(name)) for tensors, pieces in saved if name in tensors]
        if parameter.requires_grad:
            found[name] = _whole(holders, parameter, name)
    return found


def _whole(holders: Sequence[tuple[Tensor, Piece | None]], like: Tensor, name: str) -> Tensor:
    """A parameter put together of what devices have of it."""
    whole, missing = torch.empty_like(like, device="cpu", requires_grad=False), like.numel()
    for tensor, piece in holders:
        if piece is None:
            return tensor
        piece.put(tensor, whole)
        missing -= tensor.numel()
    if missing:
        raise Broken(f"Devices have not saved {name}, which was to be trained, or not all of it.")
    return whole


def trained_buffers(workload: Workload, folder: Path, devices: Sequence[str]) -> dict[str, Tensor]:
    """The buffers by name. Devices that hold the same need not have the same in them: those of the first count."""
    names = {name for name, _ in models.build(workload, device="meta").root.named_buffers()}
    found: dict[str, Tensor] = {}
    for device in reversed(devices):
        saved = load_file(_saved_file(folder, "buffers", device))
        found |= {name: buffer for name, buffer in saved.items() if name in names}
    return found


def _saved_file(folder: Path, kind: str, device: str) -> Path:
    return folder / f"{kind}-{device}.safetensors"
