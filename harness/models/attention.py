"""The attention core, as a function of q, k and v alone, so that any subset of heads can live on a device.

The number of heads is read off the tensors: q is [rows, q_tokens, heads * head_dim], k and v are
[rows, k_tokens, heads * head_dim]. Both cores do what transformers does, operation by operation.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class Core(Protocol):
    """softmax(q k^T scaling + bias + mask) v, in [rows, q_tokens, heads * head_dim].

    `mask` (additive, broadcast over heads) and `bias` (additive, [1, heads, q_tokens, k_tokens]) may be missing.
    `dropout` is the probability in force: 0 outside training.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        head_dim: int,
        scaling: float,
        dropout: float,
    ) -> Tensor: ...


def core(implementation: str, softmax_dtype: torch.dtype | None = None) -> Core:
    """The core called "eager" or "sdpa". The eager one takes its softmax in `softmax_dtype`, or in the scores' type."""
    return sdpa if implementation == "sdpa" else partial(eager, softmax_dtype=softmax_dtype)


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    head_dim: int,
    scaling: float,
    dropout: float,
    softmax_dtype: torch.dtype | None = None,
) -> Tensor:
    query, key, value = (_split_heads(x, head_dim) for x in (q, k, v))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores + mask
    probabilities = functional.softmax(scores, dim=-1, dtype=softmax_dtype).to(scores.dtype)
    probabilities = functional.dropout(probabilities, p=dropout)
    return _merge_heads(torch.matmul(probabilities, value))


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    head_dim: int,
    scaling: float,
    dropout: float,
) -> Tensor:
    query, key, value = (_split_heads(x, head_dim) for x in (q, k, v))
    if bias is not None:
        mask = bias.contiguous() if mask is None else bias + mask
    context = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return _merge_heads(context)


def _split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[rows, tokens, heads * head_dim] -> [rows, heads, tokens, head_dim], a view."""
    return x.view(*x.shape[:-1], -1, head_dim).transpose(1, 2)


def _merge_heads(x: Tensor) -> Tensor:
    """[rows, heads, tokens, head_dim] -> [rows, tokens, heads * head_dim], contiguous also for heads of one number."""
    return x.transpose(1, 2).flatten(2).contiguous()
