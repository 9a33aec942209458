"""The ring all-reduce, executed by hand on integers."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from harness.plan import Collective, Combine, Recv, Send, Value
from harness.plan.collectives import chunks, expand


@given(st.integers(0, 200), st.integers(1, 12))
def test_chunks_tile_the_width_and_differ_by_at_most_one(width, parts):
    ranges = chunks(width, parts)
    assert [low for low, _ in ranges] + [width] == [0] + [high for _, high in ranges]
    sizes = [high - low for low, high in ranges]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(2, 7), st.integers(0, 40))
def test_every_member_ends_with_the_sum_and_the_ring_sends_no_byte_too_many(n, width):
    group = tuple(f"d{i}" for i in range(n))
    parts = {name: np.arange(width) * (i + 1) + i for i, name in enumerate(group)}
    value = Value("g")
    programs = {
        name: list(expand(Collective("all-reduce", value, Value("g", version=1), group), name, width)) for name in group
    }
    held = {name: {value: parts[name]} for name in group}
    sent = Counter()
    mail: dict[tuple[str, str, Value], np.ndarray] = {}
    position = dict.fromkeys(group, 0)
    while any(position[name] < len(programs[name]) for name in group):
        moved = False
        for name in group:
            while position[name] < len(programs[name]):
                action = programs[name][position[name]]
                if isinstance(action, Send):
                    mail[name, action.peer, action.value] = held[name][action.value]
                    sent[name] += len(held[name][action.value])
                elif isinstance(action, Recv):
                    if (action.peer, name, action.value) not in mail:
                        break
                    held[name][action.value] = mail.pop((action.peer, name, action.value))
                else:
                    assert isinstance(action, Combine)
                    pieces = [_read(held[name], v) for v in action.reads]
                    joined = _COMBINE[action.op](pieces)
                    held[name][action.write] = joined
                position[name] += 1
                moved = True
        assert moved, "the ring deadlocks"
    assert not mail
    for name in group:
        assert np.array_equal(held[name][Value("g", version=1)], sum(parts.values()))
    assert sum(sent.values()) == 2 * (n - 1) * width
    if width % n == 0:
        assert set(sent.values()) <= {2 * (n - 1) * width // n}


_COMBINE = {
    "slice": lambda pieces: pieces[0],
    "sum": sum,
    "concat": lambda pieces: np.concatenate(pieces) if pieces else np.zeros(0, dtype=int),
}


def _read(held: dict[Value, np.ndarray], value: Value) -> np.ndarray:
    if value in held:
        return held[value]
    whole = held[value._replace(width=None)]
    return whole[value.width[0] : value.width[1]]
