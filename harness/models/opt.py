"""OPT with its classification head (Zhang et al., arXiv 2205.01068). Norms precede the matrix products."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import OPTForCausalLM, OPTForSequenceClassification
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from harness.models import ModelEntry, pretrained
from harness.models.chain import Chain
from harness.models.classifier import at_last_token
from harness.models.layered import Cut, Layered
from harness.models.side import Side, SideStack, layers, narrow, places
from harness.techniques import ParallelAdapters
from harness.workload import Workload

MODEL, GENERATING = OPTForSequenceClassification, OPTForCausalLM
DROPOUTS = ("dropout", "attention_dropout")
NEEDS = {"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layerdrop": 0.0}
QUERIES_AND_VALUES = ("q_proj", "v_proj")
WIDTHS = ("hidden_size", "ffn_dim")

HEADS = ("num_attention_heads",)


def build(entry: ModelEntry, workload: Workload) -> Layered:
    if workload.new_tokens is not None:
        root = pretrained.load(GENERATING, entry, workload, DROPOUTS, NEEDS)
        further = _generating(root, workload, decoding=True) if workload.new_tokens > 1 else None
        return replace(_generating(root, workload), decoding=further)
    return cut(pretrained.load(MODEL, entry, workload, DROPOUTS, NEEDS, QUERIES_AND_VALUES), workload)


def cut(root: OPTForSequenceClassification, workload: Workload) -> Layered:
    """The model, with what the technique adds to it, as a chain of units."""
    model, pad_token_id = root.model.decoder, root.config.pad_token_id
    side = _side(root, workload) if workload.technique == "parallel-adapters" else None
    chain = Chain(workload, side, softmax_dtype=torch.float32)
    chain.layer("embedding")
    chain.causal_mask()

    def embed(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The positional embedding counts the tokens that are no padding."""
        return model.embed_tokens(input_ids) + model.embed_positions(attention_mask)

    (hidden,) = chain.unit(
        "tokens",
        "embedding",
        ["input_ids", "attention_mask"],
        ["hidden"],
        embed,
        [model.embed_tokens, model.embed_positions],
    )
    hidden, state = layers(chain, "layer", model.layers, hidden, partial(_layer, chain), side)
    chain.layer("head")
    (normed,) = chain.unit("final-norm", "connective", [hidden], ["normed"], model.final_layer_norm)
    if side is not None:
        normed = side.leave(chain, state, normed)

    def head(hidden: Tensor, input_ids: Tensor) -> Tensor:
        return at_last_token(root.score(hidden), input_ids, pad_token_id)

    return chain.close(root, ["input_ids", "attention_mask"], [normed, "input_ids"], head, [root.score])


def _generating(root: OPTForCausalLM, workload: Workload, decoding: bool = False) -> Layered:
    """The language model as a chain of units for the prompt, or for one more token."""
    model, chain = root.model.decoder, Chain(workload, softmax_dtype=torch.float32, decoding=decoding)

    def embed(tokens: Tensor, positions: Tensor) -> Tensor:
        return model.embed_tokens(tokens) + model.embed_positions(tokens, position_ids=positions)

    chain.layer("embedding")
    chain.causal_mask()
    hidden = chain.embed_prompt(embed, [model.embed_tokens, model.embed_positions])
    hidden, _ = layers(chain, "layer", model.layers, hidden, partial(_layer, chain), None)
    chain.layer("head")
    (normed,) = chain.unit("final-norm", "connective", [hidden], ["normed"], model.final_layer_norm)
    return chain.close_with_token(root, normed, root.lm_head)


def _side(root: OPTForSequenceClassification, workload: Workload) -> Side:
    options, width = workload.chosen(ParallelAdapters), root.config.hidden_size
    config = narrow(root.config, WIDTHS, HEADS, options.reduction)
    norm = nn.LayerNorm(config.hidden_size)
    (kept,) = places(options, config.num_hidden_layers)
    narrow_layers = [OPTDecoderLayer(config, index) for index in kept]
    return Side(width, options, SideStack(width, options, kept, narrow_layers, norm))


def _layer(chain: Chain, layer: OPTDecoderLayer, hidden: str) -> str:
    inner = layer.self_attn

    def qkv(x: Tensor) -> tuple[Tensor, ...]:
        # OPT scales the query here, not the scores.
        return inner.q_proj(x) * inner.scaling, inner.k_proj(x), inner.v_proj(x)

    def dropout(x: Tensor) -> Tensor:
        return functional.dropout(x, p=layer.dropout, training=layer.training)

    def attention_connective(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + dropout(x)
        return total, layer.final_layer_norm(total)

    def mlp_in(x: Tensor) -> Tensor:
        return layer.activation_fn(layer.fc1(x))

    def mlp_connective(x: Tensor, residual: Tensor) -> Tensor:
        return residual + dropout(x)

    (x,) = chain.unit("attention-norm", "connective", [hidden], ["attention-in"], layer.self_attn_layer_norm)
    products, width, head = [inner.q_proj, inner.k_proj, inner.v_proj], inner.embed_dim, inner.head_dim
    cut = Cut(width, head, columns=tuple(products))
    q, k, v = chain.unit("qkv", "qkv", [x], ["q", "k", "v"], qkv, products, cut=cut)
    context = chain.attend(q, k, v, inner, head_dim=head, scaling=1.0, dropout=inner.dropout, mask="mask", width=width)
    cut = Cut(width, head, rows=(inner.out_proj,))
    (x,) = chain.unit("projection", "projection", [context], ["projected"], inner.out_proj, cut=cut)
    x = chain.adapter(x, "attention", layer.embed_dim)
    middle, x = chain.unit(
        "attention-connective",
        "connective",
        [x, hidden],
        ["attended", "mlp-in"],
        attention_connective,
        [layer.final_layer_norm],
    )
    columns = layer.fc1.out_features
    cut = Cut(columns, columns=(layer.fc1,))
    (x,) = chain.unit("mlp-in", "mlp-in", [x], ["inner"], mlp_in, [layer.fc1, layer.activation_fn], cut=cut)
    (x,) = chain.unit("mlp-out", "mlp-out", [x], ["outer"], layer.fc2, cut=Cut(columns, rows=(layer.fc2,)))
    x = chain.adapter(x, "mlp", layer.embed_dim)
    (hidden,) = chain.unit("mlp-connective", "connective", [x, middle], ["hidden"], mlp_connective, [])
    return hidden
