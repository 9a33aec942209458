"""Fine-tuning techniques: what is added to a backbone, and what of the model is trained.

| technique | added | trained |
|---|---|---|
| full | - | all |
| lora | low-rank updates of each attention's queries and values, by peft (Hu et al., ICLR 2022) | these, head |
| adapters | bottlenecks after each layer's self-attention and MLP (Houlsby et al., ICML 2019) | these, head |
| parallel-adapters | a narrow network beside the backbone (see `harness.models.side`) | this, head |
| inference | - | nothing |

Places, and the sizes that are the defaults (see `harness.techniques`), are inferred from PAC's trainable parameters
(Table 1) and its released code; the paper does not give them. The identity beside an adapter is Houlsby's: the authors'
timing code has none.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from harness.errors import OrreryError, Unsupported
from harness.models.layered import Layered
from harness.techniques import Lora
from harness.workload import Workload

#: Where neither the technique's options nor the workload say another.
LORA_DROPOUT = 0.1
#: The modules that techniques add to a model: peft's names, and ours.
ADDED = ("lora_A", "lora_B", "adapters", "side")
#: Chosen here. Small, so that a layer with a new adapter computes nearly what it did.
ADAPTER_STD = 1e-2


class Adapter(nn.Module):
    """A bottleneck beside the identity: x + up(gelu(down(x))), x of [rows, tokens, width]."""

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        inner = width // reduction
        if inner * reduction != width:
            raise Unsupported(f"adapters have a {reduction}th of a layer's width, and {width} is no multiple of that")
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation = NewGELUActivation()
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=ADAPTER_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.up(self.activation(self.down(x)))
        return out


def add_lora(model: nn.Module, queries_and_values: Sequence[str], workload: Workload) -> None:
    """Put low-rank updates beside the modules of these names, in place. Raises OrreryError without peft."""
    if not queries_and_values:
        raise Unsupported(f"lora updates attention, and {workload.model} has none")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise OrreryError(
            "The technique lora needs the package peft, which is not installed. Install it: pip install peft"
        ) from error
    options = workload.chosen(Lora)
    dropouts = (options.dropout, workload.dropout, LORA_DROPOUT)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=next(dropout for dropout in dropouts if dropout is not None),
        target_modules=list(queries_and_values),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's linear layers
    )
    inject_adapter_in_model(config, model)


def choose_trained(layered: Layered, technique: str) -> None:
    """Set `requires_grad` of every parameter. A head is new with a backbone, so that it is always trained."""
    layered.root.requires_grad_(technique == "full")
    if technique in ("full", "inference"):
        return
    added = [module for name, module in layered.root.named_modules() if name.rpartition(".")[2] in ADDED]
    heads = [module for unit in layered.units if unit.kind == "head" for module in unit.held]
    for module in (*added, *heads):
        module.requires_grad_(True)
