"""A text model's chain of units under construction, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.errors import Unsupported
from harness.models import attention, masks
from harness.models.layered import Cut, Layered, Unit
from harness.models.techniques import Adapter
from harness.techniques import Adapters
from harness.workload import Workload

Function = Callable[..., Tensor | tuple[Tensor, ...]]
#: Begins the names of the chain that makes one more token: its tensors have other shapes.
NEXT = "next."


class Chain:
    """Collects units. Unit and tensor names get the current layer's name in front, so that they are unique.

    Where tokens are generated, a chain is that of the prompt, or with `decoding` that of one more token.
    """

    def __init__(
        self,
        workload: Workload,
        side: nn.Module | None = None,
        softmax_dtype: torch.dtype | None = None,
        decoding: bool = False,
    ) -> None:
        self.workload, self.side, self.decoding = workload, side, decoding
        self.is_aside = False
        self.dtype: torch.dtype = getattr(torch, workload.dtype)
        self.core = attention.core(workload.attn_implementation, softmax_dtype)
        self.units: list[Unit] = []
        self.local_units: list[Unit] = []
        self.adapters = nn.ModuleDict()
        self.kept: list[str] = []
        self.number = -1
        self.name = ""

    def layer(self, name: str) -> None:
        """Begin the next layer."""
        self.number += 1
        self.name = f"{NEXT}{name}" if self.decoding else name

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
        if self.workload.new_tokens is None:
            (context,) = self.unit(name, "attention", reads, writes, function, [], head_dim, cut)
        elif self.decoding:
            layer = self.name.removeprefix(NEXT)
            reads = [*reads, f"{layer}.keys", f"{layer}.values", "cache_position"]
            (context,) = self.unit(name, "attention", reads, writes, _with_cache(function), [], head_dim, cut)
        else:
            making = _making_cache(function, self.workload.new_tokens - 1)
            writes = [*writes, "keys", "values"]
            context, *cache = self.unit(name, "attention", reads, writes, making, [], head_dim, cut)
            self.kept += cache
        return context

    def local(
        self, name: str, kind: str, reads: Sequence[str], function: Function, modules: Sequence[nn.Module] = ()
    ) -> None:
        """Add a local unit that writes the tensor `name`."""
        self.local_units.append(Unit(name, self.number, kind, reads, [name], function, modules, local=True))

    def causal_mask(self) -> None:
        """Add the local unit that writes "mask" for a decoder-only model."""
        if not self.decoding:
            self.local("mask", "mask", ["attention_mask"], partial(masks.padding_and_causal, dtype=self.dtype))
            return
        assert self.workload.new_tokens is not None
        function = partial(masks.with_cache, to_come=self.workload.new_tokens - 1, dtype=self.dtype)
        self.local("mask", "mask", ["attention_mask", "cache_position"], function)

    def embed_prompt(self, embed: Callable[[Tensor, Tensor], Tensor], modules: Sequence[nn.Module]) -> str:
        """Append the embedding where tokens are generated: `embed(tokens, positions)`, both [rows, tokens].

        Prompts are padded on the left, and positions count what is no padding.
        """

        def function(tokens: Tensor, attention_mask: Tensor, cache_position: Tensor | None = None) -> Tensor:
            return embed(tokens, masks.positions(attention_mask, cache_position))

        reads = ["token", "attention_mask", "cache_position"] if self.decoding else ["input_ids", "attention_mask"]
        (hidden,) = self.unit("tokens", "embedding", reads, ["hidden"], function, modules)
        return hidden

    def close_with_token(self, root: nn.Module, hidden: str, head: nn.Module) -> Layered:
        """Append the language model's head, which chooses the likeliest token; returns the model."""

        def choose(hidden: Tensor) -> tuple[Tensor, Tensor]:
            logits: Tensor = head(hidden[:, -1])
            return logits, logits.argmax(-1, keepdim=True)

        self.units.append(Unit("head", self.number, "head", [hidden], ["logits", "token"], choose, [head]))
        inputs = ("attention_mask", "cache_position") if self.decoding else ("input_ids", "attention_mask")
        return Layered(root, tuple(self.units), tuple(self.local_units), inputs, kept=(*self.kept, "token"))

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


def _making_cache(core: Function, to_come: int) -> Function:
    """The core over a prompt, which also gives its keys and values, with room for those of tokens to come."""

    def function(q: Tensor, k: Tensor, v: Tensor, *added: Tensor) -> tuple[Tensor, ...]:
        context = core(q, k, v, *added)
        assert isinstance(context, Tensor)
        return context, functional.pad(k, (0, 0, 0, to_come)), functional.pad(v, (0, 0, 0, to_come))

    return function


def _with_cache(core: Function) -> Function:
    """The core over one more token, whose keys and values join those of the tokens before, in place."""

    def function(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Tensor | tuple[Tensor, ...]:
        *added, keys, values, cache_position = others
        keys.index_copy_(1, cache_position, k)
        values.index_copy_(1, cache_position, v)
        return core(q, keys, values, *added)

    return function


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="sum")


def _squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """logits: [rows, 1], labels: [rows]."""
    return functional.mse_loss(logits.squeeze(-1), labels, reduction="sum")
