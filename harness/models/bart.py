"""BART with a linear classifier (Lewis et al., ACL 2020). Norms follow the residual sums."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn import functional
from transformers import BartModel
from transformers.models.bart.modeling_bart import (
    BartAttention,
    BartDecoder,
    BartDecoderLayer,
    BartEncoder,
    BartEncoderLayer,
)

from harness.models import ModelEntry, masks, pretrained
from harness.models.chain import Chain
from harness.models.classifier import EncoderDecoderClassifier
from harness.models.layered import Layered
from harness.models.side import Side, SideStack, layers, narrow, places
from harness.techniques import ParallelAdapters
from harness.workload import Workload

MODEL = BartModel
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")
NEEDS = {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
QUERIES_AND_VALUES = ("q_proj", "v_proj")
WIDTHS = ("d_model", "encoder_ffn_dim", "decoder_ffn_dim")

Layer: TypeAlias = BartEncoderLayer | BartDecoderLayer

HEADS = ("encoder_attention_heads", "decoder_attention_heads")


def build(entry: ModelEntry, workload: Workload) -> Layered:
    model = pretrained.load(MODEL, entry, workload, DROPOUTS, NEEDS, QUERIES_AND_VALUES)
    return cut(EncoderDecoderClassifier(model, workload.num_labels), workload)


def cut(root: EncoderDecoderClassifier, workload: Workload) -> Layered:
    """The model, with what the technique adds to it, as a chain of units."""
    model: BartModel = root.backbone
    side = _side(model, workload) if workload.technique == "parallel-adapters" else None
    chain = Chain(workload, side)

    chain.layer("encoder.embedding")
    chain.local("mask", "mask", ["attention_mask"], partial(masks.padding, dtype=chain.dtype))
    hidden = _embedding(chain, "input_ids", model, model.encoder)
    memories = layers(chain, "encoder", model.encoder.layers, hidden, partial(_encoder_layer, chain), side)

    chain.layer("decoder.embedding")
    mask = None
    if workload.decoder_seq_len > 1:
        mask = "decoder.mask"
        chain.local(mask, "mask", ["decoder_input_ids"], partial(masks.causal, dtype=chain.dtype))
    hidden = _embedding(chain, "decoder_input_ids", model, model.decoder)
    append = partial(_decoder_layer, chain, memories=memories, mask=mask)
    hidden, state = layers(chain, "decoder", model.decoder.layers, hidden, append, side, stack=1)

    chain.layer("head")
    if side is not None:
        hidden = side.leave(chain, state, hidden)
    inputs = ["input_ids", "attention_mask", "decoder_input_ids"]
    return chain.close(root, inputs, [hidden], root.classify, [root.classifier])


def _side(model: BartModel, workload: Workload) -> Side:
    options, width = workload.chosen(ParallelAdapters), model.config.d_model
    config = narrow(model.config, WIDTHS, HEADS, options.reduction)
    kept = places(options, config.encoder_layers, config.decoder_layers)
    encoder = [BartEncoderLayer(config, index) for index in kept[0]]
    decoder = [BartDecoderLayer(config, index) for index in kept[1]]
    stacks = [SideStack(width, options, *stack) for stack in zip(kept, (encoder, decoder), strict=True)]
    return Side(width, options, *stacks)


def _encoder_layer(chain: Chain, layer: BartEncoderLayer, hidden: str) -> str:
    return _mlp(chain, layer, _self_attention(chain, layer, hidden, "mask"))


def _decoder_layer(
    chain: Chain, layer: BartDecoderLayer, hidden: str, memories: Sequence[str], mask: str | None
) -> str:
    """`memories`: what the encoder hands to the decoder, and to the side network's."""
    hidden = _self_attention(chain, layer, hidden, mask)
    hidden = _cross_attention(chain, layer, hidden, memories[chain.is_aside])
    return _mlp(chain, layer, hidden)


def _embedding(chain: Chain, ids: str, model: BartModel, stack: BartEncoder | BartDecoder) -> str:
    def embed(ids: Tensor) -> Tensor:
        x = stack.layernorm_embedding(model.shared(ids) + stack.embed_positions(ids))
        return functional.dropout(x, p=stack.dropout, training=stack.training)

    modules = [model.shared, stack.embed_positions, stack.layernorm_embedding]
    (hidden,) = chain.unit("tokens", "embedding", [ids], ["hidden"], embed, modules)
    return hidden


def _self_attention(chain: Chain, layer: Layer, hidden: str, mask: str | None) -> str:
    inner = layer.self_attn

    def qkv(x: Tensor) -> tuple[Tensor, ...]:
        return inner.q_proj(x), inner.k_proj(x), inner.v_proj(x)

    q, k, v = chain.unit("qkv", "qkv", [hidden], ["q", "k", "v"], qkv, [inner.q_proj, inner.k_proj, inner.v_proj])
    context = _attend(chain, inner, q, k, v, mask, "")
    (x,) = chain.unit("projection", "projection", [context], ["projected"], inner.out_proj)
    x = chain.adapter(x, "attention", layer.embed_dim)
    return _connective(chain, "attention-connective", layer, layer.self_attn_layer_norm, x, hidden, "attended")


def _cross_attention(chain: Chain, layer: BartDecoderLayer, hidden: str, memory: str) -> str:
    """Attention of the decoder to the encoder's output."""
    inner = layer.encoder_attn

    def kv(x: Tensor) -> tuple[Tensor, ...]:
        return inner.k_proj(x), inner.v_proj(x)

    (q,) = chain.unit("cross-q", "q", [hidden], ["cross-q"], inner.q_proj)
    k, v = chain.unit("cross-kv", "kv", [memory], ["cross-k", "cross-v"], kv, [inner.k_proj, inner.v_proj])
    context = _attend(chain, inner, q, k, v, "mask", "cross-")
    (x,) = chain.unit("cross-projection", "projection", [context], ["cross-projected"], inner.out_proj)
    return _connective(chain, "cross-connective", layer, layer.encoder_attn_layer_norm, x, hidden, "cross-attended")


def _attend(chain: Chain, inner: BartAttention, q: str, k: str, v: str, mask: str | None, prefix: str) -> str:
    return chain.attend(
        q,
        k,
        v,
        inner,
        head_dim=inner.head_dim,
        scaling=inner.scaling,
        dropout=inner.dropout,
        mask=mask,
        prefix=prefix,
    )


def _mlp(chain: Chain, layer: Layer, hidden: str) -> str:
    def mlp_in(x: Tensor) -> Tensor:
        x = layer.activation_fn(layer.fc1(x))
        return functional.dropout(x, p=layer.activation_dropout, training=layer.training)

    (x,) = chain.unit("mlp-in", "mlp-in", [hidden], ["inner"], mlp_in, [layer.fc1, layer.activation_fn])
    (x,) = chain.unit("mlp-out", "mlp-out", [x], ["outer"], layer.fc2)
    x = chain.adapter(x, "mlp", layer.embed_dim)
    return _connective(chain, "mlp-connective", layer, layer.final_layer_norm, x, hidden, "hidden")


def _connective(chain: Chain, name: str, layer: Layer, norm: nn.LayerNorm, x: str, residual: str, write: str) -> str:
    def add_and_norm(x: Tensor, residual: Tensor) -> Tensor:
        return norm(residual + functional.dropout(x, p=layer.dropout, training=layer.training))

    (hidden,) = chain.unit(name, "connective", [x, residual], [write], add_and_norm, [norm])
    return hidden
