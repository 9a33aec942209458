"""Parallel adapters: a narrow network beside a frozen backbone (PAC, section 4).

a_0 = down_0(b_0), a_i = f_i(a_(i-1) + down_i(b_i)): b_i of [rows, tokens, width] is what layer i of the backbone hands
on, f_i a layer like it with every width divided by the technique's `reduction`. The head reads up(a_L) + b_L. No
gradient enters the backbone, and it runs without dropout, so that what it hands on depends on the sample alone.

Where the paper is silent the defaults follow the authors' timing code: the sum has no gate, every layer of both stacks
of an encoder-decoder has its own, and the side decoder attends to the side encoder's output. Options are what their
accuracy code does, as LST does (Sung et al., NeurIPS 2022): a gate, layers of the backbone without a side layer, past
which the side network's state just goes, and weights pruned from the backbone's (see `harness.models.pruning`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from harness.errors import Unsupported
from harness.techniques import ParallelAdapters

if TYPE_CHECKING:
    from harness.models.chain import Chain

#: The temperature of gates, LST's.
TEMPERATURE = 0.1


class Gate(nn.Module):
    """g x state + (1 - g) x entering, g = sigmoid(alpha / T): one number that is learnt, and 1/2 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, state: Tensor, entering: Tensor) -> Tensor:
        g = torch.sigmoid(self.alpha / TEMPERATURE)
        mixed: Tensor = g * state + (1 - g) * entering
        return mixed


class SideStack(nn.Module):
    """The side network of one stack: narrow layers, and a way down from the embedding and to each of them.

    `places`: the number of the backbone's layer that each is beside. `norm` is what the family's stacks end with, if
    they do.
    """

    def __init__(
        self,
        width: int,
        options: ParallelAdapters,
        places: Sequence[int],
        layers: Sequence[nn.Module],
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.places = list(places)
        self.layers = nn.ModuleList(layers)
        self.downs = nn.ModuleList(nn.Linear(width, width // options.reduction) for _ in range(len(layers) + 1))
        self.gates = nn.ModuleList(Gate() for _ in layers) if options.gate else None
        self.norm = norm


class Side(nn.Module):
    """All of it: a stack beside each of the backbone's, and the way up from the last."""

    def __init__(self, width: int, options: ParallelAdapters, *stacks: SideStack) -> None:
        super().__init__()
        self.stacks = nn.ModuleList(stacks)
        self.up = nn.Linear(width // options.reduction, width)

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
    state = hidden if beside is None else _enter(chain, hidden, beside.downs[0])
    for index, layer in enumerate(backbone):
        chain.layer(f"{name}.{index}")
        hidden = append(layer, hidden)
        if beside is None:
            state = hidden
        elif index in beside.places:
            number = beside.places.index(index)
            gate = None if beside.gates is None else beside.gates[number]
            state = _enter(chain, hidden, beside.downs[number + 1], state, gate)
            with chain.aside():
                state = append(beside.layers[number], state)
    return hidden, state


def _enter(chain: Chain, hidden: str, down: nn.Module, state: str | None = None, gate: nn.Module | None = None) -> str:
    """Append the way down, joined with the state so far. Returns the name of the new state."""

    def enter(hidden: Tensor, *states: Tensor) -> Tensor:
        narrowed: Tensor = down(hidden)
        if not states:
            return narrowed
        joined: Tensor = states[0] + narrowed if gate is None else gate(states[0], narrowed)
        return joined

    reads = [hidden] if state is None else [hidden, state]
    with chain.aside():
        (entered,) = chain.unit("down", "side-down", reads, ["in"], enter, [down] if gate is None else [down, gate])
    return entered


def places(options: ParallelAdapters, *num_layers: int) -> list[list[int]]:
    """Of each stack, which has so many layers, those that have one beside them."""
    dropped = options.dropped_layers
    if dropped and dropped[-1] >= max(num_layers):
        last = max(num_layers) - 1
        raise Unsupported(f"parallel-adapters.dropped names layer {dropped[-1]}, and the model's last one is {last}")
    kept = [[layer for layer in range(count) if layer not in dropped] for count in num_layers]
    if not all(kept):
        raise Unsupported("parallel-adapters.dropped names all layers of a stack: nothing would be beside it")
    return kept


def narrow(config: PreTrainedConfig, widths: Sequence[str], heads: Sequence[str], reduction: int) -> PreTrainedConfig:
    """The configuration of a layer whose `widths` are divided; what the first is must do for each number of `heads`."""
    narrowed = copy.deepcopy(config)
    for name in widths:
        width = getattr(config, name)
        if width is None:  # a multiple of another one
            continue
        if width % reduction:
            raise Unsupported(f"parallel adapters are {reduction} times narrower, and {name} is {width}")
        setattr(narrowed, name, width // reduction)
    for name in heads:
        if getattr(narrowed, widths[0]) % getattr(config, name):
            raise Unsupported(
                f"parallel adapters are {reduction} times narrower, and {name} is {getattr(config, name)}: "
                f"a {widths[0]} of {getattr(narrowed, widths[0])} is no multiple of that"
            )
    return narrowed
