"""One rank of torch's own: DistributedDataParallel, 1F1B of torch.distributed.pipelining, tensor parallelism by DTensor
and by transformers, and gloo's collectives.

    python -m tests.opponents.rank RANK NUM_RANKS ADDRESS FOLDER [ENTRANCE...]

ADDRESS is rank 0's; FOLDER holds the samples; each ENTRANCE takes the process's id, which moves it into a control
group. Orders come line by line, JSON: `[task, iterations]`, see `Task`. The answer is when each iteration began and
ended (`time.perf_counter`). What an order needs is built and warmed up when it comes for the first time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from harness import datasets, models, samples
from harness.fleet.processes import die_with_parent, enter
from harness.heap import keep_freed_memory
from harness.models.layered import Layered
from harness.optimizers import optimizer_for
from harness.plan.pieces import ROWS
from harness.samples import Dataset
from harness.workload import Workload
from testbeds.emulation.cgroups import Entrances

PORT = 29_500
SECONDS = 120
WARM_UPS = 2


@dataclass(frozen=True)
class Task:
    """`kind`: "ddp", "late-all-reduce", "1f1b", "dtensor", "transformers", or a collective of `numel` float32.

    `batches`: the sample ids of each step, or request, over and over. `cuts`: where each stage but the first begins,
    with the name and the shape of one row of all that it is handed. `columns` and `rows`: names of the products that
    tensor parallelism cuts by output and by input, `*` for a layer's number. `pace`: the seconds that each unit shall
    take, as our paced devices do, which are as fast as a `share` of a core.
    """

    kind: str
    workload: Mapping[str, Any] | None = None
    batches: Sequence[Sequence[int]] = ()
    num_micro_batches: int = 1
    cuts: Sequence[tuple[int, str, Sequence[int]]] = ()
    columns: Sequence[str] = ()
    rows: Sequence[str] = ()
    pace: Sequence[float] = ()
    share: float = 1.0
    numel: int = 0


Iteration = Callable[[int], object]


def main(rank: int, num_ranks: int, address: str, folder: Path, entrances: Entrances) -> None:
    die_with_parent(os.getppid())
    enter(entrances.process)
    keep_freed_memory()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{address}:{PORT}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=SECONDS),
    )
    enter(entrances.computing)
    print(json.dumps("ready"), flush=True)
    built: dict[str, Iteration] = {}
    for line in sys.stdin:
        fields, iterations = json.loads(line)
        key = json.dumps(fields)
        numbers = count()
        if key not in built:
            built[key] = build(Task(**fields), rank, num_ranks, folder)
            for _ in range(WARM_UPS):
                built[key](next(numbers))
        dist.barrier()
        spans = []
        for _ in range(iterations):
            began = time.perf_counter()
            built[key](next(numbers))
            spans.append((began, time.perf_counter()))
        print(json.dumps(spans), flush=True)
    dist.destroy_process_group()


def build(task: Task, rank: int, num_ranks: int, folder: Path) -> Iteration:
    if task.workload is None:
        return ring(task, rank, num_ranks)
    workload, dataset = Workload(**task.workload), samples.read(folder / "samples.safetensors")
    layered = models.build(workload)
    if task.kind == "ddp":
        return data_parallel(task, workload, layered, dataset, rank, num_ranks)
    if task.kind in ("dtensor", "transformers"):
        shard = by_dtensor if task.kind == "dtensor" else by_transformers
        whole = models.build(workload)  # of the other, DTensor changes the modules
        model = shard(task, layered.root, rank, num_ranks, folder)
        check_shards(task, whole, model, num_ranks, dataset)
        return tensor_parallel(task, whole, model, dataset)
    if task.kind == "late-all-reduce":
        return late_all_reduce(task, workload, layered, dataset, rank, num_ranks)
    return pipeline(task, workload, layered, dataset, rank, num_ranks)


def ring(task: Task, rank: int, num_ranks: int) -> Iteration:
    """Each iteration makes a tensor of zeros, as our plan of it does."""
    share = task.numel // num_ranks

    def all_reduce(_: int) -> None:
        dist.all_reduce(torch.zeros(task.numel))

    def reduce_scatter(_: int) -> None:
        dist.reduce_scatter_tensor(torch.empty(share), torch.zeros(task.numel))

    def all_gather(_: int) -> None:
        dist.all_gather_into_tensor(torch.empty(task.numel), torch.zeros(share))

    return {"all-reduce": all_reduce, "reduce-scatter": reduce_scatter, "all-gather": all_gather}[task.kind]


class Stage(nn.Module):
    """A range of units on rows of given samples: hands one tensor on, or returns the sum of the losses, [1]."""

    def __init__(self, layered: Layered, dataset: Dataset, units: tuple[int, int], enters: str, leaves: str) -> None:
        super().__init__()
        self.layered, self.dataset, self.units, self.enters, self.leaves = layered, dataset, units, enters, leaves
        self.held = nn.ModuleList(layered.units[slice(*units)])

    def forward(self, entering: Tensor, ids: Tensor) -> Tensor:
        batch = self.dataset.batch(ids.tolist())
        first, last = self.units
        made = self.layered.run(first, last, {**batch, self.enters: entering} if first else batch)
        return made["loss"].reshape(1) if "loss" in made else made[self.leaves]


def data_parallel(
    task: Task, workload: Workload, layered: Layered, dataset: Dataset, rank: int, num_ranks: int
) -> Iteration:
    """The same units as ours, on this rank's part of each batch; DDP averages the gradients while they come."""
    stage = Stage(layered, dataset, (0, len(layered.units)), "", "")
    model = DistributedDataParallel(stage)
    optimizer = optimizer_for(workload, list(stage.parameters()))
    rows = workload.batch_size // num_ranks

    def iteration(number: int) -> float:
        ids = torch.tensor(task.batches[number % len(task.batches)][rank * rows : (rank + 1) * rows])
        loss = model(ids, ids)
        optimizer.zero_grad()
        (loss.sum() / rows).backward()
        optimizer.step()
        return loss.item()

    return iteration


def late_all_reduce(
    task: Task, workload: Workload, layered: Layered, dataset: Dataset, rank: int, num_ranks: int
) -> Iteration:
    """The same without overlap, as our plan has it: one all-reduce of all gradients after the backward pass."""
    stage = Stage(layered, dataset, (0, len(layered.units)), "", "")
    parameters = list(stage.parameters())
    optimizer = optimizer_for(workload, parameters)
    rows = workload.batch_size // num_ranks

    def iteration(number: int) -> float:
        ids = torch.tensor(task.batches[number % len(task.batches)][rank * rows : (rank + 1) * rows])
        loss = stage(ids, ids)
        optimizer.zero_grad()
        (loss.sum() / workload.batch_size).backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        whole = torch.cat([gradient.view(-1) for gradient in gradients])
        dist.all_reduce(whole)
        parts = whole.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_([gradient.view(-1) for gradient in gradients], list(parts))
        optimizer.step()
        return loss.item()

    return iteration


def pipeline(
    task: Task, workload: Workload, layered: Layered, dataset: Dataset, rank: int, num_ranks: int
) -> Iteration:
    """A stage per rank; the losses of the micro-batches are sums over rows, divided by the rows of the batch."""
    edges = [0, *(first for first, _, _ in task.cuts), len(layered.units)]
    names = ["", *(name for _, name, _ in task.cuts), ""]
    stage = Stage(layered, dataset, (edges[rank], edges[rank + 1]), names[rank], names[rank + 1])
    optimizer = optimizer_for(workload, list(stage.parameters()))
    rows = workload.batch_size // task.num_micro_batches
    handed = [torch.empty(rows, *extents, requires_grad=True) for _, _, extents in task.cuts]
    piece = PipelineStage(
        stage,
        rank,
        num_ranks,
        torch.device("cpu"),
        input_args=(handed[rank - 1] if rank else torch.empty(rows),),
        output_args=(handed[rank] if rank < len(handed) else torch.empty(1, requires_grad=True),),
    )
    schedule = Schedule1F1B(
        piece,
        task.num_micro_batches,
        loss_fn=lambda loss, _: loss.sum() / workload.batch_size,
        scale_grads=False,
    )

    def iteration(number: int) -> float:
        ids = torch.tensor(task.batches[number % len(task.batches)])
        optimizer.zero_grad()
        found: list[Tensor] = []
        if rank == 0:
            schedule.step(torch.zeros(len(ids)), ids=ids)
        elif rank < num_ranks - 1:
            schedule.step(ids=ids)
        else:
            schedule.step(ids=ids, target=ids, losses=found)
        optimizer.step()
        return sum(loss.item() for loss in found)

    return iteration


def by_dtensor(task: Task, root: nn.Module, rank: int, num_ranks: int, folder: Path) -> nn.Module:
    """The Hugging Face model with its products cut by torch's `parallelize_module`."""
    mesh = init_device_mesh("cpu", (num_ranks,))
    for style, names in ((ColwiseParallel, task.columns), (RowwiseParallel, task.rows)):
        parallelize_module(root, mesh, {name: style() for name in names})
    return root


def by_transformers(task: Task, root: nn.Module, rank: int, num_ranks: int, folder: Path) -> nn.Module:
    """The same by transformers, which has no plan of its own for this model (`tp_plan="auto"`), from a checkpoint."""
    assert isinstance(root, PreTrainedModel)
    if rank == 0:
        root.save_pretrained(folder / "checkpoint")
    dist.barrier()
    plan = dict.fromkeys(task.columns, "colwise") | dict.fromkeys(task.rows, "rowwise")
    config = DistributedConfig(tp_size=num_ranks, tp_plan=plan)
    implementation = root.config._attn_implementation
    model: nn.Module = type(root).from_pretrained(
        folder / "checkpoint", distributed_config=config, attn_implementation=implementation
    )
    return model


def check_shards(task: Task, whole: Layered, model: nn.Module, num_ranks: int, dataset: Dataset) -> None:
    """Every product that was named is cut, and the answer is the whole model's."""
    layers = sum(unit.kind == "attention" for unit in whole.units)
    weights = [p for p in model.parameters() if isinstance(p, DTensor) and p.dim() == 2]
    cut = [p for p in weights if p.to_local().numel() * num_ranks == p.numel()]
    assert len(cut) == layers * (len(task.columns) + len(task.rows)), f"{len(cut)} products are cut"
    batch = {name: dataset.batch(task.batches[0])[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wanted, found = whole.root.eval()(**batch).logits, model.eval()(**batch).logits
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def tensor_parallel(task: Task, layered: Layered, model: nn.Module, dataset: Dataset) -> Iteration:
    """A request per iteration. layered: the same model, whole, whose units say which modules are paced together."""
    model.eval()
    if task.pace:
        Paced(layered, model, task.pace, task.share)

    @torch.no_grad()
    def iteration(number: int) -> Tensor:
        batch = dataset.batch(task.batches[number % len(task.batches)])
        logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits

    return iteration


class Paced:
    """Lets every unit of a model last as long as on the device that is played: from when its first module begins until
    its last one has ended. A unit without modules begins when the one before ends, and ends when the next begins.

    A product by rows may send what it makes before anybody learns that it has ended. It waits before it begins, for
    what the device needs longer than a core, which is as much faster as its `share` says.
    """

    def __init__(self, layered: Layered, model: nn.Module, seconds: Sequence[float], share: float) -> None:
        self.began_s = 0.0
        names = {id(module): name for name, module in layered.root.named_modules()}
        held = [[model.get_submodule(names[id(module)]) for module in unit.held] for unit in layered.units]
        for number, modules in enumerate(held):
            if not modules:  # an attention core: between queries, keys and values and the product of what it makes
                held[number + 1][0].register_forward_pre_hook(self._waits(seconds[number]))
        for number, modules in enumerate(held):
            if layered.units[number].kind in ROWS:
                modules[0].register_forward_pre_hook(lambda *_, s=seconds[number]: time.sleep(s * (1 - share)))
            elif modules:
                modules[0].register_forward_pre_hook(self._begins)
                modules[-1].register_forward_hook(self._waits(seconds[number]), prepend=True)

    def _begins(self, *_: object) -> None:
        self.began_s = time.perf_counter()

    def _waits(self, seconds: float) -> Callable[..., None]:
        def wait(*_: object) -> None:
            time.sleep(max(0.0, self.began_s + seconds - time.perf_counter()))
            self.began_s = time.perf_counter()

        return wait


def batches_of(workload: Workload) -> list[list[int]]:
    """The samples of each step of an epoch, as our workers take them."""
    order = datasets.sample_order(workload.num_samples, 0, workload.seed)
    return [list(order[i : i + workload.batch_size]) for i in range(0, len(order), workload.batch_size)]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), Entrances(*json.loads(sys.argv[5])))
