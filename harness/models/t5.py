"""T5 with a linear classifier (Raffel et al., JMLR 2020). Norms precede the matrix products.

Each stack has one table of relative position biases, which all of its layers use.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from transformers import T5Model
from transformers.models.t5.modeling_t5 import (
    T5Attention,
    T5Block,
    T5LayerCrossAttention,
    T5LayerFF,
    T5LayerNorm,
    T5LayerSelfAttention,
    T5Stack,
)

from harness.models import ModelEntry, masks, pretrained
from harness.models.chain import Chain
from harness.models.classifier import EncoderDecoderClassifier
from harness.models.layered import Layered
from harness.models.side import Side, SideStack, layers, narrow, places
from harness.techniques import ParallelAdapters
from harness.workload import Workload

MODEL = T5Model
DROPOUTS = ("dropout_rate",)
NEEDS = {"is_gated_act": False}
QUERIES_AND_VALUES = ("q", "v")
WIDTHS = ("d_model", "d_kv", "d_ff")

HEADS: tuple[str, ...] = ()  # they have a width of their own


def build(entry: ModelEntry, workload: Workload) -> Layered:
    model = pretrained.load(MODEL, entry, workload, DROPOUTS, NEEDS, QUERIES_AND_VALUES)
    return cut(EncoderDecoderClassifier(model, workload.num_labels), workload)


def cut(root: EncoderDecoderClassifier, workload: Workload) -> Layered:
    """The model, with what the technique adds to it, as a chain of units."""
    model: T5Model = root.backbone
    side = _side(model, workload) if workload.technique == "parallel-adapters" else None
    chain = Chain(workload, side)

    chain.layer("encoder.embedding")
    chain.local("mask", "mask", ["attention_mask"], partial(masks.padding, dtype=chain.dtype))
    hidden = _embedding(chain, "encoder", "input_ids", model, model.encoder)
    hidden, state = layers(chain, "encoder", model.encoder.block, hidden, partial(_encoder_layer, chain), side)
    memories = [_final_norm(chain, model.encoder, hidden)]
    if side is not None:
        _bias(chain, "encoder.side", "input_ids", side.stack(0).layers)
        memories.append(side.end(chain, 0, state))

    chain.layer("decoder.embedding")
    mask = None
    if workload.decoder_seq_len > 1:
        mask = "decoder.mask"
        chain.local(mask, "mask", ["decoder_input_ids"], partial(masks.causal, dtype=chain.dtype))
    hidden = _embedding(chain, "decoder", "decoder_input_ids", model, model.decoder)
    append = partial(_decoder_layer, chain, memories=memories, mask=mask)
    hidden, state = layers(chain, "decoder", model.decoder.block, hidden, append, side, stack=1)

    chain.layer("head")
    final = _final_norm(chain, model.decoder, hidden)
    if side is not None:
        _bias(chain, "decoder.side", "decoder_input_ids", side.stack(1).layers)
        final = side.leave(chain, state, final)
    inputs = ["input_ids", "attention_mask", "decoder_input_ids"]
    return chain.close(root, inputs, [final], root.classify, [root.classifier])


def _side(model: T5Model, workload: Workload) -> Side:
    options, width = workload.chosen(ParallelAdapters), model.config.d_model
    config = narrow(model.config, WIDTHS, HEADS, options.reduction)
    stacks = []
    for number, kept in enumerate(places(options, config.num_layers, config.num_decoder_layers)):
        config = copy.deepcopy(config)
        config.is_decoder = number == 1
        blocks = [T5Block(config, index == kept[0], layer_idx=index) for index in kept]
        norm = nn.Sequential(T5LayerNorm(config.d_model, config.layer_norm_epsilon), nn.Dropout(config.dropout_rate))
        stacks.append(SideStack(width, options, kept, blocks, norm))
    return Side(width, options, *stacks)


def _bias(chain: Chain, stack: str, ids: str, blocks: nn.ModuleList) -> None:
    """The local unit of a stack's position bias, which its first layer holds."""
    (first, *_) = blocks
    attention: T5Attention = first.get_submodule("layer.0.SelfAttention")

    def bias(ids: Tensor) -> Tensor:
        """[1, heads, tokens, tokens], the same for every row."""
        return attention.compute_bias(ids.shape[1], ids.shape[1])

    chain.local(f"{stack}.bias", "bias", [ids], bias, [attention.relative_attention_bias])


def _encoder_layer(chain: Chain, block: T5Block, hidden: str) -> str:
    attention, mlp = block.layer
    bias = "encoder.side.bias" if chain.is_aside else "encoder.bias"
    residual, x = _self_attention(chain, attention, mlp.layer_norm, hidden, "mask", bias)
    return _mlp(chain, mlp, residual, x)


def _decoder_layer(chain: Chain, block: T5Block, hidden: str, memories: Sequence[str], mask: str | None) -> str:
    """`memories`: what the encoder hands to the decoder, and to the side network's."""
    attention, cross, mlp = block.layer
    bias = "decoder.side.bias" if chain.is_aside else "decoder.bias"
    residual, x = _self_attention(chain, attention, cross.layer_norm, hidden, mask, bias)
    residual, x = _cross_attention(chain, cross, mlp.layer_norm, residual, x, memories[chain.is_aside])
    return _mlp(chain, mlp, residual, x)


def _embedding(chain: Chain, name: str, ids: str, model: T5Model, stack: T5Stack) -> str:
    def embed(ids: Tensor) -> Tensor:
        return stack.dropout(model.shared(ids))

    _bias(chain, name, ids, stack.block)
    (hidden,) = chain.unit("tokens", "embedding", [ids], ["hidden"], embed, [model.shared, stack.dropout])
    return hidden


def _self_attention(
    chain: Chain, sublayer: T5LayerSelfAttention, next_norm: T5LayerNorm, hidden: str, mask: str | None, bias: str
) -> tuple[str, str]:
    """Returns the residual stream and its norm."""
    inner = sublayer.SelfAttention

    def qkv(x: Tensor) -> tuple[Tensor, ...]:
        return inner.q(x), inner.k(x), inner.v(x)

    (x,) = chain.unit("attention-norm", "connective", [hidden], ["attention-in"], sublayer.layer_norm)
    q, k, v = chain.unit("qkv", "qkv", [x], ["q", "k", "v"], qkv, [inner.q, inner.k, inner.v])
    context = chain.attend(
        q,
        k,
        v,
        inner,
        head_dim=inner.key_value_proj_dim,
        scaling=inner.scaling,
        dropout=inner.dropout,
        mask=mask,
        bias=bias,
    )
    (x,) = chain.unit("projection", "projection", [context], ["projected"], inner.o)
    x = chain.adapter(x, "attention", inner.d_model)
    return _connective(chain, "attention", sublayer, next_norm, x, hidden)


def _cross_attention(
    chain: Chain, sublayer: T5LayerCrossAttention, next_norm: T5LayerNorm, residual: str, x: str, memory: str
) -> tuple[str, str]:
    """Attention of the decoder to the encoder's output. Returns the residual stream and its norm."""
    inner = sublayer.EncDecAttention

    def kv(x: Tensor) -> tuple[Tensor, ...]:
        return inner.k(x), inner.v(x)

    (q,) = chain.unit("cross-q", "q", [x], ["cross-q"], inner.q)
    k, v = chain.unit("cross-kv", "kv", [memory], ["cross-k", "cross-v"], kv, [inner.k, inner.v])
    context = chain.attend(
        q,
        k,
        v,
        inner,
        head_dim=inner.key_value_proj_dim,
        scaling=inner.scaling,
        dropout=inner.dropout,
        mask="mask",
        prefix="cross-",
    )
    (x,) = chain.unit("cross-projection", "projection", [context], ["cross-projected"], inner.o)
    return _connective(chain, "cross", sublayer, next_norm, x, residual)


def _connective(
    chain: Chain,
    name: str,
    sublayer: T5LayerSelfAttention | T5LayerCrossAttention,
    next_norm: T5LayerNorm,
    x: str,
    residual: str,
) -> tuple[str, str]:
    def add_and_norm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + sublayer.dropout(x)
        return total, next_norm(total)

    reads, writes = [x, residual], [f"{name}-out", f"{name}-normed"]
    total, normed = chain.unit(
        f"{name}-connective", "connective", reads, writes, add_and_norm, [sublayer.dropout, next_norm]
    )
    return total, normed


def _mlp(chain: Chain, sublayer: T5LayerFF, residual: str, x: str) -> str:
    inner = sublayer.DenseReluDense

    def mlp_in(x: Tensor) -> Tensor:
        return inner.dropout(inner.act(inner.wi(x)))

    def add(x: Tensor, residual: Tensor) -> Tensor:
        return residual + sublayer.dropout(x)

    (x,) = chain.unit("mlp-in", "mlp-in", [x], ["inner"], mlp_in, [inner.wi, inner.act, inner.dropout])
    (x,) = chain.unit("mlp-out", "mlp-out", [x], ["outer"], inner.wo)
    x = chain.adapter(x, "mlp", inner.wo.out_features)
    (hidden,) = chain.unit("mlp-connective", "connective", [x, residual], ["hidden"], add, [sublayer.dropout])
    return hidden


def _final_norm(chain: Chain, stack: T5Stack, hidden: str) -> str:
    def norm(x: Tensor) -> Tensor:
        return stack.dropout(stack.final_layer_norm(x))

    modules = [stack.final_layer_norm, stack.dropout]
    (normed,) = chain.unit("final-norm", "connective", [hidden], ["normed"], norm, modules)
    return normed
