"""How fast a core of this machine computes at the moment: shared and virtual machines are not always the same."""

from __future__ import annotations

import time

import torch
from torch import nn

#: A layer like those of the models measured here: products of matrices, and as much that waits for memory.
ROWS, TOKENS, WIDTH, HEADS, INNER = 4, 128, 128, 2, 512
#: Products only, of a forward pass, and twice that for a backward pass.
FLOPS = 3 * 2 * ROWS * TOKENS * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER + 2 * TOKENS * WIDTH)
WARM_UP_S = 0.02


class Core:
    """A layer of a Transformer to be trained on this core, over and over. Draws no random number of torch's own."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            self._layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, dropout=0.0, batch_first=True)
            self._batch = torch.randn(ROWS, TOKENS, WIDTH)
        self.flops_per_s(WARM_UP_S)

    def flops_per_s(self, seconds: float) -> float:
        """FLOP/s of training passes in float32, for at least so long, with as many threads as torch has now."""
        began = time.perf_counter()
        passes, took = 0, 0.0
        while took < seconds:
            self._layer(self._batch).sum().backward()
            self._layer.zero_grad()
            passes, took = passes + 1, time.perf_counter() - began
        return passes * FLOPS / took
