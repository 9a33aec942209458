"""Ring collectives as sends, receives and sums: the one expansion that validator, simulator and engine share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise, zip_longest

from harness.plan.actions import SHARED_AXES, Action, Collective, Combine, Recv, Send
from harness.plan.values import Range, Value


def chunks(width: int, parts: int) -> list[Range]:
    """Cut `width` elements into `parts` ranges whose sizes differ by at most one, the larger ones first."""
    size, larger = divmod(width, parts)
    edges = [part * size + min(part, larger) for part in range(parts + 1)]
    return list(pairwise(edges))


def share_ranges(collective: Collective, extent: int) -> list[Range]:
    """The range of each member, in ring order; an empty one for a member that has nothing."""
    if not collective.shares:
        return chunks(extent, len(collective.group))
    return list(pairwise(accumulate(collective.shares, initial=0)))


def broken_rule(collective: Collective, member: str, extent: int) -> str:
    """What is wrong with the collective as `member` has it, with `extent` elements along its axis; empty: nothing."""
    group, shares, value, result = collective.group, collective.shares, collective.value, collective.result
    if collective.axis not in SHARED_AXES:
        return f"the axis is {collective.axis!r}; allowed is {' or '.join(SHARED_AXES)}"
    if len(set(group)) < len(group):
        twice = next(name for name in group if group.count(name) > 1)
        return f"{twice} is in the group twice"
    if shares and (len(shares) != len(group) or min(shares) < 0 or sum(shares) != extent):
        return (
            f"the shares are {shares}; allowed is one of 0 or more elements for each of the {len(group)} members, "
            f"{extent} elements together, which is the {collective.axis} of {value.name}"
        )
    if collective.tiles < 1:
        return f"tiles is {collective.tiles}; allowed is 1 or more"
    mine = share_ranges(collective, extent)[group.index(member)]
    before, after = {"reduce-scatter": (None, mine), "all-gather": (mine, None)}.get(collective.kind, (None, None))
    axis = collective.axis
    held, made = value.part(axis, before, value.version), value.part(axis, after, result.version)
    if (value, result) != (held, made):
        return f"{collective.kind} makes {result} of {value}, and should make {made} of {held}"
    return ""


def expand(collective: Collective, member: str, extent: int) -> Iterator[Action]:
    """What `member` does for the collective on a tensor of `extent` elements along its axis.

    Chunk c is the share of member c. A ring reduce-scatter takes n-1 steps: in step s member r sends chunk f-s and
    receives chunk f-s-1 (mod n), to which it adds its own part; it ends with chunk f+1. A ring all-gather is the same
    without sums; it begins with chunk f on member r. A reduce-scatter has f = r-1, so that member r ends with chunk r;
    an all-gather has f = r; an all-reduce is a reduce-scatter with f = r, then an all-gather with f = r+1.

    Every chunk is cut into `tiles` pieces, as even as possible, and each step goes piece by piece, so that a piece
    travels while the one before it is summed. Empty pieces are neither sent nor summed. The bytes are those of one
    piece: all members together send (n-1) times the tensor, in an all-reduce twice that.

    Version -(s+1) of a piece is the sum of s+1 members' parts; version -n is complete. Sums are in place: in the
    memory of `value`, but for the last step of a reduce-scatter, whose sums are in the memory of what arrives, which
    becomes the result's. The final concatenation finds all pieces in place: it moves nothing.
    """
    group, value, kind = collective.group, collective.value, collective.kind
    n, rank = len(group), group.index(member)
    right, left = group[(rank + 1) % n], group[(rank - 1) % n]
    pieces = [_pieces(share, collective.tiles) for share in share_ranges(collective, extent)]

    def piece(tile: Range, version: int) -> Value:
        return value.part(collective.axis, tile, version)

    first = (rank - 1) % n if kind == "reduce-scatter" else rank
    parts = n if kind == "all-gather" else 1  # how many members' parts are in what this member begins with
    for tile in pieces[first]:
        yield Combine("slice", (piece(tile, value.version),), piece(tile, -parts), in_place=kind != "all-gather")
    if kind != "all-gather":
        for step in range(n - 1):
            last = kind == "reduce-scatter" and step == n - 2
            for sent, received in zip_longest(pieces[(first - step) % n], pieces[(first - step - 1) % n]):
                if sent is not None:
                    yield Send(piece(sent, -step - 1), right)
                if received is not None:
                    own, arrived = piece(received, value.version), piece(received, -step - 1)
                    yield Recv(arrived, left)
                    operands = (arrived, own) if last else (own, arrived)
                    yield Combine("sum", operands, piece(received, -step - 2), in_place=True)
        first = (first + 1) % n
    if kind != "reduce-scatter":
        for step in range(n - 1):
            for sent, received in zip_longest(pieces[(first - step) % n], pieces[(first - step - 1) % n]):
                if sent is not None:
                    yield Send(piece(sent, -n), right)
                if received is not None:
                    yield Recv(piece(received, -n), left)
    complete = pieces[rank : rank + 1] if kind == "reduce-scatter" else pieces
    yield Combine("concat", tuple(piece(t, -n) for tiles in complete for t in tiles), collective.result, in_place=True)


def _pieces(share: Range, tiles: int) -> list[Range]:
    """The tiles of a share, without empty ones."""
    low, high = share
    count = min(tiles, high - low)
    if count < 2:
        return [share] * count
    return [(low + first, low + last) for first, last in chunks(high - low, count)]
