"""Pruned side layers compute what the backbone's compute where the channels that go are copies or silent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness import models
from harness.models import pruning, shards
from harness.models.layered import Layered
from tests.harness.models import text_oracle as oracle
from tests.harness.models.test_techniques import run_layer

#: With 4 the scores of heads whose queries and keys have two copies of each channel are exactly what they were.
REDUCTION = 4
LAYERS = {
    "bert-tiny": ["bert.encoder.layer"],
    "distilbert-tiny": ["distilbert.transformer.layer"],
    "gpt2-tiny": ["transformer.h"],
    "opt-tiny": ["model.decoder.layers"],
    "t5-tiny": ["backbone.encoder.block", "backbone.decoder.block"],
    "bart-tiny": ["backbone.encoder.layers", "backbone.decoder.layers"],
}
#: By the last parts of a parameter's name: which of its axes (outputs, inputs) are channels of what.
RESIDUAL, SCORES, CONTEXT, INNER, MEMORY = "residual", "scores", "context", "inner", "memory"


def pruned(model: str, **options: object) -> Layered:
    asked = {"reduction": REDUCTION, "init": "pruning", **options}
    return models.build(oracle.workload(model, technique="parallel-adapters", technique_options=asked, dropout=0.0))


@pytest.mark.parametrize("model", oracle.TINY)
def test_to_prune_nothing_is_to_copy(model: str) -> None:
    """With a reduction of 1 every side layer has, tensor by tensor, the weights of the layer that it is beside."""
    layered = pruned(model, reduction=1, dropped="1")
    for stack, path in zip(layered.root.side.stacks, LAYERS[model], strict=True):
        backbone = layered.root.get_submodule(path)
        assert stack.places == [place for place in range(len(backbone)) if place != 1]
        for place, layer in zip(stack.places, stack.layers, strict=True):
            wide = backbone[place].state_dict()
            assert layer.state_dict().keys() == wide.keys()
            assert all(torch.equal(tensor, wide[name]) for name, tensor in layer.state_dict().items())
