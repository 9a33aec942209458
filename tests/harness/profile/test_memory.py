"""Counted memory against real runs on real tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import accumulate
from typing import TypeVar

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from harness.costs import BACKWARD, FORWARD, Costs
from harness.models import build
from harness.models.layered import Layered
from harness.profile.counting import count_units
from harness.profile.track import storage_id
from tests.harness.profile.tiny import IMAGE, TEXT, batch, workload

ROWS = 3
Result = TypeVar("Result")


def every_tensor(layered: Layered, values: dict[str, Tensor]) -> dict[str, Tensor]:
    alive = dict(values)
    for unit in (*layered.local_units, *layered.units):
        alive.update(zip(unit.writes, unit(*(alive[name] for name in unit.reads)), strict=True))
    return alive


def entering(costs: Costs, first: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = (*costs.inputs, *costs.carried(first))
    return {name: tensors[name].detach().requires_grad_(costs.tensors[name].needs_grad) for name in names}


def really_saved(layered: Layered, first: int, last: int, values: dict[str, Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps after a real forward pass, entering tensors aside."""
    apart = {storage_id(t) for t in (*layered.root.parameters(), *layered.root.buffers(), *values.values())}
    packed: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(weakref.ref(tensor))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = layered.run(first, last, values)
    kept = [tensor for tensor in (reference() for reference in packed) if tensor is not None]
    sizes = {storage_id(tensor): tensor.untyped_storage().nbytes() for tensor in kept}
    del outputs
    return sum(nbytes for storage, nbytes in sizes.items() if storage not in apart)


SDPA, DRY = {"attn_implementation": "sdpa"}, {"dropout": 0.0}


@pytest.mark.parametrize(
    ("model", "options"), [*((m, {}) for m in (*TEXT, *IMAGE)), *((m, o) for m in TEXT for o in (SDPA, DRY))]
)
def test_saved_bytes_equal_a_real_run_at_every_cut(model: str, options: dict[str, object]) -> None:
    load = workload(model, **options)
    costs, layered = count_units(build(load, "meta"), load), build(load)
    tensors = every_tensor(layered, batch(load, ROWS))
    num_units = len(costs.units)
    ranges = [(0, cut) for cut in range(1, num_units + 1)] + [(cut, num_units) for cut in range(1, num_units)]
    ranges += [(cut, cut + num_units // 3) for cut in range(0, num_units - num_units // 3, 5)]
    for first, last in ranges:
        real = really_saved(layered, first, last, entering(costs, first, tensors))
        assert real == costs.saved(first, last).at(ROWS), (costs.units[first].name, costs.units[last - 1].name)


@pytest.mark.parametrize("model", TEXT)
def test_saved_bytes_of_one_row_equal_a_real_run_at_every_layer(model: str) -> None:
    """Between units of a layer one row is special: q, k and v need no copy, so they are kept themselves."""
    load = workload(model)
    costs, layered = count_units(build(load, "meta"), load), build(load)
    tensors = every_tensor(layered, batch(load, 1))
    for first, _ in costs.layers:
        for last in {end for _, end in costs.layers if end > first}:
            real = really_saved(layered, first, last, entering(costs, first, tensors))
            assert real == costs.saved(first, last).at(1)


def allocated(function: Callable[[], Result]) -> tuple[list[int], Result]:
    """Bytes beyond the start after each call of torch's CPU allocator, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return list(accumulate(changes, initial=0)), result


# Convolutions of the other image models use scratch memory of oneDNN's choice, which is no tensor and is not counted.
@pytest.mark.parametrize("model", [*TEXT, "mobilenet-v2-tiny"])
def test_peak_memory_of_a_real_iteration(model: str) -> None:
    """Forward as allocated, but for scalars. Backward up to 3 % above, for a unit's weight gradients count at once."""
    load = workload(model)
    costs, layered = count_units(build(load, "meta"), load), build(load)
    values, whole = batch(load, ROWS), (0, len(costs.units))
    layered.run(*whole, values)
    weights = sum(parameter.nbytes for parameter in layered.root.parameters())
    for new_gradients in (True, False):
        levels, loss = allocated(lambda: layered.run(*whole, values)["loss"])
        after = costs.saved(*whole).at(ROWS) + loss.nbytes
        assert levels[-1] == pytest.approx(after, abs=256)
        assert max(levels) == pytest.approx(after + costs.workspace(*whole, FORWARD, ROWS), abs=256)
        held = weights + after + (0 if new_gradients else weights)
        levels, _ = allocated(loss.backward)
        counted = held + costs.workspace(*whole, BACKWARD, ROWS, new_gradients)
        assert 0.999 * (held + max(levels)) <= counted <= 1.03 * (held + max(levels))


def test_without_autograd_only_the_output_stays() -> None:
    load = workload("t5-tiny", technique="inference")
    costs, layered = count_units(build(load, "meta"), load), build(load)
    values, whole = batch(load, ROWS), (0, len(costs.units))
    with torch.no_grad():
        layered.run(*whole, values)
        levels, logits = allocated(lambda: layered.run(*whole, values)["logits"])
    assert levels[-1] == pytest.approx(logits.nbytes, abs=256)
    assert max(levels) == pytest.approx(logits.nbytes + costs.workspace(*whole, FORWARD, ROWS), abs=256)
