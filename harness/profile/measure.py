"""What the units of a workload cost on this machine, in seconds.

Units are not timed one by one: each would pay for starting autograd, and none would meet the caches as its neighbours
leave them. Whole iterations run as the engine runs them, dropout by key too, in turn plain and with a time stamp at
every boundary between units: the stamps say how an iteration is shared out, the plain ones how long it is. A machine's
speed changes while that goes on, so every number of rows is timed at the speed of the core that it met, and all are
given at one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from harness import datasets
from harness.costs import BACKWARD, DIRECTIONS, FORWARD, UPDATE, Costs
from harness.engine.dropout import KeyedDropout
from harness.heap import keep_freed_memory
from harness.models import build
from harness.models.layered import Layered, Unit
from harness.optimizers import optimizer_for
from harness.profile import store
from harness.profile.core import Core
from harness.profile.parts import fixed_shares
from harness.threads import one_thread
from harness.workload import Workload

#: The name of this machine's table in `Costs.measured`; a device with `measured = "local"` is timed by it.
LOCAL = "local"
WARM_UPS = 2
#: Short iterations are repeated for so long, or so often: a machine with neighbours is faster and slower by turns.
LEAST_S, MOST_REPEATS = 1.0, 50
#: Between iterations the core is timed for so long.
CORE_S = 0.01
#: A shorter iteration would tell of the cold caches that it finds after that: one is run before it, which is not timed.
SHORT_S = 0.1
#: A forward pass of more takes seconds on one core, and all of them minutes: then we say what is going on.
LONG_FLOPS = 5e10

Batches = Callable[[int], Mapping[str, Tensor]]
Span = tuple[float, float]


def on_this_machine(workload: Workload, costs: Costs, rows: Sequence[int]) -> Costs:
    """`measured` with one thread, as a device computes here, on synthetic data in the workload's shape.

    Times depend on shapes, not on words.
    """
    samples = datasets.load(replace(workload, dataset="synthetic", num_samples=max(workload.batch_size, *rows)))

    def batch_of(count: int) -> Mapping[str, Tensor]:
        return samples.batch(range(count))

    with one_thread():
        found = measured(workload, costs, batch_of, rows)
        if costs.decoding is None:
            return found
        return replace(found, decoding=measured(workload, costs.decoding, batch_of, rows))


def measured(
    workload: Workload, costs: Costs, batch_of: Batches, rows: Sequence[int], repeats: int = 7, least_s: float = LEAST_S
) -> Costs:
    """`costs`, which may be those of one more token, with the seconds of every unit on this machine as
    `measured["local"]`.

    `batch_of(rows)` gives the tensors of that many samples by name, labels included. Measured once per machine,
    number of threads and content, then read from the cache beside the counted costs.
    """
    asked = {
        "host": fingerprint(),
        "optimizer": workload.optimizer,
        "rows": list(rows),
        "repeats": repeats,
        "least_s": least_s,
        "dropout": "keyed",
        "freed memory": "kept",
        "caches": "warm",
        "parts": "measured",
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    path = store.folder() / f"{costs.key}-{digest}.json"
    timed = store.read(path, store.timed_from_dict)
    if timed is None:
        if costs.work(0, len(costs.units), FORWARD).flops(max(rows)) > LONG_FLOPS:
            print(f"measuring the units of {workload.model} on this machine, once", file=sys.stderr, flush=True)
        keep_freed_memory()
        layered = build(workload)
        if costs.decodes:
            batch_of = _after_prompt(layered, batch_of)
            assert layered.decoding is not None
            layered = layered.decoding
        optimizer = None
        if workload.training:
            optimizer = optimizer_for(workload, [p for p in layered.root.parameters() if p.requires_grad])
        timed = measure_units(layered, optimizer, batch_of, rows, repeats, least_s)
        if not workload.training and any(unit.cut is not None for unit in costs.units):
            shares = fixed_shares(workload, costs, layered, batch_of(max(rows)), least_s)
            timed = timed._replace(fixed_shares=shares)
        store.write(path, timed._asdict())
    return replace(
        costs,
        measured={**costs.measured, LOCAL: timed.seconds},
        core_flops_per_s={**costs.core_flops_per_s, LOCAL: timed.core_flops_per_s},
        fixed_shares={**costs.fixed_shares, LOCAL: timed.fixed_shares} if timed.fixed_shares else costs.fixed_shares,
    )


def _after_prompt(layered: Layered, batch_of: Batches) -> Batches:
    """What one more token is made from: what is kept of a prompt, and the place in it that comes next."""

    def following(rows: int) -> Mapping[str, Tensor]:
        prompt = dict(batch_of(rows))
        with torch.no_grad():
            made = layered.run(0, len(layered.units), dict(prompt), wanted=layered.kept)
        position = torch.tensor([prompt["input_ids"].shape[1]])
        return {**prompt, **{name: made[name] for name in layered.kept}, "cache_position": position}

    return following


def measure_units(
    layered: Layered,
    optimizer: torch.optim.Optimizer | None,
    batch_of: Batches,
    rows: Sequence[int],
    repeats: int,
    least_s: float = 0.0,
) -> store.Timed:
    """Seconds of each unit (the chain, then the local units) per direction, as ((rows, seconds), ...).

    Medians of `repeats` iterations of forward and backward, or of forward alone for a model in eval mode, scaled to
    add up to the median of as many plain iterations; of more where they take less than `least_s` together. `layered`
    is trained on the way, if there is an optimizer.
    """
    names = [unit.name for unit in (*layered.units, *layered.local_units)]
    core = Core()
    updates: list[float] = []
    rates: list[float] = []
    points: dict[str, list[list[tuple[int, float]]]] = {direction: [[] for _ in names] for direction in DIRECTIONS}
    for count in sorted(rows):
        batch = batch_of(count)
        plain: list[dict[str, Span]] = []
        stamped: list[dict[str, dict[str, float]]] = []
        found: list[float] = []
        began = perf_counter()
        while len(plain) < WARM_UPS + (repeats if perf_counter() - began >= least_s else MOST_REPEATS):
            if not plain or max(end for _, end in plain[-1].values()) - plain[-1][FORWARD][0] < SHORT_S:
                _iteration(layered, batch, count, optimizer)
            plain.append(_iteration(layered, batch, count, optimizer))
            stamped.append(_stamped_iteration(layered, batch, count))
            found.append(core.flops_per_s(CORE_S))
        rates.append(statistics.median(found))
        for direction in plain[0].keys() & set(DIRECTIONS):
            whole = rates[-1] * statistics.median(run[direction][1] - run[direction][0] for run in plain[WARM_UPS:])
            parts = [statistics.median(run[direction].get(name, 0.0) for run in stamped[WARM_UPS:]) for name in names]
            for unit, seconds in zip(points[direction], parts, strict=True):
                unit.append((count, seconds * whole / sum(parts)))
        if BACKWARD not in plain[0]:
            for unit in points[BACKWARD]:
                unit.append((count, 0.0))
        updates += [rates[-1] * (run[UPDATE][1] - run[UPDATE][0]) for run in plain[WARM_UPS:] if UPDATE in run]
    rate = statistics.median(rates)
    table = {
        direction: tuple(tuple((count, work / rate) for count, work in unit) for unit in points[direction])
        for direction in DIRECTIONS
    }
    if updates:
        table[UPDATE] = _shared_by_weights(layered, statistics.median(updates) / rate)
    return store.Timed(table, rate)


def _shared_by_weights(layered: Layered, seconds: float) -> tuple[tuple[tuple[int, float], ...], ...]:
    """An update's time, shared out among the units by the number of tensors they have to update."""
    counts = []
    seen: set[int] = set()
    for unit in (*layered.units, *layered.local_units):
        own = {id(p) for p in unit.parameters() if p.requires_grad} - seen
        seen |= own
        counts.append(len(own))
    return tuple(((1, seconds * count / len(seen)),) for count in counts)


def _iteration(
    layered: Layered, batch: Mapping[str, Tensor], rows: int, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Span]:
    """When each direction, and the update, began and ended."""
    training = layered.root.training
    masks = KeyedDropout(seed=0)
    began = perf_counter()
    with torch.set_grad_enabled(training), masks.samples(0, range(rows)):
        values = layered.run(0, len(layered.units), dict(batch), entering=masks.enter)
    spans = {FORWARD: (began, perf_counter())}
    if training:
        loss = values["loss"] / rows
        began = perf_counter()
        loss.backward()
        spans[BACKWARD] = (began, perf_counter())
        if optimizer is not None:
            began = perf_counter()
            optimizer.step()
            layered.root.zero_grad(set_to_none=True)
            spans[UPDATE] = (began, perf_counter())
        layered.root.zero_grad(set_to_none=True)
    return spans


def _stamped_iteration(layered: Layered, batch: Mapping[str, Tensor], rows: int) -> dict[str, dict[str, float]]:
    """Seconds by direction and unit name."""
    begun: dict[str, dict[str, float]] = {direction: {} for direction in DIRECTIONS}
    hooks = [hook for unit in (*layered.local_units, *layered.units) for hook in _stamp(unit, begun)]
    try:
        spans = _iteration(layered, batch, rows)
    finally:
        for hook in hooks:
            hook.remove()
    return {direction: _parts(span, begun[direction]) for direction, span in spans.items()}


def _stamp(unit: Unit, begun: Mapping[str, dict[str, float]]) -> tuple[RemovableHandle, RemovableHandle]:
    """Notes when the unit's forward pass begins, and when its backward pass does: with its first whole gradient."""

    def forward_begins(*_: object) -> None:
        begun[FORWARD][unit.name] = perf_counter()

    def backward_begins(_: Tensor) -> None:
        begun[BACKWARD].setdefault(unit.name, perf_counter())

    def watch(module: nn.Module, tensors: object, outputs: tuple[Tensor, ...]) -> None:
        for output in outputs:
            if output.requires_grad:
                output.register_hook(backward_begins)

    return unit.register_forward_pre_hook(forward_begins), unit.register_forward_hook(watch)


def _parts(span: Span, begun: Mapping[str, float]) -> dict[str, float]:
    """Units run one after the other, backward too (autograd takes what was made last): each ends where one begins."""
    order = sorted(begun, key=begun.__getitem__)
    stamps = [span[0], *(begun[name] for name in order[1:]), span[1]]
    return {name: after - before for name, (before, after) in zip(order, pairwise(stamps), strict=True)}


def fingerprint() -> dict[str, object]:
    """What a measured time depends on besides the workload."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _cpu_model() -> str:
    """The processor's name; Linux says it in /proc/cpuinfo, on Arm by board."""
    for path, key in ((Path("/proc/cpuinfo"), "model name"), (Path("/proc/device-tree/model"), "")):
        if path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith(key):
                    return line.partition(":")[2].strip() or line.strip("\0 ")
    return platform.processor() or platform.machine()
