"""A device's share of a model from a file: its bytes and no others, and exactly the numbers of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from harness import models
from harness.errors import OrreryError
from harness.models import shards
from harness.models.layered import Layered
from harness.profile.counting import count_units
from harness.workload import Workload
from tests.harness.models.text_oracle import layer_ranges
from tests.harness.profile.tiny import IMAGE, TEXT, batch, workload

ROWS = 3
FAMILIES = (*TEXT, *IMAGE)


def written(load: Workload, folder: Path) -> Path:
    shards.write(load, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def state(root: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are there."""
    named = {**dict(root.named_parameters()), **dict(root.named_buffers())}
    return {name: tensor for name, tensor in named.items() if not tensor.is_meta}


def entering(layered: Layered, first: int, last: int, alive: dict[str, Tensor], load: Workload) -> dict[str, Tensor]:
    """What a device of units [first, last) gets: the batch's inputs, and what an earlier unit wrote for later ones."""
    carried = {name for unit in layered.units[:first] for name in unit.writes}
    carried &= {name for unit in layered.units[first:] for name in unit.reads}
    return {name: alive[name] for name in (*layered.inputs, *carried, *(["labels"] if load.training else []))}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_range_has_its_bytes_and_no_others(name: str, tmp_path: Path) -> None:
    load = workload(name)
    path, whole = written(load, tmp_path), models.build(load)
    costs = count_units(models.build(load, "meta"), load)
    expected = state(whole.root)
    ranges = layer_ranges(whole)
    for first, last in [*ranges[::4], (0, ranges[-1][1]), (1, 4), (ranges[1][0], ranges[-1][0])]:
        layered = shards.load(load, path, first, last)
        held = state(layered.root)
        nbytes = costs.weight_bytes(first, last)[0] + costs.buffers_bytes(first, last)
        assert sum(tensor.nbytes for tensor in held.values()) == nbytes
        assert sum(tensor.untyped_storage().nbytes() for tensor in held.values()) == nbytes
        assert all(torch.equal(tensor, expected[name]) for name, tensor in held.items())


@pytest.mark.parametrize(
    ("name", "technique"), [*((name, "full") for name in FAMILIES), ("bart-tiny", "inference"), (IMAGE[0], "inference")]
)
def test_unit_by_unit_equals_the_whole(name: str, technique: str, tmp_path: Path) -> None:
    """Every unit on a device of its own, so a cut at every place. The file may go once it is loaded."""
    load = workload(name, dropout=0.0, technique=technique)
    path, whole, alive = written(load, tmp_path), models.build(load), batch(load, ROWS)
    expected = whole.run(0, len(whole.units), alive)
    devices = [shards.load(load, path, index, index + 1) for index in range(len(whole.units))]
    path.unlink()
    for index, layered in enumerate(devices):
        alive = alive | layered.run(index, index + 1, entering(layered, index, index + 1, alive, load))
    for result in ("logits", "loss") if load.training else ("logits",):
        assert torch.equal(alive[result], expected[result])
    after = dict(whole.root.named_buffers())
    for layered in devices:
        assert all(torch.equal(b, after[name]) for name, b in layered.root.named_buffers() if not b.is_meta)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_devices_have_the_gradients_of_the_whole(name: str, tmp_path: Path) -> None:
    load = workload(name, dropout=0.0)
    path, whole, values = written(load, tmp_path), models.build(load), batch(load, ROWS)
    end = len(whole.units)
    whole.run(0, end, values)["loss"].backward()
    expected = {name: p.grad for name, p in whole.root.named_parameters()}
    first, second = shards.load(load, path, 0, end // 2), shards.load(load, path, end // 2, end)
    made = first.run(0, end // 2, entering(first, 0, end // 2, values, load))
    given = entering(second, end // 2, end, values | made, load)
    leaves = {name: given[name].detach().requires_grad_() for name in given if given[name].requires_grad}
    second.run(end // 2, end, given | leaves)["loss"].backward()
    torch.autograd.backward([given[name] for name in leaves], [leaf.grad for leaf in leaves.values()])
    for parameter, gradient in expected.items():
        parts = [dict(device.root.named_parameters())[parameter].grad for device in (first, second)]
        total = torch.stack([part for part in parts if part is not None]).sum(0)
        torch.testing.assert_close(total, gradient, rtol=1e-4, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("technique", ["full", "inference"])
def test_mode_and_frozen_weights_are_those_of_the_build(technique: str, tmp_path: Path) -> None:
    load = workload("t5-tiny", technique=technique)
    layered, built = shards.load(load, written(load, tmp_path), 0, 20), models.build(load)
    assert [m.training for m in layered.root.modules()] == [m.training for m in built.root.modules()]
    ours, theirs = dict(layered.root.named_parameters()), dict(built.root.named_parameters())
    assert {n: p.requires_grad for n, p in ours.items()} == {n: p.requires_grad for n, p in theirs.items()}
    assert all(isinstance(parameter, nn.Parameter) and parameter.is_leaf for parameter in ours.values())


@pytest.mark.parametrize("name", ["t5-tiny", "bart-tiny"])
def test_tied_tensors_are_one_on_a_device_and_once_in_the_file(name: str, tmp_path: Path) -> None:
    load = workload(name)
    path = written(load, tmp_path)
    layered = shards.load(load, path, 0, len(models.build(load, "meta").units))
    embeddings = [unit for unit in layered.units if unit.kind == "embedding"]
    shared = layered.root.backbone.shared.weight
    assert len(embeddings) == 2 and all(any(p is shared for p in unit.parameters()) for unit in embeddings)
    assert layered.root.backbone.encoder.embed_tokens.weight is shared
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(state(layered.root))


def test_a_checkpoint_and_its_type(tmp_path: Path) -> None:
    shape = {"vocab_size": 300, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    BertModel(BertConfig(**shape, intermediate_size=48)).save_pretrained(tmp_path / "checkpoint")
    load = workload("bert-base", checkpoint=str(tmp_path / "checkpoint"), dtype="bfloat16", dropout=0.0)
    whole = models.build(load)
    ids = torch.arange(10, 34).reshape(2, 12)
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    values["labels"] = torch.tensor([0, 1])
    layered = shards.load(load, written(load, tmp_path), 0, len(whole.units))
    assert {p.dtype for p in layered.root.parameters()} == {torch.bfloat16}
    loss = layered.run(0, len(whole.units), values)["loss"]
    assert torch.equal(loss, whole.run(0, len(whole.units), values)["loss"])


def test_files_that_do_not_hold_the_model_are_named(tmp_path: Path) -> None:
    load = workload("bert-tiny")
    whole = written(load, tmp_path)
    (tmp_path / "torn").write_bytes(whole.read_bytes()[:5000])
    shards.write(workload("gpt2-tiny"), tmp_path / "other")
    shards.write(workload("bert-tiny", num_labels=5), tmp_path / "labels")
    shards.write(workload("bert-tiny", dtype="float16"), tmp_path / "half")
    reasons = {
        "torn": "",
        "absent": "No such file",
        "other": "bert.embeddings",
        "labels": r"\[5, 64\] torch.float32 where the model has \[2, 64\]",
        "half": "torch.float16 where the model has .* torch.float32",
    }
    for name, reason in reasons.items():
        with pytest.raises(OrreryError, match=f"bert-tiny can't be read from .*{name}: .*{reason}.* Write them again"):
            shards.load(load, tmp_path / name, 0, 31)
