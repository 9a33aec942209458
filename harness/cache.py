"""The activation cache of a device: what a frozen backbone makes of each sample, on disk (PAC, section 5.1).

One file per tensor, with a place for every sample of the data set (the file is sparse). A background thread reads
ahead. What fails its checksum is never handed out: it is made again, or the run ends.
"""

from __future__ import annotations

import os
import shutil
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness.errors import OrreryError

#: Left to others on the disk.
RESERVE_BYTES = 256 * 2**20

#: Makes tensors of samples again: (names, sample ids) -> tensors by name, rows first.
Recompute = Callable[[Sequence[str], Sequence[int]], Mapping[str, Tensor]]


@dataclass
class _File:
    """One tensor's: a descriptor, the shape and type of a sample's part, and a checksum per sample; 0: not there."""

    descriptor: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    checksums: np.ndarray

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class ActivationCache:
    """Tensors by name and sample id. `put` and `get` are called by one thread.

    recompute: for entries that are damaged; without it they end the run. `recomputed` counts them.
    """

    def __init__(self, folder: Path, num_samples: int, recompute: Recompute | None = None) -> None:
        self.folder, self.num_samples, self.recompute = folder, num_samples, recompute
        self.recomputed = 0
        self._files: dict[str, _File] = {}
        self._ahead: dict[tuple[str, tuple[int, ...]], Future[Tensor]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="cache reading")
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, sample_ids: Sequence[int], rows: Tensor) -> None:
        """Keep one row per sample. Raises OrreryError before the disk is full."""
        rows = rows.detach().cpu().contiguous()
        file = self._file(name, tuple(rows.shape[1:]), rows.dtype)
        self._must_fit(rows.numel() * rows.itemsize)
        for sample, row in zip(sample_ids, rows, strict=True):
            content = row.reshape(-1).view(torch.uint8).numpy()
            try:
                written = os.pwrite(file.descriptor, content.data, sample * file.nbytes)
            except OSError as error:
                raise OrreryError(
                    f"The activation cache can't be written to {self.folder}: {error.strerror}."
                ) from error
            if written != file.nbytes:
                raise self._full(file.nbytes)
            file.checksums[sample] = _checksum(content)

    def get(self, name: str, sample_ids: Sequence[int]) -> Tensor:
        """One row per sample, read now or ahead. Raises OrreryError for what is not there, or damaged for good."""
        with self._lock:
            ahead = self._ahead.pop((name, tuple(sample_ids)), None)
        return self._read(name, sample_ids) if ahead is None else ahead.result()

    def prefetch(self, name: str, sample_ids: Sequence[int]) -> None:
        """Begin to read what `get` will be asked for. It stays in memory until then."""
        with self._lock:
            key = (name, tuple(sample_ids))
            if key not in self._ahead:
                self._ahead[key] = self._reader.submit(self._read, name, list(sample_ids))

    def close(self) -> None:
        """Idempotent. The files stay."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            os.close(file.descriptor)
        self._files.clear()

    def clear(self) -> None:
        """Close, and remove the files."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> _File:
        if name not in self._files:
            descriptor = os.open(self.folder / f"{name}.bin", os.O_RDWR | os.O_CREAT, 0o600)
            self._files[name] = _File(descriptor, shape, dtype, np.zeros(self.num_samples, dtype=np.uint64))
        file = self._files[name]
        if (file.shape, file.dtype) != (shape, dtype):
            raise OrreryError(
                f"The activation cache in {self.folder} has {name} as {list(file.shape)} {file.dtype}, and is given "
                f"{list(shape)} {dtype}."
            )
        return file

    def _must_fit(self, nbytes: int) -> None:
        if shutil.disk_usage(self.folder).free < nbytes + RESERVE_BYTES:
            raise self._full(nbytes)

    def _full(self, nbytes: int) -> OrreryError:
        free = shutil.disk_usage(self.folder).free
        return OrreryError(
            f"The activation cache needs {nbytes / 2**20:.1f} MiB more, and the disk of {self.folder} has "
            f"{free / 2**20:.0f} MiB, of which {RESERVE_BYTES / 2**20:.0f} are left alone. Choose another disk "
            "(TMPDIR), fewer samples, or a run without the cache."
        )

    def _read(self, name: str, sample_ids: Sequence[int]) -> Tensor:
        file = self._files.get(name)
        if file is None or any(file.checksums[sample] == 0 for sample in sample_ids):
            absent = [sample for sample in sample_ids if file is None or file.checksums[sample] == 0]
            raise OrreryError(
                f"The activation cache in {self.folder} has no {name} of sample {absent[0]}: the plan loads what this "
                "device has not stored."
            )
        rows = torch.empty((len(sample_ids), *file.shape), dtype=file.dtype)
        content = rows.view(len(sample_ids), -1).view(torch.uint8).numpy()
        damaged = []
        for place, sample in enumerate(sample_ids):
            read = os.preadv(file.descriptor, [content[place].data], sample * file.nbytes)
            if read != file.nbytes or _checksum(content[place]) != file.checksums[sample]:
                damaged.append(place)
        if damaged:
            self._mend(name, [sample_ids[place] for place in damaged], rows, damaged)
        return rows

    def _mend(self, name: str, sample_ids: Sequence[int], rows: Tensor, places: Sequence[int]) -> None:
        if self.recompute is None:
            raise OrreryError(
                f"The activation cache in {self.folder} is damaged: {name} of sample {sample_ids[0]} is not what was "
                "written. Run again."
            )
        made = self.recompute([name], sample_ids)[name]
        for place, row in zip(places, made, strict=True):
            rows[place] = row
        self.recomputed += len(sample_ids)
        self.put(name, sample_ids, made)


def _checksum(content: np.ndarray) -> int:
    """CRC-32 of the bytes, and never 0."""
    return zlib.crc32(content.data) + 1
