"""Optimizers by the names that workloads use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from harness.workload import Workload

MOMENTUM = 0.9


def optimizer_for(workload: Workload, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's own: "sgd" without state, "sgd-momentum" (0.9), "adamw" (torch's defaults)."""
    if workload.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=workload.learning_rate)
    momentum = MOMENTUM if workload.optimizer == "sgd-momentum" else 0.0
    return torch.optim.SGD(parameters, lr=workload.learning_rate, momentum=momentum)
