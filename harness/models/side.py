"""Parallel adapters: a narrow network beside a frozen backbone (PAC, section 4).

a_0 = down_0(b_0), a_i = f_i(a_(i-1) + down_i(b_i)): b_i of [rows, tokens, width] is what layer i of the backbone hands
on, f_i a layer like it with every width divided by `REDUCTION`. The head reads up(a_L) + b_L. No gradient enters the
backbone, and it runs without dropout, so that what it hands on depends on the sample alone.

Where the paper is silent this follows the authors' timing code: the sum has no gate, every layer of both stacks of an
encoder-decoder has its own, and the side decoder attends to the side encoder's output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from harness.errors import Unsupported

if TYPE_CHECKING:
    from harness.models.chain import Chain

REDUCTION = 8


class SideStack(nn.Module):
    """The side network of one stack: a way down from the embedding and from each layer, and narrow layers.

    `norm` is what the family's stacks end with, if they do.
    """

    def __init__(self, width: int, layers: Sequence[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.downs = nn.ModuleList(nn.Linear(width, width // REDUCTION) for _ in range(len(layers) + 1))
        self.norm = norm


class Side(nn.Module):
    """All of it: a stack beside each of the backbone's, and the way up from the last."""

    def __init__(self, width: int, *stacks: SideStack) -> None:
        super().__init__()
        self.stacks = nn.ModuleList(stacks)
        self.up = nn.Linear(width // REDUCTION, width)

    def stack(self, number: int) -> SideStack:
        stack = self.stacks[number]
        assert isinstance(stack, SideStack)
        return stack

    def end(self, chain: Chain, number: int, state: str) -> str:
        """Append what the stack ends with. Returns the name of what it hands on."""
        norm = self.stack(number).norm
        if norm is None:
            return state
        with chain.aside():
            (state,) = chain.unit("final-norm", "connective", [state], ["normed"], norm)
        return state

    def leave(self, chain: Chain, state: str, hidden: str) -> str:
        """Append the end of the last stack and the way up. Returns the name of what the head reads."""

        def add(state: Tensor, hidden: Tensor) -> Tensor:
            merged: Tensor = self.up(state) + hidden
            return merged

        state = self.end(chain, len(self.stacks) - 1, state)
        with chain.aside():
            (merged,) = chain.unit("up", "side-up", [state, hidden], ["merged"], add, [self.up])
        return merged


def layers(
    chain: Chain,
    name: str,
    backbone: nn.ModuleList,
    hidden: str,
    append: Callable[[Any, str], str],
    side: Side | None,
    stack: int = 0,
) -> tuple[str, str]:
    """Append the layers `name.0`, `name.1` and so on, each followed by its side layer. `append` does it for one.

    Returns the names of the hidden state and of the side network's; both are the former without a side network.
    """
    beside = None if side is None else side.stack(stack)
    state = hidden if beside is None else _enter(chain, beside.downs[0], hidden)
    for index, layer in enumerate(backbone):
        chain.layer(f"{name}.{index}")
        hidden = append(layer, hidden)
        if beside is None:
            state = hidden
            continue
        state = _enter(chain, beside.downs[index + 1], hidden, state)
        with chain.aside():
            state = append(beside.layers[index], state)
    return hidden, state


def _enter(chain: Chain, down: nn.Module, hidden: str, *states: str) -> str:
    """Append the way down, added to the state so far. Returns the name of the new state."""

    def add(hidden: Tensor, *states: Tensor) -> Tensor:
        narrowed: Tensor = down(hidden)
        return states[0] + narrowed if states else narrowed

    with chain.aside():
        (state,) = chain.unit("down", "side-down", [hidden, *states], ["in"], add, [down])
    return state


def narrow(config: PreTrainedConfig, widths: Sequence[str]) -> PreTrainedConfig:
    """The configuration of a layer whose `widths` are divided by `REDUCTION`."""
    narrowed = copy.deepcopy(config)
    for name in widths:
        width = getattr(config, name)
        if width is None:  # a multiple of another one
            continue
        if width % REDUCTION:
            raise Unsupported(f"parallel adapters are {REDUCTION} times narrower, and {name} is {width}")
        setattr(narrowed, name, width // REDUCTION)
    return narrowed
