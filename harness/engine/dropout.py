"""Dropout by key. A mask depends on seed, step, sample, unit and call, so every split of a batch draws the same masks.

The draws are numpy's SFC64, whose stream is promised never to change (NEP 19), and no generator of torch's:
`Tensor.bernoulli_` runs on MKL where torch has it, and draws other numbers where torch has none (aarch64), so that two
boards would disagree about one sample.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import SFC64
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from harness.errors import Unsupported

#: Elements drawn at once, an even number: the draws take little memory beside the noise, and stay in cache.
BLOCK = 1 << 16


class Cut(NamedTuple):
    """The elements [first, last) `of` so many."""

    first: int
    last: int
    of: int


class Part(NamedTuple):
    """Which tokens and heads a pass works on; None for all."""

    tokens: Cut | None = None
    heads: Cut | None = None


WHOLE = Part()


class KeyedDropout(TorchFunctionMode):
    """Replaces `functional.dropout` (and so `nn.Dropout`) in this thread, while samples are computed:

        masks = KeyedDropout(seed)
        with masks.samples(step, sample_ids):
            layered.run(first, last, values, entering=masks.enter)

    Dropout in eval mode or with p = 0 draws nothing. `unit` is the one that runs, `call` how often it has drawn.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.step = 0
        self.sample_ids: tuple[int, ...] = ()
        self.part = WHOLE
        self.unit: str | None = None
        self.call = 0

    @contextmanager
    def samples(self, step: int, sample_ids: Sequence[int], part: Part = WHOLE) -> Iterator[None]:
        """Tensors that are dropped out inside have these samples as their rows, in this order; and of each of them,
        where layers are shared, a part of its tokens or heads."""
        self.step, self.sample_ids, self.unit, self.part = step, tuple(sample_ids), None, part
        with self:
            yield

    def enter(self, unit: str) -> None:
        """The unit that runs next; its calls count from 0."""
        self.unit, self.call = unit, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.dropout:
            return self._dropout(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            self._refuse_fused(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """As ATen/native/Dropout.cpp does it on a CPU: times noise of the input's type and layout, 0 or 1 / (1 - p).

        Raises Unsupported for a tensor whose rows are not the samples.
        """
        if not training or not 0 < p < 1 or not input.numel():
            return functional.dropout(input, p, training, inplace)  # certain, or refused by torch
        assert self.unit is not None, "dropout outside of a unit: pass `entering=masks.enter` to Layered.run"
        rows = input.shape[0] if input.dim() else 0
        if rows != len(self.sample_ids):
            raise Unsupported(
                f"The unit {self.unit} drops out a tensor of shape {list(input.shape)} while {len(self.sample_ids)} "
                "samples are computed; masks are drawn sample by sample, so a tensor must have a row for each. "
                "Set dropout to 0."
            )
        keys = [f"{self.seed} {self.step} {sample} {self.call} {self.unit}" for sample in self.sample_ids]
        self.call += 1
        noise = _noise(input, keys, p, self.part)
        return input.mul_(noise) if inplace else input * noise

    def _refuse_fused(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, *args: Any, **kwargs: Any
    ) -> None:
        if dropout_p > 0:
            raise Unsupported(
                f"The unit {self.unit} draws its dropout (p = {dropout_p}) inside torch's fused attention, where no "
                "mask can be keyed by sample. Set attn_implementation to eager, or dropout to 0."
            )


def _noise(input: Tensor, keys: Sequence[str], p: float, part: Part) -> Tensor:
    """What `input`, [rows, tokens, width] or [rows, heads, tokens, tokens], is multiplied with, on its device.

    Of a part of it what the whole would be multiplied with there.
    """
    axes = {1: part.heads, 2: part.tokens} if input.dim() == 4 else {1: part.tokens}
    cuts = {axis: cut for axis, cut in axes.items() if cut is not None}
    shape = [cuts[axis].of if axis in cuts else size for axis, size in enumerate(input.shape)]
    stay = torch.from_numpy(kept(keys, math.prod(shape[1:]), p)).view(shape)
    for axis, cut in cuts.items():
        stay = stay.narrow(axis, cut.first, cut.last - cut.first)
    return torch.empty_like(input).copy_(stay.to(input.device)).div_(1 - p)


def kept(keys: Sequence[str], count: int, p: float) -> NDArray[np.bool_]:
    """[keys, count]: which elements stay, each with probability 1 - p (to 2^-33). The same on every machine."""
    limit = round((1 - p) * 2**32)
    stay = np.empty((len(keys), count), np.bool_)
    for key, row in zip(keys, stay, strict=True):
        seed: Any = _Seed(key)  # numpy's stubs know no seeds but its own
        bits = SFC64(seed)
        for first in range(0, count, BLOCK):
            block = row[first : first + BLOCK]
            draws = bits.random_raw((len(block) + 1) // 2).view(np.uint32)  # two in each 64 bits
            np.less(draws[: len(block)], limit, out=block)
    return stay


class _Seed(ISeedSequence):
    """The hash of a key as a generator's first state, for a tenth of the time of numpy's own SeedSequence."""

    def __init__(self, key: str) -> None:
        self.key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        size = n_words * np.dtype(dtype).itemsize
        return np.frombuffer(hashlib.blake2b(self.key.encode(), digest_size=size).digest(), dtype)
