"""The ring collectives, executed by hand on integers."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.plan import Collective, Combine, Recv, Send, Value
from harness.plan.actions import COLLECTIVES
from harness.plan.collectives import chunks, expand, share_ranges

WHOLE = Value("g")


@given(st.integers(0, 200), st.integers(1, 12))
def test_chunks_tile_the_width_and_differ_by_at_most_one(width, parts):
    ranges = chunks(width, parts)
    assert [low for low, _ in ranges] + [width] == [0] + [high for _, high in ranges]
    sizes = [high - low for low, high in ranges]
    assert max(sizes) - min(sizes) <= 1


@st.composite
def rings(draw: st.DrawFn) -> tuple[str, tuple[int, ...], bool, int]:
    """A kind, the shares of its members, whether they are said, and the tiles."""
    kind, n = draw(st.sampled_from(COLLECTIVES)), draw(st.integers(1, 6))
    if draw(st.booleans()):
        return kind, tuple(draw(st.lists(st.integers(0, 7), min_size=n, max_size=n))), True, draw(st.integers(1, 4))
    shares = tuple(high - low for low, high in chunks(draw(st.integers(0, 40)), n))
    return kind, shares, False, draw(st.integers(1, 4))


@given(rings())
def test_every_member_ends_with_its_result_and_the_ring_sends_no_byte_too_many(ring):
    kind, shares, said, tiles = ring
    n, width = len(shares), sum(shares)
    group, cut = tuple(f"d{i}" for i in range(n)), list(pairwise(accumulate(shares, initial=0)))
    parts = np.arange(n * width).reshape(n, width) ** 2 + 1
    before = [WHOLE._replace(width=share if kind == "all-gather" else None) for share in cut]
    after = [WHOLE._replace(width=share if kind == "reduce-scatter" else None, version=1) for share in cut]
    held = [
        {value: parts[r, slice(*cut[r])].copy() if kind == "all-gather" else parts[r].copy()}
        for r, value in enumerate(before)
    ]
    members = [Collective(kind, before[r], after[r], group, shares if said else (), tiles) for r in range(n)]
    assert all(share_ranges(member, width) == cut for member in members)
    sent = run([list(expand(member, group[r], width)) for r, member in enumerate(members)], group, held)
    for r in range(n):
        wanted = np.concatenate([parts[m, low:high] for m, (low, high) in enumerate(cut)])
        wanted = wanted if kind == "all-gather" else parts.sum(0)[slice(*(after[r].width or (0, width)))]
        assert held[r][after[r]].tolist() == wanted.tolist()
        kept = {"reduce-scatter": [shares[r]], "all-gather": [shares[(r + 1) % n]]}.get(
            kind, [shares[(r + 1) % n], shares[(r + 2) % n]]
        )
        assert sent[r] == sum(width - share for share in kept)
    assert sum(sent) == (n - 1) * width * (2 if kind == "all-reduce" else 1)


def run(programs, group, held) -> list[int]:
    """Execute the programs on the arrays that the members hold; elements sent per member."""
    sent, position, mail = [0] * len(group), [0] * len(group), {}
    while any(at < len(program) for at, program in zip(position, programs, strict=True)):
        moved = False
        for rank, name in enumerate(group):
            while position[rank] < len(programs[rank]):
                action = programs[rank][position[rank]]
                if isinstance(action, Send):
                    data = read(held[rank], action.value)
                    assert data.size, "nothing is sent in vain"
                    assert mail.setdefault((name, action.peer, action.value), data.copy()) is not None
                    sent[rank] += data.size
                elif isinstance(action, Recv):
                    if (action.peer, name, action.value) not in mail:
                        break
                    held[rank][action.value] = mail.pop((action.peer, name, action.value))
                else:
                    combine(action, held[rank])
                position[rank] += 1
                moved = True
        assert moved, "the ring deadlocks"
    assert not mail
    return sent


def combine(action: Combine, held: dict[Value, np.ndarray]) -> None:
    """In place is in the very memory of the first value read."""
    operands = [read(held, value) for value in action.reads]
    if action.op == "concat":
        held[action.write] = np.concatenate([np.zeros(0, dtype=int), *operands])
        return
    target = operands[0] if action.in_place else operands[0].copy()
    for other in operands[1:]:
        target += other
    held[action.write] = target


def read(held: dict[Value, np.ndarray], value: Value) -> np.ndarray:
    """The array of a value, or a view of the one that it is a piece of."""
    if value in held:
        return held[value]
    whole, array = next((v, a) for v, a in held.items() if v.version == value.version and _within(value, v))
    low = 0 if whole.width is None else whole.width[0]
    return array[value.width[0] - low : value.width[1] - low]


def _within(piece: Value, whole: Value) -> bool:
    return whole.width is None or (whole.width[0] <= piece.width[0] and piece.width[1] <= whole.width[1])


def test_a_reduce_scatter_of_two_goes_tile_by_tile():
    """Member 1 sends chunk 0 and adds its own part to what arrives of chunk 1, in the memory of what arrives."""

    def piece(low: int, version: int) -> Value:
        return WHOLE._replace(width=(low, low + 1), version=-version)

    scatter = Collective("reduce-scatter", WHOLE, WHOLE._replace(width=(2, 4), version=1), ("a", "b"), tiles=2)
    assert list(expand(scatter, "b", 4)) == [
        Combine("slice", (piece(0, 0),), piece(0, 1), in_place=True),
        Combine("slice", (piece(1, 0),), piece(1, 1), in_place=True),
        Send(piece(0, 1), "a"),
        Recv(piece(2, 1), "a"),
        Combine("sum", (piece(2, 1), piece(2, 0)), piece(2, 2), in_place=True),
        Send(piece(1, 1), "a"),
        Recv(piece(3, 1), "a"),
        Combine("sum", (piece(3, 1), piece(3, 0)), piece(3, 2), in_place=True),
        Combine("concat", (piece(2, 2), piece(3, 2)), WHOLE._replace(width=(2, 4), version=1), in_place=True),
    ]


@pytest.mark.parametrize("tiles", [1, 3])
def test_members_without_a_share_pass_nothing_of_their_own_on(tiles):
    group = ("a", "b", "c")
    gather = Collective("all-gather", WHOLE._replace(width=(5, 5)), WHOLE._replace(version=1), group, (5, 0, 2), tiles)
    actions = list(expand(gather, "b", 7))
    sizes = [action.value.width[1] - action.value.width[0] for action in actions if isinstance(action, Send)]
    assert sum(sizes) == 5, "b sends on what a has, and c gets back nothing of its own"
    assert sum(isinstance(action, Combine) for action in actions) == 1
