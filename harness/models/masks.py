"""Additive attention masks: 0 where a token may be looked at, the lowest number of the type where not.

Every device computes them from its own copy of the batch, so they never cross a link.
"""

from __future__ import annotations

import torch
from torch import Tensor


def padding(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, k_tokens] of 0 and 1 -> [rows, 1, 1, k_tokens]."""
    return _additive(attention_mask[:, None, None, :] != 0, dtype)


def padding_and_causal(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask of a decoder-only model: [rows, tokens] of 0 and 1 -> [rows, 1, tokens, tokens]."""
    allowed = attention_mask[:, None, None, :] != 0
    return _additive(allowed & _triangle(attention_mask), dtype)


def with_cache(attention_mask: Tensor, cache_position: Tensor, to_come: int, dtype: torch.dtype) -> Tensor:
    """The mask of tokens after a prompt [rows, prompt], in a cache with room for so many `to_come`.

    cache_position: [tokens], the places of the tokens -> [rows, 1, tokens, prompt + to_come].
    """
    rows, prompt = attention_mask.shape
    allowed = torch.cat([attention_mask, attention_mask.new_ones(rows, to_come)], 1)[:, None, None, :] != 0
    place = torch.arange(prompt + to_come, device=attention_mask.device)
    return _additive(allowed & (place <= cache_position[:, None]), dtype)


def positions(attention_mask: Tensor, cache_position: Tensor | None = None) -> Tensor:
    """Positions that count what is no padding: of a prompt [rows, prompt], or of the tokens at `cache_position` in it
    or after it."""
    prompt = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return prompt if cache_position is None else prompt[:, -1:] + cache_position - (attention_mask.shape[1] - 1)


def causal(decoder_input_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask of a decoder whose own tokens are never padding, for every row: [1, 1, tokens, tokens]."""
    return _additive(_triangle(decoder_input_ids), dtype)


def _triangle(tokens: Tensor) -> Tensor:
    position = torch.arange(tokens.shape[1], device=tokens.device)
    return position[None, None, None, :] <= position[None, None, :, None]


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(dtype).min)
