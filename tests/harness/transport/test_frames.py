from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harness.transport import DTYPES, HEADER_BYTES, ITEM_BYTES, MAX_DIMENSIONS, Frame, TransportError
from harness.transport.frames import advance, flat, pack, unpack


@st.composite
def frames(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 60), max_size=MAX_DIMENSIONS)))
    return Frame(
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(-(2**31), 2**31 - 1)),
        draw(st.integers(0, 2**32 - 1)),
        dtype,
        shape,
        math.prod(shape) * ITEM_BYTES[dtype],
    )


GOOD = Frame(7, -1, 9, "bfloat16", (2, 3), 12)


@given(frames())
def test_unpack_is_the_inverse_of_pack(frame):
    header = pack(frame)
    assert len(header) == HEADER_BYTES
    assert unpack(header) == frame


def test_the_layout_is_the_documented_one():
    assert pack(GOOD).hex() == (
        "4f525259 01 03 02 00 00000007 ffffffff 00000009 000000000000000c 00000002 00000003" + "00000000" * 4
    ).replace(" ", "")


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_random_bytes_are_refused(header):
    with pytest.raises(TransportError):
        unpack(header)


@given(frames(), st.integers(0, HEADER_BYTES - 1), st.integers(0, 255))
@example(GOOD, 4, 2)
def test_a_changed_byte_is_refused_or_says_another_frame(frame, place, byte):
    header = bytearray(pack(frame))
    header[place] = byte
    try:
        changed = unpack(header)
    except TransportError:
        return
    assert pack(changed) == header


@pytest.mark.parametrize(
    ("place", "changed", "text"),
    [
        (0, b"HTTP", "begins with b'HTTP'"),
        (4, b"\2", "version 2 .* speaks version 1"),
        (5, b"\xff", "unknown type 255"),
        (6, b"\7", "damaged header"),
        (7, b"\1", "damaged header"),
        (27, b"\x0d", "bfloat16.2, 3. in 13 bytes, and that shape has 12"),
        (48, b"\0\0\0\1", "damaged header"),
    ],
)
def test_what_is_wrong_with_a_header_is_said(place, changed, text):
    header = bytearray(pack(GOOD))
    header[place : place + len(changed)] = changed
    with pytest.raises(TransportError, match=text):
        unpack(header)


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (GOOD._replace(dtype="complex64"), "complex64 can't be sent"),
        (GOOD._replace(shape=(1,) * 7), "7 dimensions"),
        (GOOD._replace(nbytes=11), "in 11 bytes, and that shape has 12 bytes"),
        (GOOD._replace(generation=2**32), "does not fit"),
        (GOOD._replace(tag=-1), "does not fit"),
        (Frame(0, 0, 0, "float64", (2**20, 2**20), 2**43), "no frame has more than"),
    ],
)
def test_what_no_header_can_say_is_refused(frame, text):
    with pytest.raises(TransportError, match=text):
        pack(frame)


@given(st.lists(st.integers(0, 9), max_size=6), st.data())
def test_advance_takes_bytes_off_the_front(sizes, data):
    numbers = iter(range(256))
    pieces = [memoryview(bytes(next(numbers) for _ in range(size))) for size in sizes]
    whole = b"".join(pieces)
    left = flat(pieces)
    taken = data.draw(st.integers(0, len(whole)))
    advance(left, taken)
    assert b"".join(left) == whole[taken:]
    assert all(len(piece) for piece in left)
