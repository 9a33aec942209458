"""The catalog's shapes are the published ones, and building is cheap where nothing is needed."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from harness import models
from harness.errors import OrreryError
from harness.workload import Workload

#: Millions of parameters of the backbone, without the classifier, as published with each model (T5, BART: as PAC's).
PARAMETERS_MILLIONS = {
    "t5-base": 222.9,
    "t5-large": 737.5,
    "bart-large": 406,
    "bert-small": 28.8,
    "bert-base": 110,
    "bert-large": 336,
    "distilbert": 66,
    "gpt2": 124,
    "gpt2-large": 774,
    "opt-1.3b": 1316,
    "opt-2.7b": 2652,
}


def _workload(model: str, **options: object) -> Workload:
    return Workload(model=model, dataset="synthetic", num_samples=8, batch_size=4, **options)


@pytest.mark.parametrize("name", PARAMETERS_MILLIONS)
def test_parameter_counts_are_the_published_ones(name):
    began = time.perf_counter()
    layered = models.build(_workload(name), "meta")
    assert time.perf_counter() - began < 10
    assert all(parameter.is_meta for parameter in layered.root.parameters())
    backbone = layered.root.backbone if hasattr(layered.root, "backbone") else layered.root.base_model
    count = sum(parameter.numel() for parameter in backbone.parameters())
    assert count == pytest.approx(PARAMETERS_MILLIONS[name] * 1e6, rel=0.01)


def test_every_family_has_a_tiny_sibling():
    families = {models.entry(name).family for name in models.names()}
    assert families == {models.entry(name).family for name in models.names() if name.endswith("-tiny")}


def test_listing_models_imports_no_torch():
    code = "import sys, harness.models as m; m.names(); m.entry('t5-base'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ("bert-tny", {}, "no model called 'bert-tny'. Did you mean bert-tiny"),
        ("bert-tiny", {"attn_implementation": "flash"}, "no attention implementation called 'flash'"),
        ("bert-tiny", {"dtype": "float23"}, "no dtype called 'float23'"),
        ("bert-tiny", {"seq_len": 600}, "600 tokens are more than the 512 positions of bert-tiny"),
        ("t5-tiny", {"seq_len": None}, "t5-tiny reads text"),
        ("bart-tiny", {"decoder_seq_len": 513}, "513 tokens are more than the 512 positions of bart-tiny"),
    ],
)
def test_what_can_not_be_built_is_said(model, options, expected):
    with pytest.raises(OrreryError, match=expected):
        models.build(_workload(model, **options), "meta")


def test_the_seed_gives_the_weights_and_leaves_the_callers_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (models.build(_workload("bert-tiny", seed=seed)).root.state_dict() for seed in (1, 1, 2))
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    key = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(first[key], other[key])


def test_inference_starts_frozen_in_eval_mode_and_training_does_not():
    served = models.build(_workload("bert-tiny", technique="inference"), "meta")
    trained = models.build(_workload("bert-tiny"), "meta")
    assert not served.root.training and not any(p.requires_grad for p in served.root.parameters())
    assert trained.root.training and all(p.requires_grad for p in trained.root.parameters())
    assert [unit.kind for unit in trained.units] == [*(unit.kind for unit in served.units), "loss"]


@pytest.mark.parametrize("name", ["bert-tiny", "distilbert-tiny", "gpt2-tiny", "opt-tiny", "t5-tiny", "bart-tiny"])
def test_no_dropout_leaves_no_randomness(name):
    layered = models.build(_workload(name, dropout=0.0, seq_len=8))
    ids = torch.arange(3, 27).reshape(3, 8)
    values = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "decoder_input_ids": torch.zeros(3, 1, dtype=torch.long),
        "labels": torch.tensor([0, 1, 0]),
    }
    first, second = (layered.run(0, len(layered.units), values)["loss"] for _ in range(2))
    assert layered.root.training and first == second


def test_dtype_is_that_of_weights_masks_and_loss():
    layered = models.build(_workload("bert-tiny", dtype="bfloat16", seq_len=8))
    assert {p.dtype for p in layered.root.parameters()} == {torch.bfloat16}
    ids = torch.arange(3, 19).reshape(2, 8)
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids % 2}
    made = layered.run(0, len(layered.units), {**values, "labels": torch.tensor([0, 1])})
    (mask,) = layered.local_units[0](values["attention_mask"])
    assert {mask.dtype, made["loss"].dtype} == {torch.bfloat16}
