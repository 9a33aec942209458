"""How this process keeps memory that tensors have given back."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
#: The most that glibc takes.
NEVER, MOST_BYTES = 2**31 - 1, 32 * 2**20


def keep_freed_memory() -> None:
    """From now on freed memory stays with the process, for its next tensors.

    By default glibc returns what lies at the end of the heap, and the kernel clears each page of it again when the next
    iteration needs it: a layer then costs up to twice as much as another one just like it, by where its tensors happen
    to lie. Only on Linux with glibc; elsewhere nothing is done.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)
        libc.mallopt(M_MMAP_THRESHOLD, MOST_BYTES)
