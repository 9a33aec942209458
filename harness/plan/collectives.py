"""Ring collectives as sends, receives and sums: the one expansion that validator, simulator and engine share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from harness.plan.actions import Action, Collective, Combine, Recv, Send
from harness.plan.values import Range, Value


def chunks(width: int, parts: int) -> list[Range]:
    """Cut `width` elements into `parts` ranges whose sizes differ by at most one, the larger ones first."""
    size, larger = divmod(width, parts)
    edges = [part * size + min(part, larger) for part in range(parts + 1)]
    return list(pairwise(edges))


def expand(collective: Collective, member: str, width: int) -> Iterator[Action]:
    """What `member` does for the collective on a tensor of `width` elements.

    Ring all-reduce: a reduce-scatter of n-1 steps, then an all-gather of n-1 steps. In step s member r sends chunk
    r-s and receives chunk r-s-1 (mod n). All members together send 2 (n-1) times the tensor.
    Version -(s+1) of a chunk is the sum of s+1 members' parts; version -n is complete.
    """
    group, value = collective.group, collective.value
    n, rank = len(group), group.index(member)
    right, left = group[(rank + 1) % n], group[(rank - 1) % n]
    ranges = chunks(width, n)

    def partial(chunk: int, parts: int) -> Value:
        return Value(value.name, value.micro_batch, value.rows, value.tokens, ranges[chunk], -parts)

    def own(chunk: int) -> Value:
        return Value(value.name, value.micro_batch, value.rows, value.tokens, ranges[chunk], value.version)

    filled = [low < high for low, high in ranges]  # a tensor may have fewer elements than the ring members
    if filled[rank]:
        yield Combine("slice", (own(rank),), partial(rank, 1), in_place=True)
    for step in range(n - 1):
        sent, received = (rank - step) % n, (rank - step - 1) % n
        if filled[sent]:
            yield Send(partial(sent, step + 1), right)
        if filled[received]:
            arrived = partial(received, step + 1)
            yield Recv(arrived, left)
            yield Combine("sum", (own(received), arrived), partial(received, step + 2), in_place=True)
    for step in range(n - 1):
        sent, received = (rank + 1 - step) % n, (rank - step) % n
        if filled[sent]:
            yield Send(partial(sent, n), right)
        if filled[received]:
            yield Recv(partial(received, n), left)
    complete = tuple(partial(chunk, n) for chunk in range(n) if filled[chunk])
    yield Combine("concat", complete, collective.result, in_place=True)
