"""Training with layers shared among devices: every scheme trains what one device trains, and moves what it should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness import datasets, models, profile, reference
from harness.costs import Costs
from harness.errors import Unsupported
from harness.models.cuts import Piece
from harness.plan import Action, Collective, Combine, Free, Plan
from harness.plan.graph import InvalidPlan
from harness.plan.validate import validate
from harness.sharded import HYBRID, SEQUENCE, TENSOR, Shares
from harness.simulator import simulate
from harness.workload import Workload
from tests.harness.engine.devices import Trained, run_devices
from tests.harness.models import text_oracle
from tests.harness.test_sharded import planned, uneven
from tests.harness.toys import cluster

MODELS = ("bert-tiny", "distilbert-tiny", "gpt2-tiny", "opt-tiny")


def batches(model: str, **options: object) -> Workload:
    """Three updates, the last with fewer rows."""
    defaults = {"dropout": 0.0, "optimizer": "sgd-momentum", "learning_rate": 0.05}
    asked = text_oracle.workload(model, technique="full", **{**defaults, **options})
    return replace(asked, num_samples=8, batch_size=3)


def assert_trained(ours: Trained, plan: Plan, load: Workload) -> None:
    """Losses and every device's part of every weight are what one device has after the same batches."""
    oracle = reference.train(plan, load, datasets.load(load))
    assert ours.execution.losses == pytest.approx(oracle.losses, abs=1e-5)
    wanted, adaptive = oracle.state(), load.optimizer == "adamw"
    for device, shard in ours.shards.items():
        found = ours.state[device]
        error = reference.max_rel_error(found, wanted, adaptive, shard.layered.pieces)
        assert error <= 1e-5, device
    assert {name for tensors in ours.state.values() for name in tensors} == wanted.keys()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("scheme", "embeddings", "count"),
    [
        (TENSOR, "everywhere", 2),
        (TENSOR, "leader", 5),
        (SEQUENCE, "everywhere", 3),
        (SEQUENCE, "leader", 5),
        (HYBRID, "everywhere", 5),
        (HYBRID, "leader", 2),
    ],
)
def test_trains_what_one_device_trains(model: str, scheme: str, embeddings: str, count: int, tmp_path: Path) -> None:
    """Whole batches, or of three devices in micro-batches of two rows and one."""
    load, size = batches(model), 2 if count == 3 else None
    shares = uneven(profile.count(load), count)
    plan, costs = planned(load, scheme, shares, embeddings=embeddings, micro_batch_size=size)
    ours = run_devices(plan, load, tmp_path)
    assert_trained(ours, plan, load)
    simulated = simulate(plan, costs, cluster(count, memory_bandwidth=1e10))
    assert dict(ours.execution.trace.link_bytes) == dict(simulated.link_bytes)


@pytest.mark.parametrize("scheme", [TENSOR, SEQUENCE, HYBRID])
@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"optimizer": "adamw", "learning_rate": 1e-3}])
def test_dropout_and_moments_are_those_of_one_device(scheme: str, options: dict[str, object], tmp_path: Path) -> None:
    load = batches("bert-tiny", attn_implementation="eager", **options)
    plan, _ = planned(load, scheme, uneven(profile.count(load), 3), embeddings="everywhere")
    assert_trained(run_devices(plan, load, tmp_path), plan, load)


@pytest.mark.parametrize("scheme", [TENSOR, SEQUENCE])
def test_trains_what_plain_torch_trains(scheme: str, tmp_path: Path) -> None:
    """The unsharded Hugging Face model under torch's own SGD, without a line of ours."""
    load = batches("bert-tiny")
    plan, _ = planned(load, scheme, 3, embeddings="everywhere")
    ours = run_devices(plan, load, tmp_path)
    root, dataset = models.build(load).root.train(), datasets.load(load)
    optimizer = torch.optim.SGD(root.parameters(), lr=load.learning_rate, momentum=0.9)
    for ids, _ in zip(datasets.batches(load), ours.execution.losses, strict=False):
        loss = root(**dataset.batch(ids)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wanted = {name: parameter.detach() for name, parameter in root.named_parameters()}
    for device, shard in ours.shards.items():
        found = {name: tensor for name, tensor in ours.state[device].items() if "/" not in name}
        assert reference.max_rel_error(found, wanted, False, shard.layered.pieces) <= 1e-5


def sent(load: Workload, scheme: str, count: int, **how: object) -> tuple[float, Costs]:
    """Bytes that every device sends for a batch, and what the model is made of."""
    plan, costs = planned(replace(load, steps=1), scheme, count, **how)
    trace = simulate(plan, costs, cluster(count, memory_bandwidth=1e10))
    by_device = {device: sum(n for (a, _), n in trace.link_bytes.items() if a == device) for device in plan.devices}
    assert len(set(by_device.values())) == 1
    return by_device[plan.devices[0]], costs


@pytest.mark.parametrize("count", [2, 4])
def test_bytes_are_those_of_the_closed_forms(count: int) -> None:
    """Tensor parallelism: four ring all-reduces of [rows, tokens, hidden] per layer. Sequence parallelism: keys and
    values gathered, their gradients scattered, all gradients but the head's reduced, and the last hidden states."""
    load = replace(batches("bert-tiny"), batch_size=4, num_samples=4, seq_len=16)
    config = models.entry("bert-tiny").config
    layers, hidden, share = config["num_hidden_layers"], 4 * 4 * 16 * config["hidden_size"], (count - 1) / count
    tensor, costs = sent(load, TENSOR, count, embeddings="everywhere")
    assert tensor == 4 * layers * 2 * hidden * share
    sequence, _ = sent(load, SEQUENCE, count, embeddings="everywhere")
    head = {name for unit in costs.units if unit.kind == "head" for name in unit.parameters}
    reduced = sum(p.bytes for name, p in costs.parameters.items() if name not in head)
    assert sequence == pytest.approx(2 * reduced * share + (4 * layers + 1) * hidden * share, abs=16)


@pytest.mark.parametrize(("scheme", "rel"), [(TENSOR, 0.05), (SEQUENCE, 0.05), (HYBRID, 0.12)])
def test_a_device_never_holds_more_than_the_plan_says(scheme: str, rel: float, tmp_path: Path) -> None:
    load = replace(batches("bert-tiny"), seq_len=64, batch_size=4)
    plan, costs = planned(load, scheme, Shares((3, 1), (100, 28), (40, 24)), embeddings="everywhere")
    found = run_devices(plan, load, tmp_path)
    simulated = simulate(plan, costs, cluster(2, memory_bandwidth=1e10))
    for device, report in found.reports.items():
        for kind in ("weights", "optimizer"):
            held = [value for value in plan.phases[0].live[device] if plan.tensors[value.name].kind == kind]
            assert report.memory[0].standing[kind] == sum(map(plan.bytes, held))
        assert report.memory[0].peak == pytest.approx(simulated.peak_bytes[device], rel=rel)


def unsummed(action: Action) -> list[Action]:
    """In the place of a collective or a sum: the device's own part, as if it were all."""
    if isinstance(action, Collective) and action.kind == "all-reduce":
        return [Combine("sum", (action.value,), action.result, in_place=True)]
    if isinstance(action, Collective):
        return [Combine("slice", (action.value,), action.result), Free((action.value,))]
    assert isinstance(action, Combine)
    return [Combine("sum", action.reads[:1], action.write, in_place=True)]


@pytest.mark.parametrize("scheme", [TENSOR, SEQUENCE, HYBRID])
def test_a_plan_that_leaves_out_a_sum_is_refused(scheme: str) -> None:
    """Every sum of gradients of one layer and of the update, one after the other."""
    plan, costs = planned(batches("bert-tiny"), scheme, 2, embeddings="everywhere")
    (phase, *_) = plan.phases
    sums = {
        action.value.name if isinstance(action, Collective) else str(action.write)
        for action in phase.actions["device0"]
        if (isinstance(action, Collective) and action.kind != "all-gather" and action.value.name.startswith("grad"))
        or (isinstance(action, Combine) and action.op == "sum" and len(action.reads) > 1)
    }
    assert len(sums) >= 8
    for name in sorted(sums):
        actions = {
            device: tuple(
                step
                for action in mine
                for step in (
                    unsummed(action)
                    if (isinstance(action, Collective) and action.kind != "all-gather" and action.value.name == name)
                    or (isinstance(action, Combine) and len(action.reads) > 1 and str(action.write) == name)
                    else [action]
                )
            )
            for device, mine in phase.actions.items()
        }
        with pytest.raises(InvalidPlan, match=r"the gradient .* has"):
            validate(replace(plan, phases=(replace(phase, actions=actions),)), costs)


@pytest.mark.parametrize(
    ("options", "how", "why"),
    [
        ({"technique": "lora"}, {}, "trained whole"),
        ({"clip_norm": 1.0}, {}, "not clipped"),
        ({}, {"overlap": True}, "without overlap"),
    ],
)
def test_what_has_no_way_back_is_refused(options: dict[str, object], how: dict[str, object], why: str) -> None:
    load = replace(batches("bert-tiny"), **options)
    with pytest.raises(Unsupported, match=why):
        planned(load, HYBRID, 2, **how)


def test_parts_of_a_parameter_make_up_the_whole() -> None:
    """Channels of queries, keys and values that are packed in one product, of three devices."""
    whole = torch.arange(5 * 24.0).view(5, 24)
    pieces = [Piece(1, tuple((low + 8 * i, high + 8 * i) for i in range(3))) for low, high in ((0, 3), (3, 4), (4, 8))]
    found = torch.full_like(whole, torch.nan)
    for piece in pieces:
        piece.put(piece.of(whole), found)
    assert torch.equal(found, whole)
