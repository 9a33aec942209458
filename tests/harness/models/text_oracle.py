"""Batches of text with padding, and what the whole Hugging Face model makes of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness import models
from harness.models.layered import Layered
from harness.workload import Workload

torch.set_num_threads(1)

TINY = ("bert-tiny", "distilbert-tiny", "gpt2-tiny", "opt-tiny", "t5-tiny", "bart-tiny")
ROWS, TOKENS = 5, 11


def workload(model: str, **options: object) -> Workload:
    return Workload(model=model, dataset="synthetic", num_samples=64, batch_size=ROWS, seq_len=TOKENS, **options)


def build(load: Workload) -> Layered:
    """The model with weights large enough that masks, biases and positions all show in the logits."""
    layered = models.build(load)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layered.root.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.15 * noise.to(parameter.dtype))
    return layered


def batch(load: Workload, rows: int = ROWS, left: bool = False) -> dict[str, Tensor]:
    """Rows of different lengths, padded on the right (or left), one of them full; and labels."""
    generator = torch.Generator().manual_seed(3)
    config = models.entry(load.model).config
    ids = torch.randint(3, config["vocab_size"], (rows, TOKENS), generator=generator)
    lengths = torch.randint(2, TOKENS, (rows, 1), generator=generator)
    lengths[0] = TOKENS
    mask = (torch.arange(TOKENS) < lengths).long()
    mask = mask.flip(1) if left else mask
    values = {"input_ids": ids.masked_fill(mask == 0, config["pad_token_id"]), "attention_mask": mask}
    if "type_vocab_size" in config:
        values["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=generator)
    if "decoder_start_token_id" in config:
        values["decoder_input_ids"] = torch.randint(0, 9, (rows, load.decoder_seq_len), generator=generator)
    labels = torch.randint(0, load.num_labels, (rows,), generator=generator)
    values["labels"] = labels if load.num_labels > 1 else torch.randn(rows, generator=generator)
    return values


def logits(root: nn.Module, values: dict[str, Tensor]) -> Tensor:
    """Of the uncut model."""
    inputs = {name: tensor for name, tensor in values.items() if name != "labels"}
    if hasattr(root, "backbone"):
        hidden = root.backbone(**inputs, use_cache=False).last_hidden_state
        return root.classifier(hidden[:, -1, :])
    return root(**inputs).logits


def loss(root: nn.Module, values: dict[str, Tensor]) -> Tensor:
    """Of the uncut model, summed over rows; its own loss where it has one."""
    rows = len(values["labels"])
    if not hasattr(root, "backbone"):
        return root(**values).loss * rows
    made = logits(root, values)
    if made.shape[-1] == 1:
        return functional.mse_loss(made.squeeze(-1), values["labels"]) * rows
    return functional.cross_entropy(made, values["labels"]) * rows


def gradients(root: nn.Module) -> dict[str, Tensor]:
    """Takes every parameter's gradient away; all must have one."""
    taken = {}
    for name, parameter in root.named_parameters():
        assert parameter.grad is not None, name
        taken[name], parameter.grad = parameter.grad, None
    return taken


def chain_loss(layered: Layered, values: dict[str, Tensor]) -> Tensor:
    return layered.run(0, len(layered.units), values)["loss"]


def loss_and_backward_in_stages(layered: Layered, values: dict[str, Tensor], stages: list[tuple[int, int]]) -> Tensor:
    """Forward and backward stage by stage: between stages go only detached tensors that a later unit reads."""
    inputs = {name: values[name] for name in (*layered.inputs, "labels")}
    boundary: dict[str, Tensor] = {}
    runs = []
    for first, last in stages:
        entering = {name: tensor.detach().requires_grad_() for name, tensor in boundary.items()}
        made = layered.run(first, last, {**inputs, **entering})
        later = {name for unit in layered.units[last:] for name in unit.reads}
        written = {name for unit in layered.units[:last] for name in unit.writes}
        boundary = {name: made[name] for name in later & written}
        runs.append((entering, made, set(boundary)))
    total = made["loss"]
    arriving = {"loss": torch.ones_like(total)}
    for entering, made, leaving in reversed(runs):
        own = [name for name in (leaving or {"loss"}) if name not in entering]
        torch.autograd.backward([made[name] for name in own], [arriving[name] for name in own])
        passed = {name: gradient for name, gradient in arriving.items() if name in entering}
        arriving = {}
        for name, tensor in entering.items():
            parts = [part for part in (tensor.grad, passed.get(name)) if part is not None]
            arriving[name] = torch.stack(parts).sum(0)
    return total


def layer_ranges(layered: Layered) -> list[tuple[int, int]]:
    starts = [i for i, unit in enumerate(layered.units) if i == 0 or unit.layer != layered.units[i - 1].layer]
    return list(zip(starts, [*starts[1:], len(layered.units)], strict=True))
