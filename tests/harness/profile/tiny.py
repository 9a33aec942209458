"""The tiny sibling of every family, and batches for it."""

from __future__ import annotations

import torch
from torch import Tensor

from harness import datasets
from harness.models import entry
from harness.workload import Workload

torch.set_num_threads(1)

TEXT = ("bert-tiny", "distilbert-tiny", "gpt2-tiny", "opt-tiny", "t5-tiny", "bart-tiny")
IMAGE = ("resnet-tiny", "mobilenet-v2-tiny", "efficientnet-tiny")


def workload(model: str, **options: object) -> Workload:
    shape: dict[str, object] = {"seq_len": 12}
    if entry(model).family in ("resnet", "mobilenet-v2", "efficientnet"):
        shape = {"seq_len": None, "image_size": 32}
    return Workload(model=model, dataset="synthetic", num_samples=64, batch_size=8, **shape, **options)


def batch(load: Workload, rows: int) -> dict[str, Tensor]:
    return datasets.load(load).batch(range(rows))
