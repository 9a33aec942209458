"""A run that goes on after any of its epochs ends as one that was never interrupted, bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from baselines import eddl, gpipe, pipedream_1f1b, standalone
from harness import datasets, profile, reference
from harness.engine.checkpoint import Progress, epoch_ends, path_of
from harness.errors import OrreryError
from harness.plan import Plan
from harness.transport import Transport
from harness.workload import Workload
from systems import pac
from tests.harness.engine.devices import Trained, outcomes, run_devices
from tests.harness.toys import cluster

TEXT = Workload(
    "bert-tiny", "synthetic", num_samples=20, batch_size=8, epochs=3, seq_len=16, learning_rate=0.01, dropout=0.1
)
SIDE = replace(TEXT, technique="parallel-adapters", optimizer="adamw")
IMAGES = Workload(
    "resnet-tiny",
    "digits",
    num_samples=40,
    batch_size=16,
    epochs=3,
    seq_len=None,
    image_size=32,
    num_channels=1,
    num_labels=10,
    optimizer="sgd-momentum",
    dtype="float64",
)


def planned(method: ModuleType, workload: Workload, num_devices: int, **options: object) -> Plan:
    devices = cluster(num_devices, memory_bandwidth=1e10)
    rows = 4 if workload.seq_len else 16  # batch norm over two rows is but a sign
    asked = {**method.OPTIONS, "micro_batch_size": rows, **options}
    plan: Plan = method.plan(workload, profile.count(workload), devices, asked)
    return plan


def everything(trained: Trained) -> dict[str, dict[str, Tensor]]:
    """Weights, optimizer state and buffers of each device."""
    buffers = {
        device: {name: b for name, b in shard.layered.root.named_buffers() if not b.is_meta}
        for device, shard in trained.shards.items()
    }
    return {device: {**state, **buffers[device]} for device, state in trained.state.items()}


def assert_same(found: Mapping[str, Mapping[str, Tensor]], wanted: Mapping[str, Mapping[str, Tensor]]) -> None:
    for device, tensors in found.items():
        assert tensors
        for name, tensor in tensors.items():
            assert torch.equal(tensor, wanted[device][name]), f"{device}: {name}"


@pytest.mark.parametrize(
    ("method", "num_devices", "workload"),
    [
        (gpipe, 2, replace(TEXT, optimizer="adamw")),
        (eddl, 2, IMAGES),
        (gpipe, 2, IMAGES),
        (pipedream_1f1b, 3, replace(TEXT, model="t5-tiny", optimizer="sgd-momentum", clip_norm=1.0)),
        (standalone, 1, replace(TEXT, model="bart-tiny", optimizer="adamw", technique="lora")),
        (eddl, 3, replace(TEXT, model="gpt2-tiny", technique="adapters")),
        *((standalone, 1, replace(TEXT, model=m, optimizer="adamw")) for m in ("distilbert-tiny", "opt-tiny")),
    ],
)
def test_every_method_goes_on_after_every_epoch(
    method: ModuleType, num_devices: int, workload: Workload, tmp_path: Path
) -> None:
    plan, state = planned(method, workload, num_devices), tmp_path / "state"
    wanted = run_devices(plan, workload, tmp_path, state=state)
    oracle = reference.train(plan, workload, datasets.load(workload))
    assert wanted.execution.losses == pytest.approx(oracle.losses, rel=1e-4)
    ends = epoch_ends(plan, workload)
    assert [done.epochs for done in ends.values()] == [1, 2]
    for done in ends.values():
        found = run_devices(plan, workload, tmp_path, state=state, done=done)
        assert found.execution.losses == wanted.execution.losses
        assert_same(everything(found), everything(wanted))
        assert len(found.execution.trace.phases) == len(plan.phases) - done.phases


class Died(Exception):
    """The process of a device has ended."""


@pytest.mark.parametrize("grouping", ["1-1", "2"])
def test_a_cached_run_goes_on_wherever_it_was_killed(grouping: str, tmp_path: Path) -> None:
    """In the first epoch, while weights and cache are handed out, in cached epochs; with the cache that was left."""
    plan = planned(pac, SIDE, 2, grouping=grouping)
    wanted = run_devices(plan, SIDE, tmp_path)
    oracle = reference.train(plan, SIDE, datasets.load(SIDE))
    assert wanted.execution.losses == pytest.approx(oracle.losses, rel=1e-5)
    state = tmp_path / "state"
    moments, ends = range(1, sum(phase.repeat for phase in plan.phases) + 1, 3), epoch_ends(plan, SIDE)
    resumed = []
    for moment in moments:

        def progress(device: str, number: int, transport: Transport, moment: int = moment) -> None:
            if device == "device1" and number >= moment:
                transport.close()
                raise Died

        plans = dict.fromkeys(plan.devices, plan)
        found = outcomes(plans, SIDE, tmp_path, progress=progress, state=state)
        assert isinstance(found["device1"].error, Died)
        written = [
            p for p in ends.values() if all(path_of(state, p.epochs, device).exists() for device in plan.devices)
        ]
        done = written[-1] if written else Progress()
        resumed.append(done.epochs)
        again = run_devices(plan, SIDE, tmp_path, state=state, done=done)
        assert again.execution.losses == wanted.execution.losses
        assert_same(everything(again), everything(wanted))
        for path in (tmp_path / "state").iterdir():
            path.unlink()
    assert set(resumed) == {0, 1, 2}


def test_what_goes_on_from_the_cache_has_no_backbone(tmp_path: Path) -> None:
    plan, state = planned(pac, SIDE, 2, grouping="1-1"), tmp_path / "state"
    whole = run_devices(plan, SIDE, tmp_path, state=state)
    done = next(done for done in epoch_ends(plan, SIDE).values() if done.epochs == 2)
    found = run_devices(plan, SIDE, tmp_path, state=state, done=done)
    for device, shard in found.shards.items():
        frozen = [p for p in shard.layered.root.parameters() if not p.requires_grad]
        assert frozen and all(p.is_meta for p in frozen)
        (memory,) = found.reports[device].memory
        first, cached = whole.reports[device].memory
        assert memory.standing == {**cached.standing, "buffers": 0}, "nor the constants of a backbone"
        assert memory.standing["weights"] < 0.3 * first.standing["weights"]


def test_all_epochs_from_a_kept_cache(tmp_path: Path) -> None:
    """What a run has stored serves another one, with another side network's optimizer, from its first epoch on."""
    first = planned(pac, SIDE, 2, grouping="1-1")
    run_devices(first, SIDE, tmp_path, state=tmp_path / "state")
    other = replace(SIDE, optimizer="sgd-momentum", learning_rate=0.05)
    plan = planned(pac, other, 2, kept_cache=True, micro_batch_size=first.summary["cached_micro_batch_size"])
    assert {phase.name for phase in plan.phases} == {"cached epoch"}
    found = run_devices(plan, other, tmp_path, state=tmp_path / "other")
    wanted = reference.train(plan, other, datasets.load(other))
    assert found.execution.losses == pytest.approx(wanted.losses, rel=1e-5)
    for state in found.state.values():
        assert state and reference.max_rel_error(state, wanted.state(), adaptive=False) < 1e-5
    assert all(p.is_meta for s in found.shards.values() for p in s.layered.root.parameters() if not p.requires_grad)


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_state_is_not_used(damage: str, tmp_path: Path) -> None:
    from harness.engine import checkpoint

    plan, state = planned(standalone, TEXT, 1), tmp_path / "state"
    shard = run_devices(plan, TEXT, tmp_path, state=state).shards["device0"]
    path = path_of(state, 1, "device0")
    content, digest = bytearray(path.read_bytes()), checkpoint.file_digest(path)
    content[-5] ^= 1
    path.unlink() if damage == "gone" else path.write_bytes(content if damage == "changed" else content[:-9])
    with pytest.raises(OrreryError, match=r"The state of a killed run in .* can't be used: .* Remove the folder"):
        checkpoint.restore(path, digest, shard, plan.phases[0].live["device0"], 3)


def test_epochs_end_with_phases() -> None:
    """Of a run in steps the last one does not; and a phase of several epochs counts as a whole."""
    steps = replace(TEXT, epochs=1, steps=7)
    assert epoch_ends(planned(standalone, steps, 1), steps) == {1: Progress(1, 2, 3), 3: Progress(2, 4, 6)}
    plan = planned(pac, SIDE, 2, grouping="1-1")
    (place, one), (_, two) = epoch_ends(plan, SIDE).items()
    assert (one, two) == (Progress(1, 2, 3), Progress(2, 7, 6, 3)) and plan.phases[place].name == "train last batch"
    left = replace(plan, phases=plan.phases[one.phases :])
    assert list(epoch_ends(left, SIDE, one).values()) == [two]
