"""What training keeps for its backward pass, by what is assumed of dropout."""

from __future__ import annotations

from dataclasses import replace

from harness import profile
from harness.workload import Workload


def kept_bytes(workload: Workload) -> dict[str, float]:
    """Bytes that one training pass over a batch keeps, the accelerator's own count first."""

    def saved(asked: Workload, accelerator: str) -> float:
        costs = profile.count(asked, accelerator)
        return costs.saved(0, len(costs.units)).at(workload.batch_size)

    without = replace(workload, dropout=0.0)
    return {
        "on a GPU: dropout keeps masks of 1 byte an element": saved(workload, "gpu"),
        "on a CPU: dropout keeps masks of 4 bytes an element": saved(workload, "cpu"),
        "without dropout": saved(without, "gpu"),
        "without dropout and with fused attention (sdpa)": saved(replace(without, attn_implementation="sdpa"), "gpu"),
    }
