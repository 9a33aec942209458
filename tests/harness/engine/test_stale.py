"""What devices train with stashed weights is what delayed gradients train on one device.

Two oracles. `closed_form` knows of no plan: mini-batch m of a round goes through the whole model at once, every
parameter in the version that lacks the updates of as many mini-batches as there are stages behind the first that holds
it. `harness.reference` follows the versions that the plan names, in the pieces in which the devices have the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from baselines import pipedream_async, standalone
from harness import datasets, models, profile, reference
from harness.datasets import batches
from harness.engine import execute
from harness.engine.checkpoint import epoch_ends
from harness.engine.dropout import KeyedDropout
from harness.optimizers import optimizer_for
from harness.plan import Plan
from harness.plan.serial import from_json, to_json
from harness.plan.validate import validate
from harness.schedules import Stage
from harness.simulator import own_seconds, simulate
from harness.stashing import StashingPipeline, rounds
from harness.workload import Workload
from tests.harness.engine.devices import Trained, run_devices
from tests.harness.engine.test_checkpoint import assert_same, everything
from tests.harness.engine.test_equality import IMAGES, TEXT, layered_stages
from tests.harness.toys import cluster

#: Fourteen mini-batches, the seventh of four rows: rounds of 4 and 3, then of 5 and 2.
LONG = replace(TEXT, num_samples=52, steps=None, epochs=2, dtype="float64")
MOST, FIRST = 5, 4
STRAIGHT = [(2, (1,)), (1, (1,)), (0, (1,))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def by_hand(workload: Workload, groups: list[tuple[int, tuple[float, ...]]]) -> Plan:
    """Stages of (layers, shares of the devices), P - p mini-batches in flight at stage p of P."""
    costs, stages = profile.count(workload), layered_stages(workload, groups)
    pipeline = StashingPipeline(costs, tuple(stages), workload.optimizer)
    warmup = [len(stages) - p for p in range(len(stages))]
    phases = tuple(pipeline.phase(b, warmup, repeat=repeat) for b, repeat in rounds(workload, MOST, FIRST))
    return Plan("by-hand", len(costs.units), pipeline.tensors, phases)


class Chain(nn.Module):
    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.layered = models.build(workload)
        self.root = self.layered.root

    def forward(self, values: dict[str, Tensor], masks: KeyedDropout) -> Tensor:
        return self.layered.run(0, len(self.layered.units), values, masks.enter)["loss"]


def closed_form(
    workload: Workload, stages: Sequence[Stage], plan_rounds: Sequence[tuple[tuple[int, ...], int]]
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and weights with the optimizer's state as `reference.state` has them."""
    chain, dataset, masks = Chain(workload), datasets.load(workload), KeyedDropout(workload.seed)
    layered = chain.layered
    parameters = {name: p for name, p in layered.root.named_parameters() if p.requires_grad}
    names = layered.parameter_names()
    behind: dict[str, int] = {}
    for p, stage in enumerate(stages):
        units = layered.units[slice(*stage.units)]
        for unit in (*layered.locals_of(units), *units):
            for parameter in unit.parameters():
                behind.setdefault(names[id(parameter)], len(stages) - 1 - p)
    optimizer = optimizer_for(workload, list(parameters.values()))
    losses: list[float] = []
    orders = batches(workload)
    for sizes in (sizes for sizes, repeat in plan_rounds for _ in range(repeat)):
        versions: list[dict[str, Tensor]] = []
        for m, rows in enumerate(sizes):
            versions.append({name: p.detach().clone() for name, p in parameters.items()})
            leaves = {n: versions[max(0, m - behind[n])][n].clone().requires_grad_() for n in parameters}
            ids = next(orders)
            assert len(ids) == rows
            with masks.samples(len(losses), ids):
                named = {f"root.{name}": leaf for name, leaf in leaves.items()}
                loss = functional_call(chain, named, (dataset.batch(ids), masks)) / rows
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            losses.append(loss.item())
    return losses, reference.state(layered.root, [optimizer])


def assert_equal(ours: Trained, losses: Sequence[float], wanted: dict[str, Tensor]) -> None:
    assert ours.execution.losses == pytest.approx(losses, abs=1e-9)
    for device, tensors in ours.state.items():
        for adaptive in (False, True):
            assert reference.max_rel_error(tensors, wanted, adaptive) <= 1e-8, device
    assert {name for tensors in ours.state.values() for name in tensors} == wanted.keys()


@pytest.mark.parametrize(
    ("workload", "groups"),
    [
        (LONG, STRAIGHT),
        (replace(LONG, optimizer="adamw", learning_rate=1e-3), [(2, (1, 2)), (0, (1,))]),
        (replace(LONG, model="t5-tiny"), [(2, (1,)), (2, (1,)), (0, (1,))]),
        (replace(IMAGES, num_samples=144, steps=None, epochs=2), STRAIGHT),
        *(
            pytest.param(replace(LONG, **options), groups, marks=pytest.mark.slow)
            for options, groups in (
                ({"model": "bart-tiny", "optimizer": "sgd"}, [(2, (1,)), (1, (1, 1)), (0, (1,))]),
                ({"technique": "lora"}, STRAIGHT),
                ({"model": "t5-tiny", "technique": "parallel-adapters"}, [(2, (1,)), (0, (1,))]),
            )
        ),
    ],
    ids=["bert", "bert-replicated", "t5-tied", "resnet", "bart-tied-replicated", "lora", "parallel-adapters"],
)
def test_stashed_weights_train_what_delayed_gradients_train(
    workload: Workload, groups: list[tuple[int, tuple[float, ...]]], folder: Path
) -> None:
    """Over four rounds, with dropout, momentum, a smaller last mini-batch, and through a file."""
    plan = from_json(to_json(by_hand(workload, groups)))
    costs = profile.count(workload)
    validate(plan, costs)
    ours = run_devices(plan, workload, folder)
    losses, wanted = closed_form(workload, layered_stages(workload, groups), rounds(workload, MOST, FIRST))
    assert_equal(ours, losses, wanted)
    oracle = reference.train(plan, workload, datasets.load(workload))
    assert_equal(ours, oracle.losses, oracle.state())
    for name in wanted:
        first, *others = (tensors[name] for tensors in ours.state.values() if name in tensors)
        assert all(torch.equal(first, other) for other in others), name
    simulated = simulate(plan, costs, cluster(len(plan.devices), memory_bandwidth=1e10))
    assert dict(ours.execution.trace.link_bytes) == dict(simulated.link_bytes)
    if workload.model == "resnet-tiny":  # what it has seen, once each
        for shard in ours.shards.values():
            for name, buffer in shard.layered.root.named_buffers():
                if not buffer.is_meta:
                    torch.testing.assert_close(buffer, dict(oracle.layered.root.named_buffers())[name], msg=name)


def test_staleness_is_no_rounding() -> None:
    """The synchronous run of the same batches ends elsewhere: the oracles do tell them apart."""
    late, _ = closed_form(LONG, layered_stages(LONG, STRAIGHT), rounds(LONG, MOST, FIRST))
    at_once, _ = closed_form(LONG, layered_stages(LONG, [(0, (1,))]), rounds(LONG, MOST, FIRST))
    assert late[0] == pytest.approx(at_once[0], abs=1e-12)
    assert max(abs(a - b) for a, b in zip(late, at_once, strict=True)) > 1e-3


def test_one_stage_is_plain_sgd() -> None:
    """An update per batch: bit for bit what one device alone trains."""
    costs = profile.count(LONG)
    stale = pipedream_async.plan(LONG, costs, cluster(1), {"batches_per_flush": MOST, "planner": False})
    plain = standalone.plan(LONG, costs, cluster(1), {**standalone.OPTIONS, "micro_batch_size": LONG.batch_size})
    found = []
    for plan in (stale, plain):
        layered = models.build(LONG)
        losses = execute(plan, LONG, layered, datasets.load(LONG)).losses
        found.append((losses, dict(layered.root.named_parameters())))
    (losses, weights), (wanted_losses, wanted) = found
    assert len(losses) == 14 and losses == wanted_losses
    assert all(torch.equal(weights[name], parameter) for name, parameter in wanted.items())


@pytest.mark.parametrize(
    ("model", "speed", "groups"),
    [
        ("bert-tiny", 0.1, STRAIGHT),
        pytest.param("bert-tiny", 0.1, [(2, (1, 1)), (0, (1,))], marks=pytest.mark.slow),
        pytest.param("t5-tiny", 0.02, STRAIGHT, marks=pytest.mark.slow),
        pytest.param("t5-tiny", 0.02, [(2, (1, 1)), (0, (1,))], marks=pytest.mark.slow),
    ],
    ids=["bert", "bert-replicated", "t5-tied", "t5-tied-replicated"],
)
def test_tracked_memory_equals_the_ledger(
    model: str, speed: float, groups: list[tuple[int, tuple[float, ...]]], folder: Path
) -> None:
    """Of the first round, which is watched. Weights to the byte: stage p of P has P - p versions of its own.

    Of slow devices that are played, since the most that is held at once depends on when it comes.
    """
    workload = replace(LONG, model=model, dtype="float32", steps=4)
    plan, costs = by_hand(workload, groups), profile.count(workload)
    slow = cluster(len(plan.devices), bandwidth=1e9, memory_bandwidth=1e10, speeds=(speed,) * len(plan.devices))
    seen = run_devices(plan, workload, folder, pace=own_seconds(plan, costs, slow)).execution.trace
    wanted = simulate(plan, costs, slow).phases[0].memory
    phase, stages = plan.phases[0], layered_stages(workload, groups)
    for device in plan.devices:
        for kind in ("weights", "optimizer", "buffers"):
            assert seen.memory_bytes[device][kind] == wanted[device].kinds[kind], (device, kind)
        if len(plan.devices) == len(stages):  # in a ring it is left open whose piece comes first
            assert seen.peak_bytes[device] == pytest.approx(wanted[device].nbytes, rel=0.05)
        if not phase.tied:
            versions = sum(stage.units[0] >= phase.shards[device].units[0] for stage in stages)
            held = sum(plan.bytes(value) for value in phase.live[device] if value.name.startswith("weights"))
            assert seen.memory_bytes[device]["weights"] == versions * held


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    """After an epoch, which ends with a round: counted in mini-batches, of which each has drawn its own dropout."""
    workload = replace(LONG, optimizer="adamw", learning_rate=1e-3)
    plan, state = by_hand(workload, STRAIGHT), tmp_path / "state"
    wanted = run_devices(plan, workload, tmp_path, state=state)
    (done,) = epoch_ends(plan, workload).values()
    assert (done.epochs, done.trained, done.phases) == (1, 7, 2)
    found = run_devices(plan, workload, tmp_path, state=state, done=done)
    assert found.execution.losses == wanted.execution.losses and len(wanted.execution.losses) == 14
    assert_same(everything(found), everything(wanted))
