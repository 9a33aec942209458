"""What several devices train is what one device trains: every method, every family, and plans written by hand.

The oracle is `harness.reference`: one process, plain autograd. In float32 some workloads magnify rounding: batch norm
over few values, and AdamW, which divides gradients near zero by their own size. Two orders of the same sums then differ
by more than 1e-5 in the oracle itself; float64 shows that they are equal.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from baselines import eddl, gpipe, pipedream_1f1b, standalone
from harness import datasets, models, profile, reference
from harness.plan import Plan
from harness.plan.serial import from_json, to_json
from harness.plan.validate import validate
from harness.schedules import Stage
from harness.workload import Workload
from tests.harness.engine.devices import by_hand, run_devices
from tests.harness.engine.equality import assert_buffers, assert_equal, assert_reported, layered_stages, simulated
from tests.harness.toys import cluster

#: Five iterations, the third of four rows: with micro-batches of three rows, one is of a single row.
TEXT = Workload(
    "bert-tiny",
    "synthetic",
    num_samples=20,
    batch_size=8,
    steps=5,
    seq_len=16,
    dropout=0.1,
    optimizer="sgd-momentum",
    learning_rate=0.05,
)
CLIPPED = {"clip_norm": 0.5}
ADAMW = {"optimizer": "adamw", "learning_rate": 1e-3}
ADAMW64 = {**ADAMW, "dtype": "float64"}
LORA = {"technique": "lora", **CLIPPED}
ADAPTERS = {"technique": "adapters", **ADAMW64}
PARALLEL_ADAPTERS = {"technique": "parallel-adapters", **CLIPPED}
#: At least four rows in a piece.
IMAGES = Workload(
    "resnet-tiny",
    "synthetic",
    num_samples=48,
    batch_size=32,
    steps=4,
    seq_len=None,
    image_size=32,
    num_labels=10,
    dtype="float64",
    optimizer="sgd-momentum",
    learning_rate=0.05,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def planned(method: ModuleType, workload: Workload, num_devices: int, micro_batch_size: int = 3) -> Plan:
    options = {**method.OPTIONS, "micro_batch_size": micro_batch_size}
    return method.plan(workload, profile.count(workload), cluster(num_devices, memory_bandwidth=1e10), options)


@cache
def whole(workload: Workload) -> reference.Reference:
    """The batch in one piece on one device: without batch norm it is the oracle of every plan."""
    plan = planned(standalone, workload, 1, workload.batch_size)
    return reference.train(plan, workload, datasets.load(workload))


@pytest.mark.parametrize(
    ("method", "num_devices", "model", "options"),
    [
        (eddl, 2, "bert-tiny", CLIPPED),
        (eddl, 2, "distilbert-tiny", ADAMW),
        (eddl, 3, "t5-tiny", {}),
        (eddl, 4, "gpt2-tiny", ADAMW64),
        (gpipe, 2, "bart-tiny", ADAMW64),
        (gpipe, 3, "bert-tiny", CLIPPED),
        (gpipe, 4, "t5-tiny", CLIPPED),
        (pipedream_1f1b, 2, "gpt2-tiny", {"optimizer": "sgd"}),
        (pipedream_1f1b, 3, "bart-tiny", CLIPPED),
        (pipedream_1f1b, 4, "t5-tiny", ADAMW),
        (eddl, 2, "gpt2-tiny", LORA),
        (gpipe, 3, "t5-tiny", LORA),
        (gpipe, 2, "opt-tiny", ADAPTERS),
        (pipedream_1f1b, 4, "bart-tiny", ADAPTERS),
        (eddl, 3, "bart-tiny", {**PARALLEL_ADAPTERS, "dtype": "float64"}),
        (pipedream_1f1b, 4, "t5-tiny", PARALLEL_ADAPTERS),
    ],
    ids=lambda it: it.__name__.rpartition(".")[2] if isinstance(it, ModuleType) else str(it).replace("'", ""),
)
def test_methods_train_what_one_device_trains(
    method: ModuleType, num_devices: int, model: str, options: dict[str, object], folder: Path
) -> None:
    """Dropout, a smaller last batch, uneven micro-batches; tied embeddings, position biases and an encoder's output."""
    workload = replace(TEXT, model=model, **options)
    plan = planned(method, workload, num_devices)
    assert {phase.micro_batches for phase in plan.phases} == {(3, 3, 2), (3, 1)}
    validate(plan, profile.count(workload))
    ours = run_devices(plan, workload, folder)
    assert_equal(ours, whole(workload), workload)
    assert_reported(ours, plan, workload)


@pytest.mark.parametrize("options", [{}, {**ADAMW, **CLIPPED}], ids=["momentum", "adamw-clipped"])
@pytest.mark.parametrize(("method", "num_devices"), [(eddl, 2), (gpipe, 3), (pipedream_1f1b, 4)])
def test_batch_norm_equals_the_same_pieces_on_one_device(
    method: ModuleType, num_devices: int, options: dict[str, object], folder: Path
) -> None:
    """Its statistics are local: those of a stage's first device are the oracle's."""
    workload = replace(IMAGES, **options)
    plan = planned(method, workload, num_devices, micro_batch_size=8)
    ours = run_devices(plan, workload, folder)
    oracle = reference.train(plan, workload, datasets.load(workload))
    assert_equal(ours, oracle, workload)
    assert_reported(ours, plan, workload)
    assert_buffers(ours, oracle, plan)


@pytest.mark.parametrize(
    ("model", "groups", "micro_batch_size", "warmup", "options"),
    [
        ("bert-tiny", [(2, (1,)), (0, (1, 2))], 3, (3, 2), CLIPPED),
        ("t5-tiny", [(3, (3, 1)), (0, (1,))], 3, (2, 1), CLIPPED),
        ("bart-tiny", [(3, (3, 1)), (0, (1, 2))], 3, (2, 1), {}),
        ("gpt2-tiny", [(2, (1, 2)), (0, (3, 1))], 2, (3, 2), ADAMW64),
        ("t5-tiny", [(2, (1,)), (2, (1, 2)), (0, (1,))], 2, (4, 3, 1), ADAMW),
    ],
    ids=["1+2", "2+1", "2+2", "2+2-adamw", "1+2+1"],
)
def test_replicated_stages_with_uneven_shares(
    model: str,
    groups: list[tuple[int, tuple[float, ...]]],
    micro_batch_size: int,
    warmup: tuple[int, ...],
    options: dict[str, object],
    folder: Path,
) -> None:
    """Written by hand, to a file and back; a device may have no row of a small micro-batch."""
    workload = replace(TEXT, model=model, **options)
    stages = layered_stages(workload, groups)
    plan = from_json(to_json(by_hand(profile.count(workload), workload, stages, micro_batch_size, warmup)))
    validate(plan, profile.count(workload))
    ours = run_devices(plan, workload, folder)
    assert_equal(ours, whole(workload), workload)
    assert_reported(ours, plan, workload)


def test_replicated_stages_with_batch_norm(folder: Path) -> None:
    stages = layered_stages(IMAGES, [(2, (1,)), (0, (1, 2))])
    plan = by_hand(profile.count(IMAGES), IMAGES, stages, 16, (2, 1))
    ours = run_devices(plan, IMAGES, folder)
    oracle = reference.train(plan, IMAGES, datasets.load(IMAGES))
    assert_equal(ours, oracle, IMAGES)
    other = reference.train(planned(standalone, IMAGES, 1, 32), IMAGES, datasets.load(IMAGES))
    assert abs(oracle.losses[-1] - other.losses[-1]) > 1e-3  # pieces matter


def test_a_stage_without_weights(folder: Path) -> None:
    """The loss alone: the device takes part in clipping, and has nothing to update."""
    workload = replace(TEXT, **CLIPPED)
    costs = profile.count(workload)
    count = len(costs.units)
    assert not costs.parameters_of(count - 1, count)
    stages = [Stage((0, 9), ("device0",), (1,)), Stage((9, count - 1), ("device1",), (1,))]
    stages.append(Stage((count - 1, count), ("device2",), (1,)))
    plan = by_hand(costs, workload, stages, 3, (3, 2, 1))
    assert_equal(run_devices(plan, workload, folder), whole(workload), workload)


def test_devices_without_rows(folder: Path) -> None:
    """The second of three replicas never gets one: its gradient is zero, and its weights follow the others'."""
    stages = [Stage((0, len(profile.count(TEXT).units)), ("device0", "device1", "device2"), (1, 0, 1))]
    plan = by_hand(profile.count(TEXT), TEXT, stages, 4, (1,))
    assert {rows for phase in plan.phases for rows in phase.shards["device1"].micro_batch_rows} == {(2, 2)}
    assert_equal(run_devices(plan, TEXT, folder), whole(TEXT), TEXT)


def test_runs_are_equal_to_the_last_bit(folder: Path) -> None:
    """Thirty iterations on two replicated stages, twice: sums are in the order of the ring, whoever comes first."""
    workload = replace(TEXT, steps=30, seq_len=8, **CLIPPED)
    plan = by_hand(profile.count(workload), workload, layered_stages(workload, [(2, (3, 1)), (0, (1, 2))]), 2, (3, 1))
    one, two = (run_devices(plan, workload, folder) for _ in range(2))
    assert len(one.execution.losses) == 30 and one.execution.losses == two.execution.losses
    for device, tensors in one.state.items():
        assert all(torch.equal(tensor, two.state[device][name]) for name, tensor in tensors.items())


def test_how_far_tensors_are_apart() -> None:
    """By the largest element of each; a key's bias absolutely, 1e-6 counting as much as 1e-5; NaN is never hidden."""
    one, far = torch.tensor([0.0, 2.0]), torch.tensor([0.5, 2.0])
    assert reference.max_rel_error({"w": far, "w/exp_avg": one}, {"w": one, "w/exp_avg": one}, adaptive=False) == 0.25
    assert reference.max_rel_error({"w": far, "w/exp_avg": one}, {"w": one, "w/exp_avg": one}, adaptive=True) == 0
    for name in ("a.key.bias", "a.k_proj.bias", "a.k_lin.bias", "a.project_bn.bias"):
        apart = reference.max_rel_error({name: torch.tensor([1e-6])}, {name: torch.tensor([1e-12])}, adaptive=False)
        assert apart == pytest.approx(1e-5, rel=1e-3)
    lost = {"a": one, "b": one * torch.nan, "c": one}
    assert math.isnan(reference.max_rel_error(lost, dict.fromkeys("abc", one), adaptive=False))


@pytest.mark.parametrize(("model", "num_devices"), [("gpt2-tiny", 2), ("t5-tiny", 3)])
def test_inference_answers_and_trains_nothing(model: str, num_devices: int, folder: Path) -> None:
    workload = replace(TEXT, model=model, technique="inference")
    plan = planned(gpipe, workload, num_devices)
    answers: list[torch.Tensor] = []

    def watch(device: str, shard: object) -> None:
        if device == plan.devices[-1]:
            head = shard.layered.units[-1]
            head.register_forward_hook(lambda unit, inputs, outputs: answers.append(outputs[0]))

    ours = run_devices(plan, workload, folder, before=watch)
    untrained = models.build(workload)
    wanted = dict(untrained.root.named_parameters())
    for tensors in ours.state.values():
        assert tensors and all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items())
    dataset = datasets.load(workload)
    order = datasets.sample_order(workload.num_samples, 0, workload.seed)
    with torch.inference_mode():
        logits = untrained.run(0, len(untrained.units), dataset.batch(order[:8]))["logits"]
    torch.testing.assert_close(torch.cat(answers[:3]), logits, rtol=1e-5, atol=1e-5)
    rehearsal, again, first = (torch.cat(answers[start : start + 3]) for start in (0, 3, 6))
    assert torch.equal(rehearsal, again) and torch.equal(rehearsal, first)
    trace = ours.execution.trace
    assert ours.execution.losses == ()
    assert [len(phase.iteration_s) for phase in trace.phases] == [phase.repeat for phase in plan.phases] == [2, 1, 2]
    assert all(seconds > 0 for phase in trace.phases for seconds in phase.iteration_s)
    assert dict(trace.link_bytes) == dict(simulated(plan, workload).link_bytes)
