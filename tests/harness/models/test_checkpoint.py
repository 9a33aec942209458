"""Weights from a folder that save_pretrained wrote: the checkpoint's shape and values, the workload's labels."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    OPTConfig,
    OPTForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from harness import models
from harness.errors import OrreryError
from harness.workload import Workload

SHAPE = {"vocab_size": 300, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}


def _workload(model: str, checkpoint: object, **options: object) -> Workload:
    load = {"dataset": "synthetic", "num_samples": 8, "batch_size": 4, "seq_len": 8, **options}
    return Workload(model=model, checkpoint=str(checkpoint), **load)


def test_a_fine_tuned_model_gives_the_same_logits(tmp_path):
    config = BertConfig(**SHAPE, intermediate_size=48, num_labels=3, attn_implementation="eager")
    saved = BertForSequenceClassification(config).eval()
    saved.save_pretrained(tmp_path)
    layered = models.build(_workload("bert-base", tmp_path, num_labels=3, technique="inference"))
    ids = torch.arange(10, 26).reshape(2, 8)
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    made = layered.run(0, len(layered.units), values)["logits"]
    torch.testing.assert_close(made, saved(**values).logits, rtol=0, atol=1e-6)


def test_a_bare_encoder_gets_a_seeded_classifier(tmp_path):
    saved = BertModel(BertConfig(**SHAPE, intermediate_size=48))
    saved.save_pretrained(tmp_path)
    first, again = (models.build(_workload("bert-base", tmp_path, num_labels=4)).root for _ in range(2))
    torch.testing.assert_close(first.bert.state_dict(), saved.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(first.classifier.state_dict(), again.classifier.state_dict(), rtol=0, atol=0)
    assert first.classifier.out_features == 4
    assert first.training


def test_a_language_model_gives_its_encoder_and_decoder(tmp_path):
    config = T5Config(vocab_size=200, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0)
    saved = T5ForConditionalGeneration(config)
    saved.save_pretrained(tmp_path)
    root = models.build(_workload("t5-base", tmp_path, dropout=0.3)).root
    expected = {key: tensor for key, tensor in saved.state_dict().items() if not key.startswith("lm_head")}
    torch.testing.assert_close(root.backbone.state_dict(), expected, rtol=0, atol=0)
    assert root.backbone.encoder.embed_tokens.weight is root.backbone.shared.weight
    assert root.backbone.encoder.dropout.p == 0.3


def test_on_meta_a_checkpoint_gives_its_shape_only(tmp_path):
    BertModel(BertConfig(**SHAPE, intermediate_size=48)).save_pretrained(tmp_path)
    layered = models.build(_workload("bert-base", tmp_path), "meta")
    assert all(parameter.is_meta for parameter in layered.root.parameters())
    assert layered.units[-1].layer == SHAPE["num_hidden_layers"] + 1


def test_a_checkpoint_of_another_family_is_refused(tmp_path):
    BertModel(BertConfig(**SHAPE, intermediate_size=48)).save_pretrained(tmp_path)
    with pytest.raises(OrreryError, match="is a 'bert' model; t5-tiny needs 't5'"):
        models.build(_workload("t5-tiny", tmp_path))


def test_a_checkpoint_that_the_cut_does_not_fit_is_refused(tmp_path):
    config = OPTConfig(
        vocab_size=300, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=24
    )
    config.do_layer_norm_before = False
    OPTForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(OrreryError, match="do_layer_norm_before = False"):
        models.build(_workload("opt-tiny", tmp_path))


def test_a_checkpoint_without_a_layer_is_not_filled_up_with_random_numbers(tmp_path):
    saved = BertModel(BertConfig(**SHAPE, intermediate_size=48))
    weights = {key: tensor for key, tensor in saved.state_dict().items() if ".layer.1." not in key}
    saved.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(OrreryError, match=r"16 tensors of the backbone are missing, bert\.encoder\.layer\.1"):
        models.build(_workload("bert-base", tmp_path))


@pytest.mark.parametrize("broken", ["missing", "empty", "torn"])
def test_a_checkpoint_that_can_not_be_read_is_named(tmp_path, broken):
    folder = tmp_path / broken
    if broken != "missing":
        folder.mkdir()
    if broken == "torn":
        BertModel(BertConfig(**SHAPE, intermediate_size=48)).save_pretrained(folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OrreryError, match=f"checkpoint .*{broken}.* can't be read"):
        models.build(_workload("bert-tiny", folder))
