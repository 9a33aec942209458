"""Counted memory against real runs on real tensors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from harness.costs import BACKWARD, FORWARD, Costs
from harness.models import build
from harness.models.layered import Layered
from harness.profile.counting import count_units
from harness.profile.track import Tracker, storage_id
from tests.harness.profile.tiny import IMAGE, TEXT, batch, workload

ROWS = 3


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


@pytest.mark.parametrize("options", [{}, {"attn_implementation": "sdpa"}, {"dropout": 0.0}], ids=["", "sdpa", "dry"])
@pytest.mark.parametrize("model", [*TEXT, *IMAGE])
def test_saved_bytes_equal_a_real_run_at_every_cut(model: str, options: dict[str, object]) -> None:
    if model in IMAGE and options:
        pytest.skip("no attention, and no dropout but before the classifier")
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


@contextmanager
def tracked() -> Iterator[Tracker]:
    gc.collect()
    gc.disable()
    try:
        with Tracker() as tracker:
            yield tracker
    finally:
        gc.enable()


@pytest.mark.parametrize("model", [*TEXT, *IMAGE])
def test_peak_memory_of_a_real_iteration(model: str) -> None:
    """Forward to the byte. Backward within 2 % of all that is alive: of a unit's weight gradients, all count at once."""
    load = workload(model)
    costs, layered = count_units(build(load, "meta"), load), build(load)
    values, whole = batch(load, ROWS), (0, len(costs.units))
    every_tensor(layered, values)
    weights = sum(parameter.nbytes for parameter in layered.root.parameters())
    for new_gradients in (True, False):
        with tracked() as tracker:
            loss = layered.run(*whole, values)["loss"]
            peak = max(tracker.levels())
            before = sum(tracker.alive.values())
            passed = len(tracker.changes)
            loss.backward()
        held = weights + before + (0 if new_gradients else weights)
        counted = held + costs.workspace(*whole, BACKWARD, ROWS, new_gradients)
        assert before == costs.saved(*whole).at(ROWS) + loss.nbytes
        assert peak == before + costs.workspace(*whole, FORWARD, ROWS)
        assert counted == pytest.approx(held - before + max(list(tracker.levels())[passed:]), rel=0.02)


def test_what_stays_after_a_forward_pass_is_what_autograd_saved() -> None:
    """Two ways to see the same: hooks on what autograd packs, and the storages that are still alive."""
    load = workload("bert-tiny")
    layered = build(load)
    values = batch(load, ROWS)
    with tracked() as tracker:
        loss = layered.run(0, len(layered.units), values)["loss"]
    del loss
    assert sum(tracker.alive.values()) == 0
    with torch.no_grad(), tracked() as tracker:
        logits = layered.run(0, len(layered.units) - 1, values)["logits"]
    assert sum(tracker.alive.values()) == logits.nbytes
