"""The models a workload can name, and how to get one as a chain of units. Importing this costs no torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported, unknown_name
from harness.techniques import PRUNING, ParallelAdapters
from harness.workload import Workload

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from harness.models.layered import Layered

#: The module that builds a family, where it does not carry the family's name.
MODULE_OF = {"resnet": "cnn", "mobilenet-v2": "cnn", "efficientnet": "cnn"}
ENCODER_DECODER = ("t5", "bart")
DTYPES = ("float32", "float64", "float16", "bfloat16")
ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")


@dataclass(frozen=True)
class ModelEntry:
    """One entry of `catalog.toml`. `config`: arguments of the family's Hugging Face configuration class.

    `hub` is the name of the published weights; models made for this project have none.
    """

    name: str
    family: str
    source: str
    config: Mapping[str, Any] = field(hash=False)
    hub: str | None = None


@cache
def _catalog() -> dict[str, ModelEntry]:
    text = files(__name__).joinpath("catalog.toml").read_text(encoding="utf-8")
    return {name: ModelEntry(name=name, **table) for name, table in tomllib.loads(text).items()}


def names() -> list[str]:
    """The models of the catalog, in its order."""
    return list(_catalog())


def entry(name: str) -> ModelEntry:
    """The catalog's entry. Raises `OrreryError` for a name that is not in it."""
    if name not in _catalog():
        raise unknown_name("model", name, names())
    return _catalog()[name]


def module_of(name: str) -> str:
    """The module that builds the model of that name."""
    family = entry(name).family
    return f"{__name__}.{MODULE_OF.get(family, family)}"


def build(workload: Workload, device: str = "cpu") -> Layered:
    """The workload's model on `device`, cut into units.

    Weights come from `workload.checkpoint`, or from `workload.seed`: the same on every device. What a technique adds
    comes from the seed, or from these weights by pruning. On "meta" nothing is allocated or initialised. `root.train()`
    and `root.eval()` switch dropout in all units; a training workload's model starts in training mode, any other in
    eval mode with frozen weights.
    """
    model = entry(workload.model)
    if workload.dtype not in DTYPES:
        raise unknown_name("dtype", workload.dtype, DTYPES)
    if workload.attn_implementation not in ATTENTION_IMPLEMENTATIONS:
        raise unknown_name("attention implementation", workload.attn_implementation, ATTENTION_IMPLEMENTATIONS)
    import torch

    from harness.models.pruning import prune
    from harness.models.techniques import choose_trained

    family = importlib.import_module(module_of(workload.model))
    if workload.new_tokens is not None and not hasattr(family, "GENERATING"):
        raise Unsupported(f"{workload.model} is no causal language model, so it generates no tokens")
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device == "meta" else "cpu"):
        torch.manual_seed(workload.seed)
        layered: Layered = family.build(model, workload)
    if device != "meta" and workload.chosen(ParallelAdapters).init == PRUNING:
        prune(layered, workload.chosen(ParallelAdapters).reduction)
    layered.root.to(device=device, dtype=getattr(torch, workload.dtype))
    layered.root.train(workload.training)
    choose_trained(layered, workload.technique)
    return layered
