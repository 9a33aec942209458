"""The attention core takes any number of heads, and its masks hide what they say."""

from __future__ import annotations

import pytest
import torch

from harness.models import attention, masks

ROWS, TOKENS, HEADS, HEAD_DIM = 3, 7, 6, 4


def _qkv() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(ROWS, TOKENS, HEADS * HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_some_heads_alone_give_their_slice_of_all_heads(implementation, heads):
    core = attention.core(implementation)
    q, k, v = _qkv()
    bias = torch.randn(1, HEADS, TOKENS, TOKENS, dtype=torch.float64)
    mask = masks.padding((torch.arange(TOKENS) < torch.tensor([[7], [4], [2]])).long(), torch.float64)
    options = {"head_dim": HEAD_DIM, "scaling": 0.5, "dropout": 0.0}
    whole = core(q, k, v, mask, bias, **options)
    width = heads * HEAD_DIM
    part = core(*(x[..., :width] for x in (q, k, v)), mask, bias[:, :heads], **options)
    torch.testing.assert_close(part, whole[..., :width], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equals_the_sum_over_allowed_tokens(implementation):
    q, k, v = _qkv()
    lengths = [7, 4, 2]
    keep = (torch.arange(TOKENS) < torch.tensor(lengths)[:, None]).long()
    mask = masks.padding_and_causal(keep, torch.float64)
    out = attention.core(implementation)(q, k, v, mask, head_dim=HEAD_DIM, scaling=0.3, dropout=0.0)
    for row, length in enumerate(lengths):
        for token in range(TOKENS):
            for head in range(HEADS):
                part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
                last = min(token + 1, length)
                weights = torch.softmax(0.3 * (k[row, :last, part] @ q[row, token, part]), dim=0)
                torch.testing.assert_close(out[row, token, part], weights @ v[row, :last, part])


def test_a_causal_mask_needs_no_rows():
    ids = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    alone = masks.causal(ids, torch.float32)
    assert alone.shape == (1, 1, TOKENS, TOKENS)
    torch.testing.assert_close(alone.expand(ROWS, -1, -1, -1), masks.padding_and_causal(ids + 1, torch.float32))
