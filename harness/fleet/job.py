"""What a worker process does for a plan: loads its shard and data, meets its peers, rehearses, runs, reports."""

from __future__ import annotations

import gc
import resource
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness import models, samples
from harness.cache import ActivationCache
from harness.engine import DeviceReport, ModelShard, Worker, check_samples, programs
from harness.engine.program import held_units, peers
from harness.errors import Broken, OrreryError, Unsupported
from harness.fleet import probe
from harness.fleet.channel import Channel, Closed, Message
from harness.fleet.processes import enter
from harness.fleet.supervisor import Pulse
from harness.heap import keep_freed_memory
from harness.models import shards
from harness.plan import Plan
from harness.plan.serial import from_json
from harness.reference import state
from harness.samples import Dataset
from harness.transport import PeerLost, Transport
from harness.workload import Workload

WEIGHTS, SAMPLES = "weights.safetensors", "samples.safetensors"
REPORT = TypeAdapter(DeviceReport)
CONNECT_S = 60.0
ACCELERATORS = {"cpu": "cpu", "gpu": "cuda"}
#: A thread that has something to do gets its turn after this long: a receive must not wait for Python code.
SWITCH_S = 2e-4


@dataclass(frozen=True)
class Job:
    """One device's part of a run. `folder` holds the weights and samples; `host` is the address to listen on.

    `enter` are files that take the process's id, which moves it into its control groups; `enter_computing` take that of
    the thread that computes, once the others run.
    `pace`: of every phase the seconds of each node that the device does by itself; none: as fast as it can.
    `latency_s` is added to every message. `save` writes the trained shard into the folder.
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
    enter(job.enter)
    sys.setswitchinterval(SWITCH_S)
    plan, workload = from_json(job.plan), Workload(**job.workload)
    mine = programs(plan, job.device)
    transport = Transport(
        job.device,
        bytes.fromhex(job.secret),
        job.generation,
        latency_s=job.latency_s,
        send_buffer_bytes=job.send_buffer_bytes,
    )
    cache: ActivationCache | None = None
    try:
        channel.send({"listening": transport.listen(job.host, job.port)})
        shard = _shard(job, plan, workload)
        dataset = samples.read(Path(job.folder) / SAMPLES)
        check_samples(workload, dataset)
        if any(program.storage for program in mine):
            cache = _cache(job, plan, workload, dataset)
        addresses = {name: tuple(address) for name, address in channel.receive()["peers"].items()}
        outgoing, incoming = peers(mine)
        transport.connect({peer: addresses[peer] for peer in outgoing}, incoming, timeout_s=CONNECT_S)

        def barrier() -> None:
            channel.send({"reached": True})
            channel.receive()

        pace = [{int(node): seconds for node, seconds in phase.items()} for phase in job.pace]
        worker = Worker(
            job.device, plan, mine, workload, shard, dataset, transport, barrier, pulse.progress, pace, cache
        )
        worker.start()
        enter(job.enter_computing)
        moving = worker.rehearse()
        gc.collect()
        gc.freeze()  # what is there now stays: no need to look through it again and again
        channel.send({"ready": True})
        report = worker.run(channel.receive()["go"], moving)
        if job.save:
            _save(shard, job)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        channel.send({"done": REPORT.dump_python(report, mode="json") | {"process_peak_bytes": peak}})
        channel.receive()  # all others are done, too: nobody misses us
    finally:
        transport.close()
        if cache is not None:
            cache.clear()


def _cache(job: Job, plan: Plan, workload: Workload, dataset: Dataset) -> ActivationCache:
    """A cache that, for what is damaged, reads the frozen weights once more and makes it again."""

    def recompute(names: Sequence[str], sample_ids: Sequence[int]) -> dict[str, Tensor]:
        layered = shards.load(workload, Path(job.folder) / WEIGHTS, 0, plan.num_units)
        with torch.no_grad():
            return layered.run(0, plan.num_units, dataset.batch(sample_ids), wanted=names)

    return ActivationCache(Path(job.folder) / f"cache-{job.device}", workload.num_samples, recompute)


def _shard(job: Job, plan: Plan, workload: Workload) -> ModelShard:
    """The model with weights for the units that some phase gives to this device; what comes by a plan is left out."""
    first, last = held_units(plan, job.device)
    layered = shards.load(workload, Path(job.folder) / WEIGHTS, first, last)
    return ModelShard(layered, workload, plan, torch.device(ACCELERATORS[job.accelerator]))


def _save(shard: ModelShard, job: Job) -> None:
    """The trained weights of this device by name, and what its optimizers keep of each; its buffers by themselves."""
    root = shard.layered.root
    buffers = {name: buffer for name, buffer in root.named_buffers() if not buffer.is_meta}
    for kind, tensors in (("trained", state(root, shard.optimizers)), ("buffers", buffers)):
        kept = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        save_file(kept, _saved_file(Path(job.folder), kind, job.device))


def trained(folder: Path, device: str) -> dict[str, Tensor]:
    """What a device has saved of its weights and optimizers."""
    tensors: dict[str, Tensor] = load_file(_saved_file(folder, "trained", device))
    return tensors


def trained_parameters(workload: Workload, folder: Path, devices: Sequence[str]) -> dict[str, Tensor]:
    """What the devices have trained together: every parameter once, for all that hold one have the same.

    Raises Broken where one is missing.
    """
    root = models.build(workload, device="meta").root
    saved = [trained(folder, device) for device in devices]
    found: dict[str, Tensor] = {}
    for name in (name for name, parameter in root.named_parameters() if parameter.requires_grad):
        holder = next((tensors for tensors in saved if name in tensors), None)
        if holder is None:
            raise Broken(f"No device has saved {name}, which was to be trained.")
        found[name] = holder[name]
    return found


def trained_buffers(folder: Path, devices: Sequence[str]) -> dict[str, Tensor]:
    """The buffers by name. Devices that hold the same need not have the same in them: those of the first count."""
    found: dict[str, Tensor] = {}
    for device in reversed(devices):
        found |= load_file(_saved_file(folder, "buffers", device))
    return found


def _saved_file(folder: Path, kind: str, device: str) -> Path:
    return folder / f"{kind}-{device}.safetensors"
