"""PAC for real: hybrid first epochs, what is handed out, cached epochs; equal to one device that caches nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from harness import datasets, models, profile, reference, runner
from harness.costs import Costs
from harness.errors import OrreryError
from harness.experiment import one
from harness.fleet.job import WEIGHTS, Job, _cache
from harness.manifest import identity
from harness.models import shards
from harness.plan import Load, Plan, Store
from harness.plan.graph import InvalidPlan
from harness.plan.serial import to_json
from harness.plan.storage import check_storage
from harness.plan.validate import validate
from harness.schedules import Stage
from harness.simulator import simulate
from harness.workload import Workload
from systems import pac
from tests.harness.engine.devices import by_hand, run_devices
from tests.harness.toys import cluster

TEXT = Workload(
    "bert-tiny",
    "synthetic",
    num_samples=20,
    batch_size=8,
    epochs=3,
    seq_len=16,
    technique="parallel-adapters",
    learning_rate=0.05,
    dropout=0.1,
)
MODELS = ["bert-tiny", "t5-tiny", "bart-tiny", "gpt2-tiny"]


def planned(workload: Workload, grouping: str, micro_batch_size: int = 4, **options: object) -> tuple[Plan, Costs]:
    costs = profile.count(workload)
    devices = cluster(sum(map(int, grouping.split("-"))), memory_bandwidth=1e10)
    asked = {**pac.OPTIONS, "grouping": grouping, "micro_batch_size": micro_batch_size, **options}
    plan = pac.plan(workload, costs, devices, asked)
    validate(plan, costs)
    return plan, costs


GROUPINGS = ["2", "1-1", "2-2", "2-1-1", "1-2", "1-1-2", "2-3"]
#: Of the others, every time; the rest now and then.
OFTEN = {("t5-tiny", "1-1-2"), ("t5-tiny", "2-1-1"), ("bart-tiny", "2-2"), ("gpt2-tiny", "2-1-1")}


@pytest.mark.parametrize(
    ("model", "grouping"),
    [
        pytest.param(m, g, marks=() if m == "bert-tiny" or (m, g) in OFTEN else pytest.mark.slow)
        for m in MODELS
        for g in GROUPINGS
    ],
)
def test_trains_as_one_device_without_a_cache(model: str, grouping: str, tmp_path: Path) -> None:
    """Dropout beside the backbone, three epochs, a smaller last batch."""
    text = replace(TEXT, model=model)
    plan, _ = planned(text, grouping)
    assert {phase.name for phase in plan.phases} >= {"train", "hand out weights", "cached epoch"}
    wanted = reference.train(plan, text, datasets.load(text))
    found = run_devices(plan, text, tmp_path)
    assert found.execution.losses == pytest.approx(wanted.losses, rel=1e-5)
    for state in found.state.values():
        assert reference.max_rel_error(state, wanted.state(), adaptive=False) < 1e-5
    without, _ = planned(text, grouping, cache=False)
    assert run_devices(without, text, tmp_path).execution.losses == pytest.approx(wanted.losses, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd-momentum"])
def test_the_optimizers_state_is_handed_out_with_the_weights(optimizer: str, tmp_path: Path) -> None:
    text = replace(TEXT, model="t5-tiny", optimizer=optimizer, learning_rate=0.01, clip_norm=1.0)
    plan, _ = planned(text, "2-1-1")
    wanted = reference.train(plan, text, datasets.load(text))
    found = run_devices(plan, text, tmp_path)
    assert found.execution.losses == pytest.approx(wanted.losses, rel=1e-4)
    for state in found.state.values():
        assert reference.max_rel_error(state, wanted.state(), adaptive=optimizer == "adamw") < 1e-4


def test_bytes_are_those_of_the_plan_and_the_backbone_is_let_go(tmp_path: Path) -> None:
    plan, costs = planned(TEXT, "2-2")
    found = run_devices(plan, TEXT, tmp_path)
    toys = cluster(4, memory_bandwidth=1e10)
    quick = tuple(replace(device, storage_read=1e9, storage_write=1e9) for device in toys.devices)
    simulated = simulate(plan, costs, replace(toys, devices=quick))
    assert found.execution.trace.link_bytes == simulated.link_bytes
    for device, report in found.reports.items():
        first, cached = report.memory
        assert cached.standing["weights"] < 0.3 * first.standing["weights"]
        assert first.peak == pytest.approx(simulated.peak_bytes[device], rel=0.05)
        assert cached.peak < first.peak
    seen = [phase.memory[device].nbytes for phase in found.execution.trace.phases if phase.memory]
    assert seen == [first.peak, cached.peak], "of the first phase and of the first cached one"
    weights = {name for state in found.state.values() for name in state}
    assert all(set(state) == weights for state in found.state.values()), "all devices end with all trained weights"


def test_what_every_device_has_stored_is_what_it_loads() -> None:
    """After everything that is handed out, sample by sample, in every later epoch."""
    plan, _ = planned(TEXT, "2-1-1")
    held: dict[str, set[tuple[str, int]]] = {device: set() for device in plan.devices}
    epochs, moved = datasets.batches(TEXT), datasets.batches(TEXT)
    loaded = 0
    for phase in plan.phases:
        for _ in range(phase.repeat):
            ids = next(epochs if phase.shards else moved) if phase.micro_batches else []
            for device, actions in phase.actions.items():
                for action in actions:
                    if isinstance(action, (Load, Store)):
                        assert action.value.rows is not None
                        first = sum(phase.micro_batches[: action.value.micro_batch])
                        rows = ids[first + action.value.rows[0] : first + action.value.rows[1]]
                        entries = {(action.value.name, sample) for sample in rows}
                        if isinstance(action, Store):
                            held[device] |= entries
                        else:
                            assert entries <= held[device]
                            loaded += phase.name == "cached epoch"
    assert loaded


@pytest.mark.parametrize("grouping", ["1-1", "2-1-1"])
def test_without_one_of_its_stores_a_plan_is_rejected(grouping: str) -> None:
    """In the first epoch or in what is handed out: the row that is not there is named."""
    plan, _ = planned(TEXT, grouping)
    for place, phase in enumerate(plan.phases):
        for device, actions in phase.actions.items():
            for index in [i for i, action in enumerate(actions) if isinstance(action, Store)][::5]:
                value = actions[index].value
                less = {**phase.actions, device: actions[:index] + actions[index + 1 :]}
                phases = (*plan.phases[:place], replace(phase, actions=less), *plan.phases[place + 1 :])
                with pytest.raises(InvalidPlan, match=rf"loads {value.name} of row \d+ of \d+ batches of"):
                    check_storage(replace(plan, phases=phases))


def test_a_plan_is_for_one_optimizer_and_begins_with_what_fills_the_cache(tmp_path: Path) -> None:
    """Saved plans run with other workloads: refused, not computed wrongly."""
    asked = {"model": "bert-tiny", "dataset": "synthetic", "technique": "parallel-adapters", "testbed": "local-2"}
    asked |= {"num_samples": 8, "batch_size": 4, "seq_len": 16, "epochs": 2}
    _, plan = runner.make_plan(one({**asked, "method": "pac"}, {"grouping": "1-1"}))
    path = tmp_path / "plan.json"
    path.write_text(to_json(plan))
    assert runner.run(one({**asked, "plan": str(path)}, {})).status == "ok"
    for optimizer, copies in (("sgd-momentum", 1), ("adamw", 2)):
        with pytest.raises(OrreryError, match=f"optimizer's state, and {optimizer} keeps {copies}"):
            runner.run(one({**asked, "plan": str(path), "optimizer": optimizer}, {}))
    later = tuple(phase for phase in plan.phases if phase.cached)
    path.write_text(to_json(replace(plan, phases=later)))
    with pytest.raises(OrreryError, match="begins with 'cached epoch', which reads from a cache, and no phase before"):
        runner.run(one({**asked, "plan": str(path), "epochs": 1}, {}))


def test_damaged_entries_are_made_again_from_the_weights(tmp_path: Path) -> None:
    """What a worker's cache recomputes is what the model makes of these samples, bit by bit."""
    plan, costs = planned(TEXT, "1-1")
    shards.write(TEXT, tmp_path / WEIGHTS)
    data, ids = datasets.load(TEXT), [3, 11]
    job = Job("device0", "", {}, str(tmp_path), 0, "", "", identity=identity(TEXT, tmp_path / WEIGHTS))
    cache = _cache(job, plan, TEXT, data)
    try:
        for name in costs.cacheable:
            wanted = models.build(TEXT).run(0, plan.num_units, data.batch(ids), wanted=costs.cacheable)[name]
            cache.put(name, ids, wanted)
            (path,) = cache.folder.glob(f"{name}.bin")
            path.write_bytes(b"")
            assert torch.equal(cache.get(name, ids), wanted.detach())
        assert cache.recomputed == len(ids) * len(costs.cacheable)
    finally:
        cache.clear()


@pytest.mark.parametrize(
    ("model", "grouping", "options"),
    [
        ("t5-tiny", "1-1-2", {"gate": True, "dropped": "0", "init": "pruning"}),
        ("bert-tiny", "2-1-1", {"gate": True, "dropped": "1,2", "init": "pruning", "reduction": 4}),
    ],
)
def test_gated_dropped_and_pruned_side_networks_train_as_on_one_device(
    model: str, grouping: str, options: dict[str, object], tmp_path: Path
) -> None:
    """Cached epochs among them; and nothing is cached for a layer that has none beside it."""
    text = replace(TEXT, model=model, technique_options=options)
    plan, costs = planned(text, grouping)
    every = profile.count(replace(TEXT, model=model)).cacheable
    kept = [name for name in every if not name.endswith(("encoder.0.hidden", "layer.1.hidden", "layer.2.hidden"))]
    assert list(costs.cacheable) == [name for name in kept if name != "decoder.0.hidden"] and len(kept) < len(every)
    actions = [action for phase in plan.phases for listed in phase.actions.values() for action in listed]
    stored = {action.value.name for action in actions if isinstance(action, Store)}
    assert stored == set(costs.cacheable)
    wanted = reference.train(plan, text, datasets.load(text))
    found = run_devices(plan, text, tmp_path)
    assert found.execution.losses == pytest.approx(wanted.losses, rel=1e-5)
    moved = {name: tensor for name, tensor in wanted.state().items() if name.endswith("alpha")}
    assert moved and all(tensor.abs() > 1e-4 for tensor in moved.values())
    for state in found.state.values():
        assert reference.max_rel_error(state, wanted.state(), adaptive=False) < 1e-5


def test_a_stage_beside_which_nothing_is_just_hands_on(tmp_path: Path) -> None:
    """Its only layer has no side layer: the side network's state, and its gradient, go through it."""
    text = replace(TEXT, technique_options={"dropped": "1,2"}, epochs=1)
    costs = profile.count(text)
    edges = [0, costs.layers[2][0], costs.layers[4][0], len(costs.units)]
    stages = [Stage((a, b), (f"device{n}",), (1.0,)) for n, (a, b) in enumerate(pairwise(edges))]
    plan = by_hand(costs, text, stages, 4, [3, 2, 1])
    validate(plan, costs)
    wanted = reference.train(plan, text, datasets.load(text))
    found = run_devices(plan, text, tmp_path)
    assert found.execution.losses == pytest.approx(wanted.losses, rel=1e-5)
    for state in found.state.values():
        assert reference.max_rel_error(state, wanted.state(), adaptive=False) < 1e-5
