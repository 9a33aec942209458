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


def causal(decoder_input_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask of a decoder whose own tokens are never padding, for every row: [1, 1, tokens, tokens]."""
    return _additive(_triangle(decoder_input_ids), dtype)


def _triangle(tokens: Tensor) -> Tensor:
    position = torch.arange(tokens.shape[1], device=tokens.device)
    return position[None, None, None, :] <= position[None, None, :, None]


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(dtype).min)
