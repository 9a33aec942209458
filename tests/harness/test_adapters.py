"""Adapters as files: attached to transformers' own model, it computes what the trained chain of units computes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from harness import adapters, models
from harness.errors import OrreryError
from harness.models.layered import Layered
from harness.workload import Workload
from tests.harness.models import text_oracle as oracle

ADDING = {
    "lora": {"rank": 4, "alpha": 6},
    "adapters": {"reduction": 8},
    "parallel-adapters": {"gate": True, "dropped": "1", "init": "pruning", "reduction": 4},
}


def trained(model: str, technique: str, **more: object) -> tuple[Workload, Layered]:
    load = oracle.workload(model, technique=technique, technique_options=ADDING[technique], **more)
    layered = oracle.build(load)
    layered.root.eval()
    return load, layered


def saved(load: Workload, layered: Layered, folder: Path) -> Path:
    path = folder / "adapter.safetensors"
    adapters.save(path, load, {n: p for n, p in layered.root.named_parameters() if p.requires_grad}, "0123456789abcdef")
    return path


def plain(load: Workload, layered: Layered) -> nn.Module:
    """The user's model: the frozen weights without anything that was added or trained; a bare one for T5 and BART."""
    root = models.build(oracle.workload(load.model, num_labels=load.num_labels, seed=7)).root
    frozen = {n.replace(".base_layer", ""): p for n, p in layered.root.named_parameters() if not p.requires_grad}
    missing = root.load_state_dict(frozen, strict=False)
    assert not missing.unexpected_keys
    return getattr(root, "backbone", root).eval()


def inputs(load: Workload) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in oracle.batch(load).items() if name != "labels"}


@pytest.mark.parametrize("technique", ADDING)
@pytest.mark.parametrize("model", oracle.TINY)
def test_an_attached_model_has_the_logits_of_the_trained_one(model: str, technique: str, tmp_path: Path) -> None:
    """By the model's own forward pass, but for parallel adapters, which it has no place for."""
    load, layered = trained(model, technique, num_labels=3)
    theirs = plain(load, layered)
    tuned = adapters.attach(theirs, saved(load, layered, tmp_path))
    values = oracle.batch(load)
    with torch.no_grad():
        wanted = layered.run(0, len(layered.units), values)["logits"]
        made = tuned(**inputs(load)).logits
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-6)
    assert wanted.std() > 1e-2 and not tuned.training
    if technique != "parallel-adapters" and not hasattr(tuned, "backbone"):
        assert tuned is theirs


@pytest.mark.parametrize("technique", ADDING)
def test_any_length_of_decoder_and_half_precision(technique: str, tmp_path: Path) -> None:
    load, layered = trained("t5-tiny", technique, decoder_seq_len=4)
    theirs = plain(load, layered)
    path = saved(load, layered, tmp_path)
    half = adapters.attach(copy.deepcopy(theirs).bfloat16(), path)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        wanted = layered.run(0, len(layered.units), oracle.batch(load))["logits"]
        made = adapters.attach(theirs, path)(**inputs(load)).logits
        torch.testing.assert_close(made, wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(half(**inputs(load)).logits.float(), wanted, rtol=0.1, atol=0.3)


def test_one_layer_by_hand(tmp_path: Path) -> None:
    """What the patched modules of BERT's first layer answer, written out."""
    x = torch.randn(2, 3, 64)
    load, layered = trained("bert-tiny", "lora")
    theirs, path = plain(load, layered), saved(load, layered, tmp_path)
    stored = load_file(path)
    name = "bert.encoder.layer.0.attention.self.query"
    before = theirs.get_submodule(name)(x)
    a, b = (stored[f"{name}.lora_{part}.default.weight"] for part in "AB")
    after = adapters.attach(theirs, path).get_submodule(name)(x)
    torch.testing.assert_close(after, before + 6 / 4 * (x @ a.T @ b.T), rtol=0, atol=1e-5)

    load, layered = trained("bert-tiny", "adapters")
    theirs, path = plain(load, layered), saved(load, layered, tmp_path)
    stored = {n.removeprefix("adapters.layer-0-attention."): tensor for n, tensor in load_file(path).items()}
    name = "bert.encoder.layer.0.attention.output.dense"
    before = theirs.get_submodule(name)(x)
    inner = functional.gelu(before @ stored["down.weight"].T + stored["down.bias"], approximate="tanh")
    after = adapters.attach(theirs, path).get_submodule(name)(x)
    torch.testing.assert_close(after, before + inner @ stored["up.weight"].T + stored["up.bias"], rtol=0, atol=1e-5)


def test_the_file_says_what_it_is_and_holds_what_was_trained(tmp_path: Path) -> None:
    load, layered = trained("bert-tiny", "lora", num_labels=3)
    about, tensors = adapters.read(saved(load, layered, tmp_path))
    assert json.loads(about["technique_options"]) == {"rank": 4, "alpha": 6, "dropout": None}
    assert {k: about[k] for k in ("technique", "model", "num_labels", "checkpoint", "version")} == {
        "technique": "lora",
        "model": "bert-tiny",
        "num_labels": "3",
        "checkpoint": "",
        "version": "1",
    }
    heads = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert {name for name in tensors if "lora_" not in name} == heads


def bert(**changed: int) -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**{**models.entry("bert-tiny").config, **changed}))


@pytest.mark.parametrize("technique", ADDING)
def test_a_model_that_the_file_is_not_for_is_refused_and_stays_as_it_was(technique: str, tmp_path: Path) -> None:
    load, layered = trained("bert-tiny", technique)
    path = saved(load, layered, tmp_path)
    (roberta,) = [models.build(oracle.workload("distilbert-tiny")).root]
    wrong = {
        "which is a BertForSequenceClassification; this is a DistilBert": roberta,
        "this model has ": bert(hidden_size=32),
        "this model has  ": bert(num_hidden_layers=3),
        "at classifier.bias this model has \\[5\\], and the file \\[2\\]": bert(num_labels=5),
    }
    for message, model in wrong.items():
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(OrreryError, match=message.strip()):
            adapters.attach(model, path)
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model = bert()
    adapters.attach(model, path)
    with pytest.raises(OrreryError, match="has an adapter already"):
        adapters.attach(model, path)


def test_files_that_are_no_adapter_are_named(tmp_path: Path) -> None:
    load, layered = trained("bert-tiny", "lora")
    path = saved(load, layered, tmp_path)
    content = path.read_bytes()
    for damaged in (b"", content[:100], content[:-10], b"\0" * 64):
        path.write_bytes(damaged)
        with pytest.raises(OrreryError, match="damaged or no safetensors file"):
            adapters.attach(bert(), path)
    with pytest.raises(OrreryError, match="can't be read"):
        adapters.attach(bert(), tmp_path / "none")
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(OrreryError, match="no adapter of Orrery"):
        adapters.attach(bert(), path)
    save_file({"x": torch.zeros(1)}, path, metadata={"format": adapters.FORMAT, "version": "9"})
    with pytest.raises(OrreryError, match="of version 9"):
        adapters.attach(bert(), path)
    tensors = {name: p.detach().clone() for name, p in layered.root.named_parameters() if p.requires_grad}
    del tensors["classifier.bias"]
    adapters.save(path, load, tensors, "")
    with pytest.raises(OrreryError, match=r"at classifier.bias this model has \[2\], and the file nothing"):
        adapters.attach(bert(), path)
