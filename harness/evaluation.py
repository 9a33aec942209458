"""How good what was trained is: the whole model, put together from its shards, on samples that it has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from harness import datasets, metrics, models
from harness.models import shards
from harness.models.layered import Layered
from harness.workload import Workload

#: Samples in memory at a time. In eval mode each is by itself, so that their number changes nothing.
ROWS = 64


def whole(workload: Workload, weights: Path, trained: Mapping[str, Tensor]) -> Layered:
    """The unsharded model in eval mode: the weights that training began with, replaced by what was trained.

    `weights` is what `shards.write` made of the same workload; `trained` are parameters and buffers by name.
    """
    layered = shards.load(workload, weights, 0, len(models.build(workload, device="meta").units))
    named = dict(shards.named(layered.root))
    with torch.no_grad():
        for name, tensor in trained.items():
            named[name].copy_(tensor)
    layered.root.eval()
    return layered


def evaluate(workload: Workload, layered: Layered, data_dir: Path | None) -> float:
    """The data set's metric on its validation split, in points."""
    spec = datasets.spec(workload.dataset)
    assert spec.validation is not None, "asked only of data sets that have one"
    dataset = datasets.load(workload, data_dir, spec.validation)
    outputs, labels = [], []
    with torch.no_grad():
        for first in range(0, len(dataset), ROWS):
            batch = dataset.batch(range(first, min(first + ROWS, len(dataset))))
            outputs.append(layered.run(0, len(layered.units), batch)["logits"])
            labels.append(batch["labels"])
    return metrics.measure(spec.metric, torch.cat(outputs).double().numpy(), torch.cat(labels).double().numpy())
