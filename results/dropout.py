"""How much of what training keeps are dropout masks, whose size depends on the device that draws them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness import models, profile
from harness.profile.counting import batch_spec
from harness.workload import Workload

#: On a CPU torch keeps the scaled float mask that it multiplied with; on a GPU its fused kernel keeps a bool
#: (`_dropout_impl` and `native_dropout` in torch's ATen/native/Dropout.cpp).
CPU_MASK_BYTES, GPU_MASK_BYTES = 4, 1


class _Masks(TorchDispatchMode):
    """Counts the elements of every mask that is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.bernoulli_:
            self.elements += out.numel()
        return out


def mask_elements(workload: Workload) -> int:
    """Elements of all dropout masks of one training pass over a batch. Nothing is allocated."""
    layered = models.build(workload, device="meta")
    layered.root.train()
    specs = {name: batch_spec(name, workload, workload.batch_size) for name in (*layered.inputs, "labels")}
    batch = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    with _Masks() as masks, torch.no_grad():
        layered.run(0, len(layered.units), batch)
    return masks.elements


def kept_bytes(workload: Workload) -> dict[str, float]:
    """Bytes that one training pass over a batch keeps for its backward pass, by what is assumed of dropout."""

    def saved(asked: Workload) -> float:
        costs = profile.count(asked)
        return costs.saved(0, len(costs.units)).at(workload.batch_size)

    counted, masks = saved(workload), mask_elements(workload)
    return {
        f"as counted: masks of {CPU_MASK_BYTES} bytes an element, as on a CPU": counted,
        f"with masks of {GPU_MASK_BYTES} byte an element, as on a GPU": counted
        - masks * (CPU_MASK_BYTES - GPU_MASK_BYTES),
        "without dropout": saved(replace(workload, dropout=0.0)),
        "without dropout and with fused attention (sdpa)": saved(
            replace(workload, dropout=0.0, attn_implementation="sdpa")
        ),
    }
