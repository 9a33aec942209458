"""GPT-2 with its classification head (Radford et al., 2019). Norms precede the matrix products."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from harness.models import ModelEntry, pretrained
from harness.models.chain import Chain
from harness.models.classifier import at_last_token
from harness.models.layered import Cut, Layered
from harness.models.side import Side, SideStack, layers, narrow, places
from harness.techniques import ParallelAdapters
from harness.workload import Workload

MODEL, GENERATING = GPT2ForSequenceClassification, GPT2LMHeadModel
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
NEEDS = {"add_cross_attention": False, "reorder_and_upcast_attn": False}
#: One product makes queries, keys and values, so that lora updates the keys, too.
QUERIES_AND_VALUES = ("c_attn",)
WIDTHS = ("n_embd", "n_inner")

HEADS = ("n_head",)


def build(entry: ModelEntry, workload: Workload) -> Layered:
    if workload.new_tokens is not None:
        root = pretrained.load(GENERATING, entry, workload, DROPOUTS, NEEDS)
        further = _generating(root, workload, decoding=True) if workload.new_tokens > 1 else None
        return replace(_generating(root, workload), decoding=further)
    return cut(pretrained.load(MODEL, entry, workload, DROPOUTS, NEEDS, QUERIES_AND_VALUES), workload)


def cut(root: GPT2ForSequenceClassification, workload: Workload) -> Layered:
    """The model, with what the technique adds to it, as a chain of units."""
    model, pad_token_id = root.transformer, root.config.pad_token_id
    side = _side(root, workload) if workload.technique == "parallel-adapters" else None
    chain = Chain(workload, side)
    chain.layer("embedding")
    chain.causal_mask()

    def embed(input_ids: Tensor) -> Tensor:
        position = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        return model.drop(model.wte(input_ids) + model.wpe(position))

    (hidden,) = chain.unit("tokens", "embedding", ["input_ids"], ["hidden"], embed, [model.wte, model.wpe, model.drop])
    hidden, state = layers(chain, "layer", model.h, hidden, partial(_layer, chain), side)
    chain.layer("head")
    (normed,) = chain.unit("final-norm", "connective", [hidden], ["normed"], model.ln_f)
    if side is not None:
        normed = side.leave(chain, state, normed)

    def head(hidden: Tensor, input_ids: Tensor) -> Tensor:
        return at_last_token(root.score(hidden), input_ids, pad_token_id)

    return chain.close(root, ["input_ids", "attention_mask"], [normed, "input_ids"], head, [root.score])


def _generating(root: GPT2LMHeadModel, workload: Workload, decoding: bool = False) -> Layered:
    """The language model as a chain of units for the prompt, or for one more token."""
    model, chain = root.transformer, Chain(workload, decoding=decoding)

    def embed(tokens: Tensor, positions: Tensor) -> Tensor:
        return model.drop(model.wte(tokens) + model.wpe(positions))

    chain.layer("embedding")
    chain.causal_mask()
    hidden = chain.embed_prompt(embed, [model.wte, model.wpe, model.drop])
    hidden, _ = layers(chain, "layer", model.h, hidden, partial(_layer, chain), None)
    chain.layer("head")
    (normed,) = chain.unit("final-norm", "connective", [hidden], ["normed"], model.ln_f)
    return chain.close_with_token(root, normed, root.lm_head)


def _side(root: GPT2ForSequenceClassification, workload: Workload) -> Side:
    options, width = workload.chosen(ParallelAdapters), root.config.n_embd
    config = narrow(root.config, WIDTHS, HEADS, options.reduction)
    norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
    (kept,) = places(options, config.n_layer)
    return Side(width, options, SideStack(width, options, kept, [GPT2Block(config, index) for index in kept], norm))


def _layer(chain: Chain, layer: GPT2Block, hidden: str) -> str:
    inner, mlp = layer.attn, layer.mlp

    def qkv(x: Tensor) -> tuple[Tensor, ...]:
        return inner.c_attn(x).chunk(3, dim=2)

    def attention_connective(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = inner.resid_dropout(x) + residual
        return total, layer.ln_2(total)

    def mlp_in(x: Tensor) -> Tensor:
        return mlp.act(mlp.c_fc(x))

    def mlp_connective(x: Tensor, residual: Tensor) -> Tensor:
        return residual + mlp.dropout(x)

    (x,) = chain.unit("attention-norm", "connective", [hidden], ["attention-in"], layer.ln_1)
    width, head = inner.embed_dim, inner.head_dim
    cut = Cut(width, head, columns=(inner.c_attn,))
    q, k, v = chain.unit("qkv", "qkv", [x], ["q", "k", "v"], qkv, [inner.c_attn], cut=cut)
    context = chain.attend(
        q,
        k,
        v,
        inner,
        head_dim=head,
        scaling=inner.scaling,
        dropout=inner.attn_dropout.p,
        mask="mask",
        width=width,
    )
    cut = Cut(width, head, rows=(inner.c_proj,))
    (x,) = chain.unit("projection", "projection", [context], ["projected"], inner.c_proj, cut=cut)
    x = chain.adapter(x, "attention", inner.embed_dim)
    modules = [inner.resid_dropout, layer.ln_2]
    middle, x = chain.unit(
        "attention-connective", "connective", [x, hidden], ["attended", "mlp-in"], attention_connective, modules
    )
    columns = mlp.c_fc.nf
    cut = Cut(columns, columns=(mlp.c_fc,))
    (x,) = chain.unit("mlp-in", "mlp-in", [x], ["inner"], mlp_in, [mlp.c_fc, mlp.act], cut=cut)
    (x,) = chain.unit("mlp-out", "mlp-out", [x], ["outer"], mlp.c_proj, cut=Cut(columns, rows=(mlp.c_proj,)))
    x = chain.adapter(x, "mlp", inner.embed_dim)
    (hidden,) = chain.unit("mlp-connective", "connective", [x, middle], ["hidden"], mlp_connective, [mlp.dropout])
    return hidden
