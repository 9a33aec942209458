"""Side layers that are pruned from the backbone's: the right weights, together again a layer, of any family.

The backbone is made so that nothing is lost: every narrow channel is there, among copies of it and silent ones.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness import models
from harness.models import pruning, shards
from harness.models.layered import Layered
from harness.workload import Workload
from tests.harness.models import text_oracle as oracle
from tests.harness.models.test_techniques import run_layer

#: With 4, and two copies of each channel of queries and keys, scores are as large in the wide layer and in the narrow.
REDUCTION = 4
LAYERS = {
    "bert-tiny": ["bert.encoder.layer"],
    "distilbert-tiny": ["distilbert.transformer.layer"],
    "gpt2-tiny": ["transformer.h"],
    "opt-tiny": ["model.decoder.layers"],
    "t5-tiny": ["backbone.encoder.block", "backbone.decoder.block"],
    "bart-tiny": ["backbone.encoder.layers", "backbone.decoder.layers"],
}
HEADS = 4
#: The names of all matrices of all families: what they write, and what they read.
MATRICES = {
    r"(query|q|q_proj|q_lin)": ("queries", "hidden"),
    r"(key|k|k_proj|k_lin)": ("keys", "hidden"),
    r"(value|v|v_proj|v_lin)": ("context", "hidden"),
    r"(attention\.output\.dense|o|out_proj|out_lin|attn\.c_proj)": ("hidden", "context"),
    r"(intermediate\.dense|lin1|wi|fc1|c_fc)": ("inner", "hidden"),
    r"((?<!attention\.)output\.dense|lin2|wo|fc2|mlp\.c_proj)": ("hidden", "inner"),
}


def asked(model: str, **options: object) -> Workload:
    chosen = {"reduction": REDUCTION, "init": "pruning", **options}
    return oracle.workload(model, technique="parallel-adapters", technique_options=chosen, dropout=0.0)


@pytest.mark.parametrize("model", oracle.TINY)
def test_to_prune_nothing_is_to_copy(model: str) -> None:
    """With a reduction of 1 every side layer has, tensor by tensor, the weights of the layer that it is beside."""
    layered = models.build(asked(model, reduction=1, dropped="1"))
    for stack, path in zip(layered.root.side.stacks, LAYERS[model], strict=True):
        backbone = layered.root.get_submodule(path)
        assert stack.places == [place for place in range(len(backbone)) if place != 1]
        for place, layer in zip(stack.places, stack.layers, strict=True):
            wide = backbone[place].state_dict()
            assert layer.state_dict().keys() == wide.keys()
            assert all(torch.equal(tensor, wide[name]) for name, tensor in layer.state_dict().items())


class Spread:
    """Where narrow channels lie among the wide ones: each at one place that is kept, and at `copies` - 1 others."""

    def __init__(self, narrow: int, blocks: int, copies: int) -> None:
        self.kept = torch.zeros(narrow, REDUCTION * narrow)
        self.copies = torch.zeros(REDUCTION * narrow, narrow)
        for block in range(blocks):
            mine = range(block * narrow // blocks, (block + 1) * narrow // blocks)
            order = (torch.randperm(REDUCTION * len(mine)) + REDUCTION * mine[0]).tolist()
            for channel, place in zip(mine, sorted(order[: len(mine)]), strict=True):
                self.kept[channel, place] = 1
            for number, place in enumerate(order[len(mine) : copies * len(mine)]):
                self.copies[place, mine[number % len(mine)]] = 1

    def write(self, copy: float = 1.0) -> Tensor:
        return self.kept.T + copy * self.copies


def silent(layered: Layered, model: str) -> list[Spread]:
    """Give the side layers weights, and the backbone ones with which it computes the same, copied. Returns how."""
    hidden: list[Spread] = []
    for stack, path in zip(layered.root.side.stacks, LAYERS[model], strict=True):
        width = layered.root.side.up.in_features
        hidden.append(Spread(width, 1, REDUCTION))
        for narrow, wide in zip(stack.layers, layered.root.get_submodule(path), strict=True):
            expand(narrow, wide, hidden, model)
        if stack.norm is not None:
            expand_norms(stack.norm, final_norm(layered.root, model, len(hidden) - 1), hidden[-1])
    return hidden


def final_norm(root: nn.Module, model: str, stack: int) -> nn.Module:
    path = {"gpt2-tiny": "transformer.ln_f", "opt-tiny": "model.decoder.final_layer_norm"}
    stacks = ["backbone.encoder.final_layer_norm", "backbone.decoder.final_layer_norm"]
    return root.get_submodule(path.get(model, stacks[stack]))


def expand(narrow: nn.Module, wide: nn.Module, hidden: list[Spread], model: str) -> None:
    attentions: tuple[dict[str, Spread], ...] = ({}, {})  # to the own tokens, and to the encoder's
    modules = dict(wide.named_modules())
    for name, module in narrow.named_modules():
        is_cross = "EncDecAttention" in name or "encoder_attn" in name
        if isinstance(module, nn.Embedding):
            module.weight.copy_(torch.randn_like(module.weight))
            modules[name].weight.copy_(module.weight)
        elif name.endswith("c_attn"):
            for part, kind in enumerate(("queries", "keys", "context")):
                inputs = module.weight.shape[0]
                rows, wide_rows = (slice(part * n, (part + 1) * n) for n in (inputs, REDUCTION * inputs))
                pairs = [(m.weight[:, r].T, m.bias[r]) for m, r in ((module, rows), (modules[name], wide_rows))]
                fill(*pairs, kind, "hidden", attentions[0], hidden[-1], hidden[-1], model)
        elif isinstance(module, (nn.Linear, Conv1D)):
            (kinds,) = [kinds for pattern, kinds in MATRICES.items() if re.search(rf"(^|\.){pattern}$", name)]
            reads = hidden[0] if is_cross and kinds[0] in ("keys", "context") else hidden[-1]
            sides = [(m.weight.T if isinstance(m, Conv1D) else m.weight, m.bias) for m in (module, modules[name])]
            fill(*sides, *kinds, attentions[is_cross], hidden[-1], reads, model)
    expand_norms(narrow, wide, hidden[-1])


def fill(
    narrow: tuple[Tensor, Tensor | None],
    wide: tuple[Tensor, Tensor | None],
    writes: str,
    reads: str,
    spreads: dict[str, Spread],
    hidden: Spread,
    entering: Spread,
    model: str,
) -> None:
    outputs, inputs = narrow[0].shape
    weight = torch.randn(outputs, inputs)
    weight = weight / weight.norm(dim=1, keepdim=True) * {"queries": 3.0, "hidden": 0.3}.get(writes, 1.0)
    narrow[0].copy_(weight)
    copy = 1.0
    if writes in ("queries", "keys"):
        copies = 1 if model == "t5-tiny" else 2  # T5 does not scale scores
        out = spreads.setdefault("scores", Spread(outputs, HEADS, copies))
        copy = 0.5 if writes == "queries" else 2.0  # so that a copy is not as important as what is kept
    elif writes == "hidden":
        out = hidden
    else:
        out = spreads.setdefault(writes, Spread(outputs, HEADS if writes == "context" else 1, 1))
    source = entering if reads == "hidden" else spreads[reads]
    wide[0].copy_(out.write(copy) @ weight @ source.kept)
    if narrow[1] is not None:
        narrow[1].copy_(torch.randn_like(narrow[1]))
        wide[1].copy_(out.write(copy) @ narrow[1])


def expand_norms(narrow: nn.Module, wide: nn.Module, hidden: Spread) -> None:
    theirs = [m for m in wide.modules() if "Norm" in type(m).__name__]
    for ours, other in zip((m for m in narrow.modules() if "Norm" in type(m).__name__), theirs, strict=True):
        for name, parameter in ours.named_parameters():
            parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            other.get_parameter(name).copy_(hidden.write() @ parameter)


@pytest.mark.parametrize("model", oracle.TINY)
def test_pruned_layers_compute_what_the_backbones_do(model: str) -> None:
    """By transformers' own forward passes, on the channels that are kept; and the weights are those, bit by bit."""
    torch.manual_seed(5)
    load, family = asked(model), models.entry(model).family
    layered = models.build(load)
    layered.root.eval()
    with torch.no_grad():
        hidden = silent(layered, model)
        side = layered.root.side
        inner = {n: p for n, p in side.stacks.named_parameters() if ".downs." not in n}
        wanted = {name: parameter.clone() for name, parameter in inner.items()}
        for name in wanted:
            side.stacks.get_parameter(name).zero_()
        pruning.prune(layered, REDUCTION)
        for name, parameter in wanted.items():
            assert torch.equal(side.stacks.get_parameter(name), parameter), name
        values = oracle.batch(load)
        memory = None
        for stack, path, spread in zip(side.stacks, LAYERS[model], hidden, strict=True):
            tokens = 1 if memory is not None else oracle.TOKENS
            x = torch.randn(oracle.ROWS, tokens, side.up.in_features)
            narrow = ran(family, stack.layers, x, values, memory and memory[0])
            wide = ran(family, layered.root.get_submodule(path), spread_out(spread, x), values, memory and memory[1])
            torch.testing.assert_close(wide, spread_out(spread, narrow), rtol=0, atol=1e-5)
            assert narrow.std() > 0.1
            memory = (narrow, wide)


def spread_out(spread: Spread, x: Tensor) -> Tensor:
    return x @ spread.write().T


def ran(family: str, layers: nn.ModuleList, x: Tensor, values: dict[str, Tensor], memory: Tensor | None) -> Tensor:
    extra: dict[str, object] = {}
    for layer in layers:
        x = run_layer(family, layer, x, values, memory, extra)
    return x


def test_channels_are_ranked_by_the_squares_of_all_weights_that_touch_them() -> None:
    """BERT's residual stream, counted by hand: rows of what writes it, columns of what reads it, in all layers."""
    layered = models.build(asked("bert-tiny"))
    importance = torch.zeros(64)
    for layer in layered.root.bert.encoder.layer:
        inner = layer.attention.self
        for reader in (inner.query, inner.key, inner.value, layer.intermediate.dense):
            importance += reader.weight.detach().square().sum(0)
        for writer in (layer.attention.output.dense, layer.output.dense):
            importance += writer.weight.detach().square().sum(1)
    kept = importance.topk(64 // REDUCTION).indices.sort().values
    wide, narrow = layered.root.bert.encoder.layer[2], layered.root.side.stacks[0].layers[2]
    wide.output.dense.bias.data.copy_(torch.arange(64))
    pruning.prune(layered, REDUCTION)
    assert narrow.output.dense.bias.tolist() == kept.tolist()


def test_what_is_pruned_are_the_checkpoints_weights_on_every_device(tmp_path: Path) -> None:
    seeded = models.build(oracle.workload("t5-tiny", seed=3)).root.backbone
    seeded.save_pretrained(tmp_path / "checkpoint")
    load = replace(asked("t5-tiny", dropped="0"), checkpoint=str(tmp_path / "checkpoint"))
    layered = models.build(load)
    (first, *_), (other, *_) = (stack.layers for stack in layered.root.side.stacks)
    for stack, layer in ((seeded.encoder, first), (seeded.decoder, other)):
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        assert torch.equal(layer.layer[0].SelfAttention.relative_attention_bias.weight, table)
    entries = set(seeded.encoder.block[1].layer[0].SelfAttention.q.weight.flatten().tolist())
    assert set(first.layer[0].SelfAttention.q.weight.flatten().tolist()) <= entries
    shards.write(load, tmp_path / "weights.safetensors")
    held = dict(shards.load(load, tmp_path / "weights.safetensors", 0, len(layered.units)).root.named_parameters())
    assert all(torch.equal(held[name], parameter) for name, parameter in layered.root.named_parameters())
