"""What a device writes when an epoch is over, so that a run that is killed goes on from there.

It is what the plan says that the device holds at that moment: trained weights, optimizer state, buffers; and its losses
so far. One safetensors file per epoch and device, whole or absent. An epoch counts when every device has written its
own, which is for the coordinator to see.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.engine.model_shard import ModelShard
from harness.engine.tensors import Bundle
from harness.errors import OrreryError
from harness.models.shards import absent
from harness.plan import Plan, Value
from harness.store import write_whole
from harness.workload import Workload

LOSSES = "losses"


@dataclass(frozen=True)
class Progress:
    """How far a run is: whole epochs, phases of its plan, batches that have been trained with, and iterations of phases
    that only move what belongs to samples."""

    epochs: int = 0
    phases: int = 0
    trained: int = 0
    moved: int = 0


BEGINNING = Progress()


def epoch_ends(plan: Plan, workload: Workload, begin: Progress = BEGINNING) -> dict[int, Progress]:
    """The phases of the plan, by place, with which a whole epoch is over, and how far the run is then.

    The last phase is none: the run is over with it. `begin`: what was done before the plan's first phase.
    """
    found: dict[int, Progress] = {}
    now, samples = begin, begin.epochs * workload.num_samples
    for place, phase in enumerate(plan.phases[:-1]):
        trained = phase.repeat * len(phase.updates) if phase.shards else 0
        moved = phase.repeat if phase.micro_batches and not phase.shards else 0
        now = replace(now, phases=now.phases + 1, trained=now.trained + trained, moved=now.moved + moved)
        samples += phase.repeat * phase.batch_size if phase.shards else 0
        if trained and samples % workload.num_samples == 0:
            now = replace(now, epochs=samples // workload.num_samples)
            found[place] = now
    return found


def path_of(folder: Path, epochs: int, device: str) -> Path:
    """Of the device's file after so many epochs."""
    return folder / f"epoch-{epochs:05d}-{device}.safetensors"


def save(path: Path, shard: ModelShard, values: Sequence[Value], losses: Sequence[float]) -> str:
    """Write what of the values is not as it was in the beginning. Returns the digest of the file."""
    tensors = dict(_buffers(shard))
    for name, bundle in _trained(shard, values):
        tensors |= {f"{name}/{number:06}": piece for number, piece in enumerate(bundle.pieces)}
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    tensors[LOSSES] = torch.tensor(losses, dtype=torch.float64)
    write_whole(path, lambda part: save_file(tensors, part))
    return file_digest(path)


def restore(path: Path, digest: str, shard: ModelShard, values: Sequence[Value], updates: int) -> list[float]:
    """The inverse, of a shard that may be on "meta"; `updates`: how many there have been. Returns the losses.

    Raises OrreryError for a file that is not what was written.
    """
    try:
        if file_digest(path) != digest:
            raise ValueError("its digest does not match.")
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise OrreryError(
            f"The state of a killed run in {path} can't be used: {error} Remove the folder {path.parent} to begin anew."
        ) from error
    for name, buffer in _buffers(shard):
        buffer.copy_(tensors[name])
    pieces: dict[str, list[Tensor]] = {}
    for name in sorted(tensors):
        pieces.setdefault(name.rpartition("/")[0], []).append(tensors[name].view(-1).to(shard.device))
    kinds = {value.name: shard.plan.tensors[value.name].kind for value in values if value.name in pieces}
    for name in sorted(kinds, key=lambda name: kinds[name] == "optimizer"):  # its weights come first
        shard.take_over(name, kinds[name], Bundle(tuple(pieces[name])), updates)
    return tensors[LOSSES].tolist()


def file_digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _buffers(shard: ModelShard) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in shard.layered.root.named_buffers():
        if not absent(buffer):
            yield f"buffer:{name}", buffer


def _trained(shard: ModelShard, values: Sequence[Value]) -> Iterator[tuple[str, Bundle]]:
    """Weights that have gradients, and the optimizer's state of them."""
    tensors = shard.plan.tensors
    for value in values:
        kind = tensors[value.name].kind
        if kind == "weights" and "gradients" + value.name.removeprefix("weights") in tensors:
            yield value.name, shard.weights_bundle(value.name)
        elif kind == "optimizer":
            yield value.name, shard.state_bundle(value.name)
