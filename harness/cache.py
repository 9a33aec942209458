"""The activation cache of a device: what a frozen backbone makes of each sample, on disk (PAC, section 5.1).

Entries are found by backbone and sample: the folder's manifest says of which backbone they are, and gives every sample
its slot by its content. One file per tensor. A background thread reads ahead. What fails its checksum is never handed
out: it is made again, or the run ends. All of it survives a kill at any moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from harness import manifest
from harness.entries import Entries, Layout
from harness.errors import OrreryError
from harness.manifest import Identity

#: Left to others on the disk.
RESERVE_BYTES = 256 * 2**20

#: Makes tensors of samples again: (names, sample ids) -> tensors by name, rows first.
Recompute = Callable[[Sequence[str], Sequence[int]], Mapping[str, Tensor]]


class ActivationCache:
    """Tensors by name and sample id. `put` and `get` are called by one thread.

    `identity` is the backbone's, `keys[i]` what sample i is known by (`harness.manifest`).
    recompute: for entries that are damaged; without it they end the run. `recomputed` counts them.
    Raises OrreryError for a folder whose cache is of something else, or in use.
    """

    def __init__(
        self, folder: Path, identity: Identity, keys: Sequence[bytes], recompute: Recompute | None = None
    ) -> None:
        self.folder, self.keys, self.recompute = folder, keys, recompute
        self.recomputed = 0
        self._entries: dict[str, Entries] = {}
        self._ahead: dict[tuple[str, tuple[int, ...]], Future[Tensor]] = {}
        self._lock, self._disk = threading.Lock(), threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = _locked(folder)
        try:
            self._slots = manifest.slots(folder, identity, keys)
        except BaseException:
            os.close(self._folder)
            raise
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="cache reading")
        self._closed = False

    def put(self, name: str, sample_ids: Sequence[int], rows: Tensor) -> None:
        """Keep one row per sample; what is there already is not written again. OrreryError before the disk is full."""
        self._write(name, sample_ids, rows, keep=True)

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

    def absent(self, name: str, sample_ids: Sequence[int]) -> list[int]:
        """The samples of which the tensor was never stored."""
        with self._disk:
            if name not in self._entries and not self._path(name).exists():
                return list(sample_ids)
            entries = self._open(name)
            return [s for s in sample_ids if entries is not None and entries.absent(self._slots[self.keys[s]])]

    def sync(self) -> None:
        """What was put is on disk, whatever happens to the machine."""
        with self._disk, self._writing():
            for entries in self._entries.values():
                entries.sync()

    def close(self) -> None:
        """Idempotent. The files stay."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        if self._closed:
            return
        self._closed = True
        for entries in self._entries.values():
            entries.close()
        os.close(self._folder)

    def clear(self) -> None:
        """Close, and remove the files."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _open(self, name: str) -> Entries | None:
        """The file of a tensor; None if there is none, or one of which nothing can be made out."""
        if name not in self._entries and self._path(name).exists():
            entries = Entries.open(self._path(name), len(self._slots))
            if entries is not None:
                self._entries[name] = entries
        return self._entries.get(name)

    def _file(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Entries:
        """The file of a tensor, made if there is none."""
        entries = self._open(name)
        if entries is None:
            entries = self._entries[name] = Entries(self._path(name), Layout(shape, dtype, len(self._slots)))
        layout = entries.layout
        if (layout.shape, layout.dtype) != (shape, dtype):
            raise OrreryError(
                f"The activation cache in {self.folder} has {name} as {list(layout.shape)} {layout.dtype}, and is "
                f"given {list(shape)} {dtype}."
            )
        return entries

    def _write(self, name: str, sample_ids: Sequence[int], rows: Tensor, keep: bool) -> None:
        """keep: entries whose seal says that they hold just this."""
        rows = rows.detach().cpu().contiguous()
        contents = rows.view(len(rows), -1).view(torch.uint8).numpy()
        with self._disk, self._writing():
            entries = self._file(name, tuple(rows.shape[1:]), rows.dtype)
            new = [
                (self._slots[key], key, content)
                for key, content in zip((self.keys[sample] for sample in sample_ids), contents, strict=True)
                if not (keep and entries.holds(self._slots[key], key, content))
            ]
        self._must_fit(len(new) * entries.layout.nbytes)
        for slot, key, content in new:
            with self._disk, self._writing():
                entries.write(slot, key, content)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OrreryError(
                f"The activation cache can't be written to {self.folder}: {error.strerror or error}."
            ) from error

    def _must_fit(self, nbytes: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if nbytes and free < nbytes + RESERVE_BYTES:
            raise OrreryError(
                f"The activation cache needs {nbytes / 2**20:.1f} MiB more, and the disk of {self.folder} has "
                f"{free / 2**20:.0f} MiB, of which {RESERVE_BYTES / 2**20:.0f} are left alone. Choose another disk "
                "(--cache-dir; without it TMPDIR), fewer samples, or a run without the cache."
            )

    def _read(self, name: str, sample_ids: Sequence[int]) -> Tensor:
        if absent := self.absent(name, sample_ids):
            raise OrreryError(
                f"The activation cache in {self.folder} has no {name} of sample {absent[0]}: the plan loads what this "
                "device has not stored."
            )
        with self._disk:
            entries = self._open(name)
        if entries is None:
            return self._again(name, sample_ids)
        layout = entries.layout
        rows = torch.empty((len(sample_ids), *layout.shape), dtype=layout.dtype)
        contents = rows.view(len(sample_ids), -1).view(torch.uint8).numpy()
        damaged = []
        for place, sample in enumerate(sample_ids):
            key = self.keys[sample]
            with self._disk:
                if not entries.read(self._slots[key], key, contents[place]):
                    damaged.append(place)
        if damaged:
            rows[damaged] = self._again(name, [sample_ids[place] for place in damaged])
        return rows

    def _again(self, name: str, sample_ids: Sequence[int]) -> Tensor:
        """Make damaged entries anew, and keep them."""
        if self.recompute is None:
            raise OrreryError(
                f"The activation cache in {self.folder} is damaged: {name} of sample {sample_ids[0]} is not what was "
                "written. Run again."
            )
        made = self.recompute([name], sample_ids)[name]
        self.recomputed += len(sample_ids)
        self._write(name, sample_ids, made, keep=False)
        return made


def _locked(folder: Path) -> int:
    """The folder's descriptor: as long as it is open, the folder is this process's."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OrreryError(
            f"The activation cache in {folder} is used by another run. Wait for it, or name another folder with "
            "--cache-dir."
        ) from None
    return descriptor
