"""What a workload costs, counted from the real modules on fake tensors: nothing is allocated, nothing computed.

Every unit runs forward and backward once for two row counts; two points make the line in rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional

from harness.costs import Affine, Costs, ParameterCost, TensorCost, UnitCost, WidthCut, Work
from harness.errors import OrreryError
from harness.garbage import no_collection
from harness.models.layered import Layered, Unit
from harness.profile.signature import structure
from harness.profile.track import Tracker, storage_id
from harness.workload import Workload

#: Enough rows for the peaks of memory to lie where they lie for many; one row takes short cuts of its own.
ROWS = (8, 16)


class Spec(NamedTuple):
    """All that the cost of handling a tensor depends on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, requires_grad=self.requires_grad)

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Pass:
    """One pass over one unit at one row count. `workspace` as in `UnitCost`."""

    flops: Mapping[str, int]
    kernels: int
    workspace: int


@dataclass(frozen=True)
class Observation:
    """A unit at one row count. `saves_reads` and `saves_writes` are positions in the unit's reads and writes."""

    forward: Pass
    backward: Pass
    saved: int
    saves_reads: tuple[int, ...]
    saves_writes: tuple[int, ...]
    outputs: tuple[Spec, ...]


def count_units(layered: Layered, workload: Workload, key: str = "", accelerator: str = "cpu") -> Costs:
    """The costs of a model, which may be on "meta". Puts `layered.root` into the mode of the workload.

    Training counts with dropout active, inference without autograd. FLOPs are torch's: one multiply-add is 2.
    `accelerator` "gpu" counts dropout as torch's GPU kernel does it.
    Raises OrreryError for a unit that writes a view of another tensor, or an input of unknown shape.
    """
    layered.root.train(workload.training)
    inputs = (*layered.inputs, *(["labels"] if workload.training else []))
    low, high = ({name: batch_spec(name, workload, rows) for name in inputs} for rows in ROWS)
    with FakeTensorMode(), no_collection(), _fused_dropout() if accelerator == "gpu" else nullcontext():
        costs = _count(layered, workload, key, inputs, low, high)
        if layered.decoding is None:
            return costs
        loaded = layered.kept
        inputs = (*layered.decoding.inputs, *loaded)
        low, high = (
            {name: specs[name] if name in loaded else batch_spec(name, workload, rows) for name in inputs}
            for rows, specs in zip(ROWS, (low, high), strict=True)
        )
        decoding = _count(layered.decoding, workload, f"{key}-decoding", inputs, low, high, loaded)
    return replace(costs, decoding=decoding)


def _count(
    layered: Layered,
    workload: Workload,
    key: str,
    inputs: tuple[str, ...],
    low: dict[str, Spec],
    high: dict[str, Spec],
    loaded: tuple[str, ...] = (),
) -> Costs:
    """The costs of one chain, of which the `inputs` are known: those of what it writes are added to them."""
    weights = {id(t): Spec(tuple(t.shape), t.dtype, t.requires_grad).empty() for t in _state(layered)}
    observed = [_walk(layered, specs, weights, workload.training) for specs in (low, high)]
    names = layered.parameter_names()
    costs = {unit.name: _unit_cost(unit, names, *(table[unit.name] for table in observed)) for unit in _units(layered)}
    return Costs(
        key=key,
        units=tuple(costs[unit.name] for unit in layered.units),
        local_units=tuple(costs[unit.name] for unit in layered.local_units),
        tensors={name: _tensor_cost(low[name], high[name]) for name in low},
        parameters={
            names[id(p)]: ParameterCost(p.numel(), p.dtype.itemsize, workload.training and p.requires_grad)
            for p in layered.root.parameters()
        },
        inputs=inputs,
        training=workload.training,
        loaded=loaded,
        kept=layered.kept,
    )


@contextmanager
def _fused_dropout() -> Iterator[None]:
    """Dropout by one kernel that keeps a mask of a byte an element, as torch has it for GPUs (`native_dropout`).

    On a CPU torch multiplies with a mask of the input's type, and keeps that (ATen/native/Dropout.cpp).
    """
    plain = functional.dropout

    def fused(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0 or inplace:
            return plain(input, p, training, inplace)
        return torch.native_dropout(input, p, True)[0]

    functional.dropout = fused
    try:
        yield
    finally:
        functional.dropout = plain


def batch_spec(name: str, workload: Workload, rows: int) -> Spec:
    """Shape and type of a batch's tensor, as `harness.datasets` makes it."""
    if name in ("input_ids", "attention_mask", "token_type_ids"):
        return Spec((rows, _given(workload.seq_len, "seq_len", name)), torch.int64)
    if name == "cache_position":
        return Spec((1,), torch.int64)
    if name == "decoder_input_ids":
        return Spec((rows, workload.decoder_seq_len), torch.int64)
    dtype = getattr(torch, workload.dtype)
    if name == "pixel_values":
        size = _given(workload.image_size, "image_size", name)
        return Spec((rows, workload.num_channels, size, size), dtype)
    if name == "labels":
        return Spec((rows,), dtype if workload.num_labels == 1 else torch.int64)
    raise OrreryError(
        f"The model {workload.model} reads a batch tensor {name!r}, whose shape nothing in the workload gives."
    )


def _given(value: int | None, key: str, name: str) -> int:
    if value is None:
        raise OrreryError(f"The workload has no {key}, which the model's input {name!r} needs. Set {key}.")
    return value


def _units(layered: Layered) -> Iterator[Unit]:
    """All units in an order in which they can run."""
    return chain(layered.local_units, layered.units)


def _state(layered: Layered) -> Iterator[Tensor]:
    return chain(layered.root.parameters(), layered.root.buffers())


def _walk(
    layered: Layered, specs: dict[str, Spec], weights: Mapping[int, Tensor], training: bool
) -> dict[str, Observation]:
    """Observe every unit, equal ones once. Adds the specs of what they write to `specs`."""
    observed: dict[str, Observation] = {}
    equal: dict[Any, Observation] = {}
    seen: dict[int, Any] = {}
    for unit in _units(layered):
        reads = tuple((unit.reads.index(name), specs[name]) for name in unit.reads)
        signature = (unit.kind, reads, structure(unit.function, seen), structure(list(unit.held), seen))
        if signature not in equal:
            equal[signature] = _observe(unit, specs, weights, training)
        observed[unit.name] = equal[signature]
        specs.update(zip(unit.writes, equal[signature].outputs, strict=True))
    return observed


def _observe(unit: Unit, specs: Mapping[str, Spec], weights: Mapping[int, Tensor], training: bool) -> Observation:
    inputs = {name: specs[name].empty() for name in unit.reads}
    held = {name: weights[id(tensor)] for name, tensor in _slots(unit)}
    tracker = Tracker()
    packed: dict[int, int | None] = {}

    def pack(tensor: Tensor) -> Tensor:
        packed[storage_id(tensor)] = tracker.number(tensor)
        return tensor

    with tracker, torch.set_grad_enabled(training), saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = functional_call(unit, held, tuple(inputs[name] for name in unit.reads), tie_weights=False)
    made = _own_storages(unit, outputs, tracker)
    # What was packed for a node that is gone by now is not kept.
    kept = {number for number in packed.values() if number in tracker.alive}
    saved = sum(tracker.alive[number] for number in kept - set(made))
    stays = saved + sum(tracker.alive[number] for number in set(made))
    forward = Pass(dict(tracker.flops), tracker.kernels, max(tracker.levels()) - stays)
    return Observation(
        forward=forward,
        backward=_backward(tracker, held.values(), outputs),
        saved=saved,
        saves_reads=tuple(i for i, name in enumerate(unit.reads) if storage_id(inputs[name]) in packed),
        saves_writes=tuple(i for i, number in enumerate(made) if number in kept),
        outputs=tuple(Spec(tuple(o.shape), o.dtype, o.requires_grad) for o in outputs),
    )


def _slots(unit: Unit) -> Iterator[tuple[str, Tensor]]:
    """Every place of every module that holds a tensor, once: a module may go by two names, a tied weight fill two."""
    for prefix, module in unit.named_modules():
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                yield f"{prefix}.{name}" if prefix else name, tensor


def _own_storages(unit: Unit, outputs: Sequence[Tensor], tracker: Tracker) -> list[int]:
    """The number of each output's storage. Outputs may be the parts of one storage, such as q, k and v."""
    numbers = [tracker.number(output) for output in outputs]
    filled: Counter[int | None] = Counter()
    for number, output in zip(numbers, outputs, strict=True):
        filled[number] += output.numel() * output.itemsize
    for number, name in zip(numbers, unit.writes, strict=True):
        if number is None or tracker.alive[number] != filled[number]:
            raise OrreryError(
                f"Unit {unit.name!r} writes {name!r}, a view of a tensor that it does not write, so its bytes can't be "
                "told apart from the other's. Write a copy, or leave the view to the unit that reads it."
            )
    return [number for number in numbers if number is not None]


class _Seed(torch.autograd.Function):
    """The gradient of an output: made when backward begins, freed by autograd once it is used."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, made: Callable[[], None]) -> Tensor:
        ctx.made = made
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        seed = gradient.new_empty(gradient.shape)
        ctx.made()
        return seed, None


def _backward(tracker: Tracker, weights: Collection[Tensor], outputs: Sequence[Tensor]) -> Pass:
    """Runs backward from all outputs. Gradients of the inputs count as workspace, those of the weights do not."""
    roots = [output for output in outputs if output.requires_grad]
    if not roots:
        return Pass(dict.fromkeys(tracker.flops, 0), 0, 0)
    flops, kernels, begun = dict(tracker.flops), tracker.kernels, 0

    def made() -> None:
        nonlocal begun
        begun = len(tracker.changes)

    ends = [torch.empty((), dtype=root.dtype).expand(root.shape) for root in roots]
    with tracker:
        torch.autograd.backward([_Seed.apply(root, made) for root in roots], ends)
    own = {tracker.number(weight.grad) for weight in weights if weight.grad is not None}
    levels = list(tracker.levels(without=own))
    for weight in weights:
        weight.grad = None
    return Pass(
        {name: tracker.flops[name] - flops[name] for name in flops},
        tracker.kernels - kernels,
        max(levels[begun:]) - levels[begun],
    )


def _unit_cost(unit: Unit, names: Mapping[int, str], low: Observation, high: Observation) -> UnitCost:
    if (low.saves_reads, low.saves_writes) != (high.saves_reads, high.saves_writes):
        raise OrreryError(
            f"Unit {unit.name!r} saves other tensors for {ROWS[1]} rows than for {ROWS[0]}: no line in rows."
        )
    return UnitCost(
        name=unit.name,
        layer=unit.layer,
        kind=unit.kind,
        reads=unit.reads,
        writes=unit.writes,
        forward=_work(low.forward, high.forward),
        backward=_work(low.backward, high.backward),
        saved=_line(low.saved, high.saved),
        saves=tuple(
            dict.fromkeys([*(unit.reads[i] for i in low.saves_reads), *(unit.writes[i] for i in low.saves_writes)])
        ),
        forward_workspace=_line(low.forward.workspace, high.forward.workspace),
        backward_workspace=_line(low.backward.workspace, high.backward.workspace),
        parameters=tuple(names[id(p)] for p in unit.parameters()),
        buffers_bytes=sum(b.numel() * b.itemsize for b in unit.buffers()),
        local=unit.local,
        cut=_width_cut(unit, names),
    )


def _width_cut(unit: Unit, names: Mapping[int, str]) -> WidthCut | None:
    if unit.cut is None:
        return None
    biases = (p for module in unit.cut.rows for name, p in module.named_parameters() if name == "bias")
    return WidthCut(unit.cut.width, unit.cut.granule, tuple(names[id(bias)] for bias in biases))


def _work(low: Pass, high: Pass) -> Work:
    return Work(
        **{name: _line(low.flops[name], high.flops[name]) for name in low.flops},
        kernels=_line(low.kernels, high.kernels),
    )


def _line(low: int, high: int) -> Affine:
    """Through the values at both row counts; whole numbers stay whole."""
    slope = (high - low) / (ROWS[1] - ROWS[0])
    per_row = int(slope) if slope.is_integer() else slope
    return Affine(low - per_row * ROWS[0], per_row)


def _tensor_cost(low: Spec, high: Spec) -> TensorCost:
    batchless = low.shape == high.shape
    shape = low.shape if batchless else low.shape[1:]
    tokens = shape[0] if len(low.shape) == 3 or (len(shape) == 1 and not low.dtype.is_floating_point) else 1
    return TensorCost(
        tokens=tokens,
        width=torch.Size(shape).numel() // tokens,
        itemsize=low.dtype.itemsize,
        batchless=batchless,
        needs_grad=low.requires_grad,
    )
