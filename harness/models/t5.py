"""T5 with a linear classifier (Raffel et al., JMLR 2020). Norms precede the matrix products.

Each stack has one table of relative position biases, which all of its layers use.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor
from transformers import T5Model
from transformers.models.t5.modeling_t5 import (
    T5Attention,
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
from harness.workload import Workload

DROPOUTS = ("dropout_rate",)
NEEDS = {"is_gated_act": False}


def build(entry: ModelEntry, workload: Workload) -> Layered:
    model = pretrained.load(T5Model, entry, workload, DROPOUTS, NEEDS)
    root = EncoderDecoderClassifier(model)
    chain = Chain(workload)

    chain.layer("encoder.embedding")
    chain.local("mask", "mask", ["attention_mask"], partial(masks.padding, dtype=chain.dtype))
    hidden = _embedding(chain, "encoder", "input_ids", model, model.encoder)
    for index, block in enumerate(model.encoder.block):
        chain.layer(f"encoder.{index}")
        residual, x = _self_attention(chain, block.layer[0], block.layer[1].layer_norm, hidden, "mask", "encoder.bias")
        hidden = _mlp(chain, block.layer[1], residual, x)
    memory = _final_norm(chain, model.encoder, hidden)

    chain.layer("decoder.embedding")
    mask = None
    if workload.decoder_seq_len > 1:
        mask = "decoder.mask"
        chain.local(mask, "mask", ["decoder_input_ids"], partial(masks.causal, dtype=chain.dtype))
    hidden = _embedding(chain, "decoder", "decoder_input_ids", model, model.decoder)
    for index, block in enumerate(model.decoder.block):
        chain.layer(f"decoder.{index}")
        residual, x = _self_attention(chain, block.layer[0], block.layer[1].layer_norm, hidden, mask, "decoder.bias")
        residual, x = _cross_attention(chain, block.layer[1], block.layer[2].layer_norm, residual, x, memory)
        hidden = _mlp(chain, block.layer[2], residual, x)

    chain.layer("head")
    normed = _final_norm(chain, model.decoder, hidden)
    inputs = ["input_ids", "attention_mask", "decoder_input_ids"]
    return chain.close(root, inputs, [normed], root.classify, [root.classifier])


def _embedding(chain: Chain, stack_name: str, ids: str, model: T5Model, stack: T5Stack) -> str:
    attention: T5Attention = stack.block[0].layer[0].SelfAttention

    def bias(ids: Tensor) -> Tensor:
        """[1, heads, tokens, tokens], the same for every row."""
        return attention.compute_bias(ids.shape[1], ids.shape[1])

    def embed(ids: Tensor) -> Tensor:
        return stack.dropout(model.shared(ids))

    chain.local(f"{stack_name}.bias", "bias", [ids], bias, [attention.relative_attention_bias])
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
    (hidden,) = chain.unit("mlp-connective", "connective", [x, residual], ["hidden"], add, [sublayer.dropout])
    return hidden


def _final_norm(chain: Chain, stack: T5Stack, hidden: str) -> str:
    def norm(x: Tensor) -> Tensor:
        return stack.dropout(stack.final_layer_norm(x))

    modules = [stack.final_layer_norm, stack.dropout]
    (normed,) = chain.unit("final-norm", "connective", [hidden], ["normed"], norm, modules)
    return normed
