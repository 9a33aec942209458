"""The engine on one device against a plain transformers training loop, tensor by tensor."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from baselines import eddl, gpipe, standalone
from harness import datasets, engine, models, profile, reference
from harness.datasets import batches
from harness.simulator import simulate
from harness.workload import Workload
from tests.harness.engine.devices import run_devices
from tests.harness.engine.test_dropout import Recorded, Replayed
from tests.harness.toys import cluster

GLUE = Path(__file__).parents[3] / "shared" / "data" / "glue"
needs_glue = pytest.mark.skipif(not GLUE.is_dir(), reason="no GLUE folder beside the repository")

TEXT = Workload(
    "bert-tiny",
    "mrpc",
    num_samples=84,
    batch_size=16,
    seq_len=48,
    dropout=0.0,
    learning_rate=0.05,
    optimizer="sgd-momentum",
)
IMAGES = Workload(
    "resnet-tiny",
    "digits",
    num_samples=80,
    batch_size=16,
    seq_len=None,
    image_size=16,
    num_channels=1,
    num_labels=10,
    learning_rate=0.05,
    optimizer="sgd-momentum",
)


def plan_for(workload: Workload, micro_batch_size: int | None = None):
    options = {**standalone.OPTIONS, "micro_batch_size": micro_batch_size or workload.batch_size}
    return standalone.plan(workload, profile.count(workload), cluster(1, memory_bandwidth=1e10), options)


def run(workload: Workload, micro_batch_size: int | None = None):
    layered = models.build(workload)
    dataset = datasets.load(workload, GLUE if workload.dataset == "mrpc" else None)
    return layered, engine.execute(plan_for(workload, micro_batch_size), workload, layered, dataset)


def plain_loop(workload: Workload, steps: int) -> tuple[nn.Module, list[float]]:
    """Nothing of ours but data and dropout masks: Hugging Face's own forward and loss, and torch's optimizer."""
    model = models.build(workload).root.train()
    dataset = datasets.load(workload, GLUE if workload.dataset == "mrpc" else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.learning_rate, momentum=0.9)
    if workload.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=workload.learning_rate)
    masks = keys_of(workload)
    losses: list[float] = []
    for ids in islice(batches(workload), steps):
        replay = Replayed(workload.seed, masks)
        with replay.samples(len(losses), ids):
            loss = model(**dataset.batch(ids)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def keys_of(workload: Workload) -> list[tuple[str | None, int]]:
    """The keys of our masks, in the order in which the model draws them."""
    layered = models.build(workload)
    dataset = datasets.load(workload, GLUE if workload.dataset == "mrpc" else None)
    record = Recorded(workload.seed)
    with record.samples(0, range(2)):
        layered.run(0, len(layered.units), dataset.batch(range(2)), entering=record.enter)
    return record.keys


def assert_equal_weights(trained: nn.Module, oracle: nn.Module) -> None:
    """max|a-b| <= 1e-5 max|b| per tensor; 1e-6 where the gradient is zero in exact arithmetic (a key's bias)."""
    ours = dict(trained.named_parameters())
    for name, theirs in oracle.named_parameters():
        limit = 1e-6 if name.endswith("key.bias") else max(1e-5 * theirs.abs().max().item(), 1e-12)
        assert (ours[name] - theirs).abs().max().item() <= limit, name


@needs_glue
def test_tiny_bert_on_real_text_equals_the_plain_loop():
    """84 samples: five full batches and a last one of four, twice."""
    workload = dataclasses.replace(TEXT, epochs=2)
    layered, execution = run(workload)
    oracle, losses = plain_loop(workload, 12)
    assert execution.losses == pytest.approx(losses, abs=1e-5)
    assert_equal_weights(layered.root, oracle)


@needs_glue
def test_accumulated_micro_batches_equal_the_whole_batch():
    layered, execution = run(TEXT, micro_batch_size=5)
    oracle, losses = plain_loop(TEXT, 6)
    assert execution.losses == pytest.approx(losses, abs=1e-5)
    assert_equal_weights(layered.root, oracle)


@needs_glue
def test_dropout_equals_the_plain_loop_with_the_same_masks():
    workload = dataclasses.replace(TEXT, dropout=0.1)
    layered, execution = run(workload)
    oracle, losses = plain_loop(workload, 6)
    assert execution.losses == pytest.approx(losses, abs=1e-5)
    assert_equal_weights(layered.root, oracle)
    without, _ = plain_loop(TEXT, 6)
    with pytest.raises(AssertionError):
        assert_equal_weights(layered.root, without)


def test_tiny_resnet_on_real_images_equals_the_plain_loop():
    layered, execution = run(IMAGES)
    oracle, losses = plain_loop(IMAGES, 5)
    assert execution.losses == pytest.approx(losses, abs=1e-5)
    assert_equal_weights(layered.root, oracle)
    for ours, theirs in zip(layered.root.buffers(), oracle.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5)


def test_adamw_equals_the_plain_loop():
    workload = dataclasses.replace(IMAGES, optimizer="adamw", learning_rate=1e-3)
    layered, execution = run(workload)
    oracle, losses = plain_loop(workload, 5)
    assert execution.losses == pytest.approx(losses, abs=1e-5)
    assert_equal_weights(layered.root, oracle)


def test_the_loss_falls_on_digits():
    _, execution = run(dataclasses.replace(IMAGES, num_samples=512, epochs=3))
    first, last = execution.losses[:10], execution.losses[-10:]
    assert sum(last) / 10 < 0.5 * sum(first) / 10


@needs_glue
def test_the_loss_falls_on_real_text():
    """64 sentence pairs learned by heart."""
    _, execution = run(dataclasses.replace(TEXT, num_samples=64, epochs=30, optimizer="adamw", learning_rate=1e-3))
    assert sum(execution.losses[-4:]) / 4 < 0.5 * sum(execution.losses[:4]) / 4


@pytest.mark.parametrize("micro_batch_size", [16, 4])
@pytest.mark.parametrize("workload", [pytest.param(TEXT, marks=needs_glue), IMAGES], ids=["bert-tiny", "resnet-tiny"])
def test_tracked_peak_memory_equals_the_ledger(workload, micro_batch_size):
    _, execution = run(workload, micro_batch_size)
    plan = plan_for(workload, micro_batch_size)
    simulated = simulate(plan, profile.count(workload), cluster(1, memory_bandwidth=1e10))
    assert execution.trace.peak_bytes["device0"] == pytest.approx(simulated.peak_bytes["device0"], rel=0.05)
    for kind in ("weights", "gradients", "optimizer", "buffers"):
        assert execution.trace.memory_bytes["device0"][kind] == simulated.memory_bytes["device0"][kind], kind


def test_the_rehearsal_leaves_no_trace():
    """The first loss is that of the seed's weights, and batch norm has seen each batch once."""
    layered, _ = run(IMAGES)
    assert batches_seen(layered.root) == {5}


@pytest.mark.parametrize(("method", "seen"), [(eddl, 5), (gpipe, 10)])
def test_the_rehearsal_of_several_devices_leaves_no_trace(method, seen, tmp_path):
    """Nor an optimizer's state: with momentum a first update of its own would show in all that follow."""
    workload = dataclasses.replace(IMAGES, image_size=32, dtype="float64")
    options = {**method.OPTIONS, "micro_batch_size": 16 if method is eddl else 8}
    plan = method.plan(workload, profile.count(workload), cluster(2, memory_bandwidth=1e10), options)
    trained = run_devices(plan, workload, tmp_path)
    assert {count for shard in trained.shards.values() for count in batches_seen(shard.layered.root)} == {seen}
    oracle = reference.train(plan, workload, datasets.load(workload))
    assert trained.execution.losses == pytest.approx(oracle.losses, abs=1e-8)
    for device, report in trained.reports.items():
        sent = sum(nbytes for (source, _), nbytes in trained.execution.trace.link_bytes.items() if source == device)
        assert sum(phase.sent_bytes for phase in report.phases) == sent
        assert all(event.start_s >= 0 for event in report.events)


def batches_seen(root: nn.Module) -> set[int]:
    """By each batch norm that is on this device."""
    names = {name: buffer for name, buffer in root.named_buffers() if name.endswith("num_batches_tracked")}
    return {int(buffer) for buffer in names.values() if not buffer.is_meta}
