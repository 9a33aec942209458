"""One rank of torch's own trainers: DistributedDataParallel, and the schedules of torch.distributed.pipelining.

    python -m tests.oracles.rank RANK FOLDER

FOLDER/task.json says what to train (see `Task`). For each trainer the rank writes FOLDER/TRAINER-RANK.safetensors: its
weights by name, and "losses", of each step, of the rows whose loss it computes, divided by the batch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from harness import models, samples
from harness.models.layered import Layered
from harness.optimizers import optimizer_for
from harness.samples import Dataset
from harness.workload import Workload

SCHEDULES = {"gpipe": ScheduleGPipe, "pipedream-1f1b": Schedule1F1B}
RANKS = 2
SECONDS = 60


@dataclass(frozen=True)
class Task:
    """`batches`: the sample ids of each step. `cuts`: per schedule, the unit where the second stage begins, and the
    name of the only tensor that is handed on to it, with its shape for one row."""

    workload: Mapping[str, Any]
    batches: Sequence[Sequence[int]]
    num_micro_batches: int
    cuts: Mapping[str, tuple[int, str, Sequence[int]]]


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    task = Task(**json.loads((folder / "task.json").read_text()))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=SECONDS),
    )
    workload, dataset = Workload(**task.workload), samples.read(folder / "samples.safetensors")
    trainers = {"eddl": data_parallel, **dict.fromkeys(SCHEDULES, pipeline)}
    for name, train in trainers.items():
        layered = models.build(workload)
        losses = train(rank, name, task, workload, layered, dataset)
        weights = {name: p.detach().contiguous() for name, p in layered.root.named_parameters()}
        save_file({"losses": torch.tensor(losses), **weights}, folder / f"{name}-{rank}.safetensors")
    dist.destroy_process_group()


def data_parallel(rank: int, _: str, task: Task, workload: Workload, layered: Layered, dataset: Dataset) -> list[float]:
    """Hugging Face's own forward pass and loss, on this rank's half of each batch; DDP averages the gradients."""
    model = DistributedDataParallel(layered.root)
    optimizer = optimizer_for(workload, list(model.parameters()))
    losses = []
    for ids in task.batches:
        half = len(ids) // RANKS
        loss = model(**dataset.batch(ids[rank * half : (rank + 1) * half])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / RANKS)
    return losses


class Stage(nn.Module):
    """A range of units on rows of given samples: hands one tensor on, or returns the sum of the losses, [1]."""

    def __init__(self, layered: Layered, dataset: Dataset, units: tuple[int, int], name: str) -> None:
        super().__init__()
        self.layered, self.dataset, self.units, self.name = layered, dataset, units, name
        self.held = nn.ModuleList(layered.units[slice(*units)])

    def forward(self, entering: Tensor, ids: Tensor) -> Tensor:
        batch = self.dataset.batch(ids.tolist())
        first, last = self.units
        made = self.layered.run(first, last, {**batch, self.name: entering} if first else batch)
        return made["loss"].reshape(1) if "loss" in made else made[self.name]


def pipeline(rank: int, name: str, task: Task, workload: Workload, layered: Layered, dataset: Dataset) -> list[float]:
    """A stage per rank; the losses of the micro-batches are sums over rows, divided by the rows of the batch."""
    cut, tensor, extents = task.cuts[name]
    stage = Stage(layered, dataset, (0, cut) if rank == 0 else (cut, len(layered.units)), tensor)
    optimizer = optimizer_for(workload, list(stage.parameters()))
    rows = workload.batch_size // task.num_micro_batches
    handed = torch.empty(rows, *extents, requires_grad=True)
    piece = PipelineStage(
        stage,
        rank,
        RANKS,
        torch.device("cpu"),
        input_args=(torch.empty(rows),) if rank == 0 else (handed,),
        output_args=(handed,) if rank == 0 else (torch.empty(1, requires_grad=True),),
    )
    schedule = SCHEDULES[name](
        piece,
        task.num_micro_batches,
        loss_fn=lambda loss, _: loss.sum() / workload.batch_size,
        scale_grads=False,
    )
    losses = []
    for ids in map(torch.tensor, task.batches):
        optimizer.zero_grad()
        found: list[Tensor] = []
        if rank == 0:
            schedule.step(torch.zeros(len(ids)), ids=ids)
        else:
            schedule.step(ids=ids, target=ids, losses=found)
        optimizer.step()
        losses.append(sum(loss.item() for loss in found))
    return losses


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
