"""Frames: a header of fixed size that says what the bytes behind it are. All numbers in network byte order.

    magic 4s | version u8 | dtype u8 | dimensions u8 | zero u8 | generation u32 | iteration i32 | tag u32 | bytes u64
    | 6 x extent u32 (unused ones zero)

A header has one spelling only: whatever `unpack` accepts, `pack` gives back byte by byte.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

MAGIC = b"ORRY"
VERSION = 1
MAX_DIMENSIONS = 6
#: More than any device holds. Nothing is allocated for a frame here: whoever admits it knows the size it expects.
MAX_BYTES = 2**40

#: Bytes of an element. The place in this table is the code on the wire.
ITEM_BYTES = {
    "float32": 4,
    "float64": 8,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
DTYPES = tuple(ITEM_BYTES)

_HEADER = struct.Struct(f"!4sBBBBIiIQ{MAX_DIMENSIONS}I")
HEADER_BYTES = _HEADER.size


class TransportError(Exception):
    """What came over the wire is not what was expected. The message names both devices."""


class PeerLost(TransportError):
    """A connection ended: closed, reset or timed out. The cause lies elsewhere, mostly on the device that is named."""


class Frame(NamedTuple):
    """What a header says about the bytes that follow it."""

    generation: int
    iteration: int
    tag: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def __str__(self) -> str:
        extents = ", ".join(map(str, self.shape))
        return f"tag {self.tag} of iteration {self.iteration}, {self.dtype}[{extents}] in {self.nbytes} bytes"


def pack(frame: Frame) -> bytes:
    """The header of `frame`, `HEADER_BYTES` long. Raises TransportError for a frame that no header can say."""
    _check(frame)
    extents = (*frame.shape, *(0,) * (MAX_DIMENSIONS - len(frame.shape)))
    try:
        return _HEADER.pack(
            MAGIC,
            VERSION,
            DTYPES.index(frame.dtype),
            len(frame.shape),
            0,
            frame.generation,
            frame.iteration,
            frame.tag,
            frame.nbytes,
            *extents,
        )
    except struct.error as error:
        raise TransportError(f"a number does not fit into the header of {frame}: {error}") from error


def unpack(header: bytes | bytearray) -> Frame:
    """The frame that `header` announces. Raises TransportError for whatever `pack` would not have written."""
    if len(header) != HEADER_BYTES:
        raise TransportError(f"a header of {len(header)} bytes came, and it has {HEADER_BYTES}")
    magic, version, code, dimensions, zero, generation, iteration, tag, nbytes, *extents = _HEADER.unpack(header)
    if magic != MAGIC:
        raise TransportError(f"what came is no frame: it begins with {magic!r}, and a frame begins with {MAGIC!r}")
    if version != VERSION:
        raise TransportError(f"a frame of version {version} of the wire came, and this side speaks version {VERSION}")
    if code >= len(DTYPES):
        raise TransportError(f"a frame of the unknown type {code} came, and types run from 0 to {len(DTYPES) - 1}")
    if dimensions > MAX_DIMENSIONS or zero or any(extents[dimensions:]):
        raise TransportError(f"a damaged header came: {bytes(header).hex()}")
    frame = Frame(generation, iteration, tag, DTYPES[code], tuple(extents[:dimensions]), nbytes)
    _check(frame)
    return frame


def _check(frame: Frame) -> None:
    if frame.dtype not in ITEM_BYTES:
        raise TransportError(f"{frame.dtype} can't be sent; what can: {', '.join(DTYPES)}")
    if len(frame.shape) > MAX_DIMENSIONS:
        raise TransportError(f"{frame} has {len(frame.shape)} dimensions, and a frame has at most {MAX_DIMENSIONS}")
    expected = math.prod(frame.shape) * ITEM_BYTES[frame.dtype]
    if frame.nbytes != expected:
        raise TransportError(f"a frame is announced as {frame}, and that shape has {expected} bytes")
    if frame.nbytes > MAX_BYTES:
        raise TransportError(f"a frame is announced as {frame}, and no frame has more than {MAX_BYTES} bytes")


def flat(pieces: Sequence[memoryview]) -> list[memoryview]:
    """`pieces` as bytes, without the empty ones. They must be contiguous (TypeError)."""
    return [piece.cast("B") for piece in pieces if piece.nbytes]


def advance(pieces: list[memoryview], num_bytes: int) -> None:
    """Take `num_bytes` off the front of `pieces`."""
    whole = 0
    for piece in pieces:
        if num_bytes < len(piece):
            break
        num_bytes -= len(piece)
        whole += 1
    del pieces[:whole]
    if num_bytes:
        pieces[0] = pieces[0][num_bytes:]
