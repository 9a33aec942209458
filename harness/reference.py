"""What a plan must compute: the same row pieces through the same units in one process, by plain autograd.

No queue, no message, no gradient sum of ours: pieces are joined with `torch.cat`, autograd runs through the whole
batch, and torch's own optimizer and clipping do the rest. With batch norm the pieces matter, else they don't; its
statistics are those of the first device of each stage, which are the ones that are saved.

Where mini-batches have updates of their own, they are done one after the other, and each stage computes with the
versions of the weights that the plan names: stale as they are, they are part of the method. How the engine keeps them
plays no part: here they are copies, put in the place of the parameters by `torch.func.functional_call`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from harness import models
from harness.datasets import batches
from harness.engine.dropout import KeyedDropout
from harness.models.cuts import Piece
from harness.models.layered import Layered
from harness.models.shards import absent
from harness.optimizers import optimizer_for
from harness.plan import Phase, Plan
from harness.plan.updates import Computed, Weights, follow_updates, lowest
from harness.plan.values import Range
from harness.samples import Dataset
from harness.threads import one_thread
from harness.workload import Workload

#: `Layered.run` of the first and last unit, the values that are known, and what is called with each unit's name.
Run = Callable[[int, int, dict[str, Tensor], Callable[[str], None]], dict[str, Tensor]]
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


@one_thread()
def train(plan: Plan, workload: Workload, dataset: Dataset) -> Reference:
    """Train as the plan says, on one device, with weights as stale as the plan has them."""
    layered = models.build(workload)
    parameters = [p for p in layered.root.parameters() if p.requires_grad]
    optimizer = optimizer_for(workload, parameters)
    masks = KeyedDropout(workload.seed)
    losses: list[float] = []
    orders = batches(workload)
    for phase in plan.phases:
        computed = follow_updates(phase, plan) if phase.mini_batches else {}
        for _ in range(phase.repeat if phase.shards else 0):
            history = _History(computed, layered) if phase.mini_batches else None
            for update, rows in zip(phase.updates, phase.update_rows, strict=True):
                loss = _loss(phase, update, layered, history, dataset, masks, len(losses), next(orders)) / rows
                optimizer.zero_grad()
                loss.backward()
                if workload.clip_norm is not None:
                    nn.utils.clip_grad_norm_(parameters, workload.clip_norm)
                optimizer.step()
                losses.append(loss.item())
                if history is not None:
                    history.keep()
    return Reference(layered, optimizer, tuple(losses))


def state(root: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Weights by name, and `name/key` for what an optimizer keeps of each; without what is on "meta", or released."""
    kept = {id(p): entries for optimizer in optimizers for p, entries in optimizer.state.items()}
    found: dict[str, Tensor] = {}
    for name, parameter in root.named_parameters():
        if not absent(parameter):
            found[name] = parameter.detach()
            for key, value in kept.get(id(parameter), {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    found[f"{name}/{key}"] = value
    return found


def max_rel_error(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    adaptive: bool,
    pieces: Mapping[str, Piece] | None = None,
) -> float:
    """Largest |found - wanted| / max|wanted| over the tensors; where the gradient is zero, |found - wanted| / 0.1.

    `pieces`: of parameters of which a part was found, which.

    adaptive: the optimizer divides by the size of the gradient (AdamW), so that weights magnify noise where it is
    near zero: its moments are compared instead.
    """
    errors = [0.0]
    for name, tensor in found.items():
        if adaptive != ("/" in name):
            continue
        if not tensor.numel():  # of a device that has no part of it
            continue
        theirs, parameter = wanted[name], name.partition("/")[0]
        scale = 0.1 if parameter.endswith(ZERO_GRADIENTS) else max(theirs.abs().max().item(), 1e-12)
        if pieces and parameter in pieces:
            theirs = pieces[parameter].of(theirs)
        errors.append((tensor - theirs).abs().max().item() / scale)
    return torch.tensor(errors, dtype=torch.float64).max().item()  # unlike Python's max, NaN where one is


class _History:
    """The trained weights as they were after each update of an iteration, and who computes with which."""

    def __init__(self, computed: Computed, layered: Layered) -> None:
        self.chain = _Chain(layered)
        self.parameters = {name: p for name, p in layered.root.named_parameters() if p.requires_grad}
        self.computed = computed
        #: How many updates a mini-batch may lack, from the first that it lacks on.
        self.reach = max((m - lowest(~c) for (_, m), held in computed.items() for c in held.values()), default=0)
        self.versions: list[dict[str, Tensor]] = []
        self.keep()

    def keep(self) -> None:
        """The weights as they are now, after one more update; what no mini-batch will compute with any more goes."""
        self.versions.append({name: p.detach().clone() for name, p in self.parameters.items()})
        if len(self.versions) > self.reach + 1:
            self.versions[-self.reach - 2] = {}

    def run(self, device: str, m: int) -> Run:
        """As `Layered.run`, with the weights of the device for micro-batch m; gradients come to the parameters."""
        held = self.computed[device, m]
        newest = (1 << (len(self.versions) - 1)) - 1  # for those that it has no part of
        (own,) = {content for name, content in held.items() if name.startswith("weights@")} or {newest}
        weights = {
            f"root.{name}": self._weights(name, held.get(f"weights:{name}", own)) + (p - p.detach())
            for name, p in self.parameters.items()
        }

        def run(first: int, last: int, values: dict[str, Tensor], entering: Callable[[str], None]) -> dict[str, Tensor]:
            made: dict[str, Tensor] = functional_call(self.chain, weights, (first, last, values, entering))
            return made

        return run

    def _weights(self, name: str, content: Weights) -> Tensor:
        """A parameter with the updates of these mini-batches: those up to the first that is missing, and others."""
        first = lowest(~content)
        weights = self.versions[first][name]
        for m in range(first + 1, content.bit_length()):
            if content >> m & 1:
                weights = weights + (self.versions[m + 1][name] - self.versions[m][name])
        return weights


class _Chain(nn.Module):
    """The model's chain of units as a module, whose parameters can be replaced."""

    def __init__(self, layered: Layered) -> None:
        super().__init__()
        self.root, self.layered = layered.root, layered

    def forward(self, *args: Any) -> dict[str, Tensor]:
        return self.layered.run(*args)


def _loss(
    phase: Phase,
    update: range,
    layered: Layered,
    history: _History | None,
    dataset: Dataset,
    masks: KeyedDropout,
    step: int,
    sample_ids: Sequence[int],
) -> Tensor:
    """The sum of the losses of all rows of an update's micro-batches, with its graph."""
    total = torch.zeros(())
    first_row = 0
    for m in update:
        rows = phase.micro_batches[m]
        ids = sample_ids[first_row : first_row + rows]
        first_row += rows
        carried: dict[str, Tensor] = {}
        for units, replicas in _stages(phase, m):
            made: dict[Range, dict[str, Tensor]] = {}
            for number, device in enumerate(replicas):
                piece = phase.shards[device].micro_batch_rows[m]
                if piece[0] < piece[1]:
                    run = layered.run if history is None else history.run(device, m)
                    with _unchanged(layered.root.buffers() if number else ()):
                        made[piece] = _piece(run, dataset, masks, step, ids, units, carried, piece)
            pieces = [made[piece] for piece in sorted(made)]
            carried = {n: torch.cat([piece[n] for piece in pieces]) for n in pieces[0] if n != "loss"}
            total = total + sum(piece["loss"] for piece in pieces if "loss" in piece)
    return total


def _stages(phase: Phase, m: int) -> list[tuple[Range, list[str]]]:
    """Unit ranges in order that compute micro-batch m, each with its devices."""
    stages: dict[Range, list[str]] = {}
    working: set[Range] = set()
    for device, shard in phase.shards.items():
        stages.setdefault(shard.units, []).append(device)
        if shard.micro_batch_rows[m][0] < shard.micro_batch_rows[m][1]:
            working.add(shard.units)
    inside = {a for a in working for b in working if a != b and b[0] <= a[0] and a[1] <= b[1]}  # shared, and done there
    return sorted((units, devices) for units, devices in stages.items() if units in working - inside)


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
    run: Run,
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
        made = run(*units, {**batch, **entering}, masks.enter)
    return {name: tensor for name, tensor in made.items() if name not in batch}
