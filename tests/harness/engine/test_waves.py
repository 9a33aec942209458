"""What virtual workers train is what gradients at the weights that are due train on one device.

The oracle knows of no plan: plain SGD is linear, so the weights of a mini-batch are those at the beginning of its
round, less the learning rate times the sum of the gradients whose updates are due (`updates_before`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from baselines import hetpipe, standalone
from harness import datasets, models, profile, reference
from harness.datasets import batches
from harness.engine import execute
from harness.engine.checkpoint import epoch_ends
from harness.engine.dropout import KeyedDropout
from harness.plan import Plan
from harness.plan.serial import from_json, to_json
from harness.plan.validate import validate
from harness.schedules import Stage
from harness.simulator import own_seconds, simulate
from harness.stashing import rounds
from harness.waves import Waves
from harness.workload import Workload
from tests.harness.engine.devices import run_devices
from tests.harness.engine.test_checkpoint import assert_same, everything
from tests.harness.engine.test_equality import IMAGES, TEXT, layered_stages
from tests.harness.engine.test_stale import Chain
from tests.harness.test_waves import updates_before
from tests.harness.toys import cluster

#: Ten mini-batches an epoch, the last of four rows: in a round of its own, in which one worker alone computes.
TEXTS = replace(TEXT, num_samples=76, steps=None, epochs=2, seq_len=8, dtype="float64", optimizer="sgd")
MOST, FIRST = 9, 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def by_hand(workload: Workload, workers: list[list[int]], wave: int, distance: int) -> Plan:
    """Each worker's stages by their numbers of layers, 0 for the rest; one device each."""
    costs, count, stages = profile.count(workload), 0, []
    for layers in workers:
        cut = layered_stages(workload, [(number, (1,)) for number in layers])
        stages.append(tuple(Stage(s.units, (f"device{count + i}",), (1,)) for i, s in enumerate(cut)))
        count += len(cut)
    waves = Waves(costs, tuple(stages), wave, distance)
    phases = tuple(waves.phase(b, repeat=repeat) for b, repeat in rounds(workload, MOST, FIRST))
    return Plan("by-hand", len(costs.units), waves.tensors, phases)


def closed_form(workload: Workload, workers: int, wave: int, distance: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights."""
    chain, dataset, masks = Chain(workload), datasets.load(workload), KeyedDropout(workload.seed)
    weights = {n: p.detach().clone() for n, p in chain.root.named_parameters() if p.requires_grad}
    losses: list[float] = []
    orders = batches(workload)
    for sizes in (sizes for sizes, repeat in rounds(workload, MOST, FIRST) for _ in range(repeat)):
        updates: list[dict[str, Tensor]] = []
        for m, rows in enumerate(sizes):
            due = updates_before(m, len(sizes), workers, wave, distance)
            leaves = {
                name: (start + sum(updates[j][name] for j in sorted(due))).requires_grad_()
                for name, start in weights.items()
            }
            ids = next(orders)
            with masks.samples(len(losses), ids):
                named = {f"root.{name}": leaf for name, leaf in leaves.items()}
                loss = functional_call(chain, named, (dataset.batch(ids), masks)) / rows
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            updates.append(
                {
                    name: -workload.learning_rate * (torch.zeros_like(leaf) if g is None else g)
                    for (name, leaf), g in zip(leaves.items(), gradients, strict=True)
                }
            )
            losses.append(loss.item())
        weights = {name: start + sum(update[name] for update in updates) for name, start in weights.items()}
    return losses, weights


@pytest.mark.parametrize(
    ("workload", "workers", "wave", "distance"),
    [
        (TEXTS, [[2, 0], [3, 0]], 2, 0),
        (replace(TEXTS, model="t5-tiny"), [[2, 2, 0], [0]], 2, 1),
        (replace(IMAGES, num_samples=304, steps=None, epochs=1, optimizer="sgd"), [[2, 0], [3, 0]], 1, 0),
        pytest.param(TEXTS, [[0], [2, 0], [3, 0]], 2, 2, marks=pytest.mark.slow),
        pytest.param(replace(TEXTS, model="bart-tiny"), [[2, 0], [2, 1, 0]], 3, 0, marks=pytest.mark.slow),
        pytest.param(replace(TEXTS, technique="lora"), [[2, 0], [0]], 2, 1, marks=pytest.mark.slow),
    ],
    ids=["bert", "t5-tied-distance-1", "resnet", "bert-three-distance-2", "bart-tied", "lora-distance-1"],
)
def test_virtual_workers_train_what_late_gradients_train(
    workload: Workload, workers: list[list[int]], wave: int, distance: int, folder: Path
) -> None:
    """Workers with other cuts, short waves at the end, dropout, through a file. All copies are equal bit by bit."""
    plan = from_json(to_json(by_hand(workload, workers, wave, distance)))
    costs = profile.count(workload)
    validate(plan, costs)
    ours = run_devices(plan, workload, folder)
    losses, wanted = closed_form(workload, len(workers), wave, distance)
    oracle = reference.train(plan, workload, datasets.load(workload))
    assert ours.execution.losses == pytest.approx(losses, abs=1e-9)
    assert ours.execution.losses == pytest.approx(oracle.losses, abs=1e-9)
    for device, tensors in ours.state.items():
        trained = {name: tensor for name, tensor in tensors.items() if name in wanted}
        assert reference.max_rel_error(trained, wanted, adaptive=False) <= 1e-8, device
        assert reference.max_rel_error(tensors, oracle.state(), adaptive=False) <= 1e-8, device
    for name in wanted:
        first, *others = (tensors[name] for tensors in ours.state.values() if name in tensors)
        assert all(torch.equal(first, other) for other in others), name
    simulated = simulate(plan, costs, cluster(len(plan.devices), memory_bandwidth=1e10))
    assert dict(ours.execution.trace.link_bytes) == dict(simulated.link_bytes)


def test_one_device_of_a_wave_of_one_is_plain_sgd() -> None:
    """Updated by the server after every batch: what one device alone trains."""
    costs = profile.count(TEXTS)
    served = hetpipe.plan(TEXTS, costs, cluster(1), {**hetpipe.OPTIONS, "batches_per_flush": MOST})
    plain = standalone.plan(TEXTS, costs, cluster(1), {**standalone.OPTIONS, "micro_batch_size": TEXTS.batch_size})
    assert served.summary["wave"] == 1
    found = []
    for plan in (served, plain):
        layered = models.build(TEXTS)
        losses = execute(plan, TEXTS, layered, datasets.load(TEXTS)).losses
        found.append((losses, dict(layered.root.named_parameters())))
    (losses, weights), (wanted_losses, wanted) = found
    assert len(losses) == 20 and losses == wanted_losses
    assert all(torch.equal(weights[name], parameter) for name, parameter in wanted.items())


def test_tracked_memory_equals_the_ledger(folder: Path) -> None:
    """Of the first round: weights, one's own versions and the server's, and gradients, sums and pushes, to the byte.

    Of slow devices that are played, since the most that is held at once depends on when it comes.
    """
    workload = replace(TEXTS, steps=9)
    plan, costs = by_hand(workload, [[2, 0], [3, 0]], 2, 0), profile.count(workload)
    slow = cluster(len(plan.devices), bandwidth=1e9, memory_bandwidth=1e10, speeds=(0.1,) * len(plan.devices))
    seen = run_devices(plan, workload, folder, pace=own_seconds(plan, costs, slow)).execution.trace
    wanted = simulate(plan, costs, slow).phases[0].memory
    for device in plan.devices:
        for kind in ("weights", "gradients", "buffers"):
            assert seen.memory_bytes[device][kind] == wanted[device].kinds[kind], (device, kind)
        assert seen.peak_bytes[device] == pytest.approx(wanted[device].nbytes, rel=0.05)


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    """The server's weights begin as everybody's: a round ends with all the same."""
    plan, state = by_hand(TEXTS, [[2, 0], [3, 0]], 2, 1), tmp_path / "state"
    wanted = run_devices(plan, TEXTS, tmp_path, state=state)
    (done,) = epoch_ends(plan, TEXTS).values()
    assert (done.epochs, done.trained) == (1, 10)
    found = run_devices(plan, TEXTS, tmp_path, state=state, done=done)
    assert found.execution.losses == wanted.execution.losses
    assert_same(everything(found), everything(wanted))
