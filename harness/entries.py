"""One tensor of an activation cache on disk: a header, then a slot for every sample, each sealed by a checksum.

A seal is the CRC-32 of the sample's key and its content, plus 1, in 8 bytes behind the content: 0 where nothing was
ever written (the file is sparse). Content and seal are one write; what a kill leaves of it fails the check.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

HEADER_BYTES = 4096
SEAL_BYTES = 8
ABSENT = 0
#: Of what was cut off: it was there, and is not intact any more.
LOST = 2**64 - 1


@dataclass(frozen=True)
class Layout:
    """What the header says: the shape and type of a sample's part, and the number of slots."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    slots: int

    @property
    def nbytes(self) -> int:
        """Of a sample's content."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def begin(self, slot: int) -> int:
        """Where a slot lies in the file; that of `slots` is the file's end."""
        return HEADER_BYTES + slot * (self.nbytes + SEAL_BYTES)

    def pack(self) -> bytes:
        about = {"shape": self.shape, "dtype": str(self.dtype).removeprefix("torch."), "slots": self.slots}
        return json.dumps(about).encode().ljust(HEADER_BYTES)

    @classmethod
    def unpack(cls, header: bytes) -> Layout | None:
        """None for what is no header."""
        try:
            about = json.loads(header)
            return cls(tuple(map(int, about["shape"])), getattr(torch, about["dtype"]), int(about["slots"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


class Entries:
    """The file of one tensor, open. `key` is what a sample is known by: with another one an entry is not intact.

    Raises OSError where the disk refuses.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        """Make the file. One that is there is damaged: what it had counts as lost."""
        damaged = path.exists()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.layout = layout
        os.ftruncate(self._descriptor, 0)
        if damaged:
            self._mend_length()
        else:
            self._write_header()

    @classmethod
    def open(cls, path: Path, slots: int) -> Entries | None:
        """The file, with room for so many slots at least; None if nothing of it can be made out."""
        found = cls.__new__(cls)
        found._descriptor = os.open(path, os.O_RDWR)
        layout = Layout.unpack(os.pread(found._descriptor, HEADER_BYTES, 0))
        if layout is None:
            found.close()
            return None
        found.layout = layout
        found._mend_length()
        if layout.slots < slots:
            found.layout = replace(layout, slots=slots)
            found._write_header()
        return found

    def write(self, slot: int, key: bytes, content: np.ndarray) -> None:
        """content: [nbytes] of bytes."""
        seal = _seal(key, content).to_bytes(SEAL_BYTES, "little")
        written = os.pwritev(self._descriptor, [content.data, seal], self.layout.begin(slot))
        if written != self.layout.nbytes + SEAL_BYTES:
            raise OSError(f"only {written} of {self.layout.nbytes + SEAL_BYTES} bytes were written")

    def holds(self, slot: int, key: bytes, content: np.ndarray) -> bool:
        """Whether just this was written there, as far as the seal says."""
        return self._seal_of(slot) == _seal(key, content)

    def absent(self, slot: int) -> bool:
        """Whether nothing was ever written there."""
        return self._seal_of(slot) == ABSENT

    def read(self, slot: int, key: bytes, content: np.ndarray) -> bool:
        """Fill `content`. Returns whether it is what was written."""
        seal = bytearray(SEAL_BYTES)
        read = os.preadv(self._descriptor, [content.data, seal], self.layout.begin(slot))
        if read != self.layout.nbytes + SEAL_BYTES:
            self._mend_length()
            return False
        return int.from_bytes(seal, "little") == _seal(key, content)

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def _seal_of(self, slot: int) -> int:
        found = os.pread(self._descriptor, SEAL_BYTES, self.layout.begin(slot) + self.layout.nbytes)
        return int.from_bytes(found, "little") if len(found) == SEAL_BYTES else LOST

    def _write_header(self) -> None:
        """The length first: a file is never shorter than its header says, unless somebody has cut it."""
        os.ftruncate(self._descriptor, self.layout.begin(self.layout.slots))
        os.pwrite(self._descriptor, self.layout.pack(), 0)

    def _mend_length(self) -> None:
        """What a file that is too short has lost is marked, so that it is not taken for what was never there."""
        record = self.layout.nbytes + SEAL_BYTES
        whole = max(0, os.fstat(self._descriptor).st_size - HEADER_BYTES) // record
        if whole >= self.layout.slots:
            return
        for slot in range(whole, self.layout.slots):
            os.pwrite(self._descriptor, LOST.to_bytes(SEAL_BYTES, "little"), self.layout.begin(slot + 1) - SEAL_BYTES)
        self._write_header()


def _seal(key: bytes, content: np.ndarray) -> int:
    return zlib.crc32(content.data, zlib.crc32(key)) + 1
