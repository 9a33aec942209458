"""What a plan must compute: the same row pieces through the same units in one process, by plain autograd.

No queue, no message, no gradient sum of ours: pieces are joined with `torch.cat`, autograd runs through the whole
batch, and torch's own optimizer and clipping do the rest. With batch norm the pieces matter, else they don't; its
statistics are those of the first device of each stage, which are the ones that are saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness import models
from harness.datasets import batches
from harness.engine.dropout import KeyedDropout
from harness.models.layered import Layered
from harness.optimizers import optimizer_for
from harness.plan import Phase, Plan, Shard
from harness.plan.values import Range
from harness.samples import Dataset
from harness.workload import Workload

#: Biases of attention keys add the same to every score of a query, so their gradient is zero, and noise is all of it.
#: So do those in front of a convolution of single pixels and a batch norm, which takes every mean away (MobileNetV2's
#: and EfficientNet's projections; what a depth-wise convolution pads at the border comes near to that).
ZERO_GRADIENTS = ("key.bias", "k_proj.bias", "k_lin.bias", "reduce_1x1.normalization.bias", "project_bn.bias")


@dataclass(frozen=True)
class Reference:
    """The trained model with its optimizer, and the loss of every iteration (mean over its samples)."""

    layered: Layered
    optimizer: torch.optim.Optimizer
    losses: tuple[float, ...]

    def state(self) -> dict[str, Tensor]:
        """Weights by name, and the optimizer's state of each as `name/exp_avg` and so on."""
        return state(self.layered.root, [self.optimizer])


def train(plan: Plan, workload: Workload, dataset: Dataset) -> Reference:
    """Train as the plan says, on one device."""
    layered = models.build(workload)
    parameters = [p for p in layered.root.parameters() if p.requires_grad]
    optimizer = optimizer_for(workload, parameters)
    masks = KeyedDropout(workload.seed)
    losses: list[float] = []
    orders = batches(workload)
    for phase in plan.phases:
        for _ in range(phase.repeat if phase.shards else 0):
            loss = _loss(phase, layered, dataset, masks, len(losses), next(orders)) / phase.batch_size
            optimizer.zero_grad()
            loss.backward()
            if workload.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, workload.clip_norm)
            optimizer.step()
            losses.append(loss.item())
    return Reference(layered, optimizer, tuple(losses))


def state(root: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Weights by name, and `name/key` for what an optimizer keeps of each; without what is on "meta", or released."""
    kept = {id(p): entries for optimizer in optimizers for p, entries in optimizer.state.items()}
    found: dict[str, Tensor] = {}
    for name, parameter in root.named_parameters():
        if not parameter.is_meta and parameter.numel():
            found[name] = parameter.detach()
            for key, value in kept.get(id(parameter), {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    found[f"{name}/{key}"] = value
    return found


def max_rel_error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], adaptive: bool) -> float:
    """Largest |found - wanted| / max|wanted| over the tensors; where the gradient is zero, |found - wanted| / 0.1.

    adaptive: the optimizer divides by the size of the gradient (AdamW), so that weights magnify noise where it is
    near zero: its moments are compared instead.
    """
    errors = [0.0]
    for name, tensor in found.items():
        if adaptive != ("/" in name):
            continue
        theirs = wanted[name]
        zero = name.partition("/")[0].endswith(ZERO_GRADIENTS)
        scale = 0.1 if zero else max(theirs.abs().max().item(), 1e-12)
        errors.append((tensor - theirs).abs().max().item() / scale)
    return torch.tensor(errors, dtype=torch.float64).max().item()  # unlike Python's max, NaN where one is


def _loss(
    phase: Phase, layered: Layered, dataset: Dataset, masks: KeyedDropout, step: int, sample_ids: Sequence[int]
) -> Tensor:
    """The sum of the losses of all rows, with its graph."""
    total = torch.zeros(())
    first_row = 0
    for m, rows in enumerate(phase.micro_batches):
        ids = sample_ids[first_row : first_row + rows]
        first_row += rows
        carried: dict[str, Tensor] = {}
        for units, replicas in _stages(phase):
            made: dict[Range, dict[str, Tensor]] = {}
            for number, shard in enumerate(replicas):
                piece = shard.micro_batch_rows[m]
                if piece[0] < piece[1]:
                    with _unchanged(layered.root.buffers() if number else ()):
                        made[piece] = _piece(layered, dataset, masks, step, ids, units, carried, piece)
            pieces = [made[piece] for piece in sorted(made)]
            carried = {n: torch.cat([piece[n] for piece in pieces]) for n in pieces[0] if n != "loss"}
            total = total + sum(piece["loss"] for piece in pieces if "loss" in piece)
    return total


def _stages(phase: Phase) -> list[tuple[Range, list[Shard]]]:
    """Unit ranges in order, each with the shards of its devices."""
    stages: dict[Range, list[Shard]] = {}
    for shard in phase.shards.values():
        stages.setdefault(shard.units, []).append(shard)
    return sorted(stages.items(), key=lambda stage: stage[0])


@contextmanager
def _unchanged(buffers: Iterable[Tensor]) -> Iterator[None]:
    """What is done to the buffers is done to copies. (Autograd would notice if they were written to afterwards.)"""
    held = [(buffer, buffer.data) for buffer in buffers]
    for buffer, data in held:
        buffer.data = data.clone()
    yield
    for buffer, data in held:
        buffer.data = data


def _piece(
    layered: Layered,
    dataset: Dataset,
    masks: KeyedDropout,
    step: int,
    ids: Sequence[int],
    units: Range,
    carried: Mapping[str, Tensor],
    rows: Range,
) -> dict[str, Tensor]:
    """What the units make of these rows of a micro-batch, besides what the data set has."""
    mine = ids[rows[0] : rows[1]]
    batch = dataset.batch(mine)
    entering = {name: tensor[rows[0] : rows[1]] for name, tensor in carried.items()}
    with masks.samples(step, mine):
        made = layered.run(*units, {**batch, **entering}, entering=masks.enter)
    return {name: tensor for name, tensor in made.items() if name not in batch}
