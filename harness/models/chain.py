"""A text model's chain of units under construction, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.errors import Unsupported
from harness.models import attention
from harness.models.layered import Cut, Layered, Unit
from harness.models.techniques import Adapter
from harness.techniques import Adapters
from harness.workload import Workload

Function = Callable[..., Tensor | tuple[Tensor, ...]]


class Chain:
    """Collects units. Unit and tensor names get the current layer's name in front, so that they are unique."""

    def __init__(
        self, workload: Workload, side: nn.Module | None = None, softmax_dtype: torch.dtype | None = None
    ) -> None:
        self.workload, self.side = workload, side
        self.is_aside = False
        self.dtype: torch.dtype = getattr(torch, workload.dtype)
        self.core = attention.core(workload.attn_implementation, softmax_dtype)
        self.units: list[Unit] = []
        self.local_units: list[Unit] = []
        self.adapters = nn.ModuleDict()
        self.number = -1
        self.name = ""

    def layer(self, name: str) -> None:
        """Begin the next layer."""
        self.number += 1
        self.name = name

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is appended meanwhile belongs to the current layer's side network."""
        name, self.name, self.is_aside = self.name, f"{self.name}.side", True
        yield
        self.name, self.is_aside = name, False

    def unit(
        self,
        name: str,
        kind: str,
        reads: Sequence[str],
        writes: Sequence[str],
        function: Function,
        modules: Sequence[nn.Module] | None = None,
        head_dim: int | None = None,
        cut: Cut | None = None,
    ) -> tuple[str, ...]:
        """Append a unit; returns the names of what it writes. A module as `function` is the one it holds."""
        if modules is None:
            assert isinstance(function, nn.Module)
            modules = [function]
        full = tuple(f"{self.name}.{tensor}" for tensor in writes)
        where = f"{self.name}.{name}"
        self.units.append(Unit(where, self.number, kind, reads, full, function, modules, head_dim=head_dim, cut=cut))
        return full

    def adapter(self, x: str, after: str, width: int) -> str:
        """With the technique "adapters" append an adapter after a sublayer. Returns the name of what comes out."""
        if self.workload.technique != "adapters":
            return x
        module = Adapter(width, self.workload.chosen(Adapters).reduction)
        self.adapters[f"{self.name}.{after}".replace(".", "-")] = module
        (x,) = self.unit(f"{after}-adapter", "adapter", [x], [f"{after}-adapted"], module)
        return x

    def attend(
        self,
        q: str,
        k: str,
        v: str,
        module: nn.Module,
        *,
        head_dim: int,
        scaling: float,
        dropout: float,
        mask: str | None,
        bias: str | None = None,
        prefix: str = "",
        width: int | None = None,
    ) -> str:
        """Append an attention core; its dropout follows the training mode of `module`. Returns the context's name.

        With the `width` of q its heads can be shared among devices.
        """
        core = self.core

        def function(q: Tensor, k: Tensor, v: Tensor, *added: Tensor) -> Tensor:
            terms = dict(zip(present, added, strict=True))
            probability = dropout if module.training else 0.0
            return core(q, k, v, **terms, head_dim=head_dim, scaling=scaling, dropout=probability)

        present = {name: tensor for name, tensor in (("mask", mask), ("bias", bias)) if tensor is not None}
        reads = [q, k, v, *present.values()]
        name, writes = f"{prefix}attention", [f"{prefix}context"]
        cut = None if width is None else Cut(width, head_dim)
        (context,) = self.unit(name, "attention", reads, writes, function, [], head_dim, cut)
        return context

    def local(
        self, name: str, kind: str, reads: Sequence[str], function: Function, modules: Sequence[nn.Module] = ()
    ) -> None:
        """Add a local unit that writes the tensor `name`."""
        self.local_units.append(Unit(name, self.number, kind, reads, [name], function, modules, local=True))

    def close(
        self, root: nn.Module, inputs: Sequence[str], reads: Sequence[str], head: Function, modules: Sequence[nn.Module]
    ) -> Layered:
        """Append the head and, for training, the loss to the current layer; returns the model."""
        if self.workload.technique == "adapters":
            if not self.adapters:
                raise Unsupported(f"adapters follow attention and MLPs, and {self.workload.model} has none")
            root.add_module("adapters", self.adapters)
        if self.workload.technique == "parallel-adapters":
            if self.side is None:
                raise Unsupported(
                    f"parallel adapters are made of Transformer layers, and {self.workload.model} has none"
                )
            root.add_module("side", self.side)
        self.units.append(Unit("head", self.number, "head", reads, ["logits"], head, modules))
        if self.workload.training:
            loss = _squared_error if self.workload.num_labels == 1 else _cross_entropy
            self.units.append(Unit("loss", self.number, "loss", ["logits", "labels"], ["loss"], loss))
        return Layered(root, tuple(self.units), tuple(self.local_units), tuple(inputs))


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="sum")


def _squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """logits: [rows, 1], labels: [rows]."""
    return functional.mse_loss(logits.squeeze(-1), labels, reduction="sum")
