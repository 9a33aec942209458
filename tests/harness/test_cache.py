"""The activation cache: what went in comes out, or is made again, or the run ends and says why."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness import cache
from harness.cache import ActivationCache
from harness.entries import HEADER_BYTES, SEAL_BYTES
from harness.errors import OrreryError
from harness.manifest import KEY_BYTES

ROWS = torch.arange(24, dtype=torch.float32).reshape(4, 3, 2)


KEYS = [bytes([sample]) * KEY_BYTES for sample in range(10)]
IDENTITY = {"model": "bert-tiny", "backbone": "ab12"}
SLOT_BYTES = 24 + SEAL_BYTES


def opened(folder: Path, identity: Mapping[str, str] = IDENTITY, keys: Sequence[bytes] = KEYS) -> ActivationCache:
    return ActivationCache(folder, identity, keys)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[ActivationCache]:
    before = set(threading.enumerate())
    found = opened(tmp_path / "cache")
    yield found
    found.clear()
    assert not (tmp_path / "cache").exists() and set(threading.enumerate()) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rows_come_back_in_any_order_and_grouping(made: ActivationCache, dtype: torch.dtype) -> None:
    rows = ROWS.to(dtype)
    made.put("hidden", [7, 0, 3, 9], rows)
    made.put("other", [3], rows[:1, :1])
    assert torch.equal(made.get("hidden", [9, 7]), rows[[3, 0]])
    made.prefetch("hidden", [0, 3, 9])
    assert torch.equal(made.get("hidden", [0, 3, 9]), rows[[1, 2, 3]])
    assert torch.equal(made.get("other", [3]), rows[:1, :1])


def test_what_was_never_stored_is_not_made_up(made: ActivationCache) -> None:
    made.put("hidden", [1], ROWS[:1])
    for name, sample in (("hidden", 2), ("other", 1)):
        made.prefetch(name, [1, sample])
        with pytest.raises(OrreryError, match=f"has no {name} of sample {sample}: the plan loads what this device"):
            made.get(name, [1, sample])


@pytest.mark.parametrize("damage", ["changed", "truncated"])
def test_damaged_entries_are_made_again_or_end_the_run(made: ActivationCache, damage: str) -> None:
    made.put("hidden", [0, 1, 2, 3], ROWS)
    path = made.folder / "hidden.bin"
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[HEADER_BYTES + 2 * SLOT_BYTES + 5] ^= 1
    path.write_bytes(content[: HEADER_BYTES + 2 * SLOT_BYTES + 9] if damage == "truncated" else content)
    with pytest.raises(OrreryError, match=r"is damaged: hidden of sample 2 is not what was written. Run again"):
        made.get("hidden", [1, 2])
    asked = []

    def recompute(names: list[str], samples: list[int]) -> dict[str, torch.Tensor]:
        asked.append((names, samples))
        return {"hidden": ROWS[samples]}

    made.recompute = recompute
    assert torch.equal(made.get("hidden", [1, 2]), ROWS[1:3])
    assert (asked, made.recomputed) == ([(["hidden"], [2])], 1)
    made.recompute = None
    assert torch.equal(made.get("hidden", [2, 1]), ROWS[[2, 1]]), "it is mended on disk, too"


def test_the_disk_is_not_filled(made: ActivationCache, monkeypatch: pytest.MonkeyPatch) -> None:
    free = cache.RESERVE_BYTES + ROWS.nbytes
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    made.put("hidden", [0, 1, 2, 3], ROWS)
    more = torch.cat([ROWS, ROWS[:1]])
    with pytest.raises(OrreryError, match=r"needs 0.0 MiB more, and the disk of .* has 256 MiB, of which 256 are left"):
        made.put("hidden", [4, 5, 6, 7, 8], more)
    made.put("hidden", [0, 1, 2, 3, 4], more)  # four of which are there


def test_rows_of_another_shape_are_refused(made: ActivationCache) -> None:
    made.put("hidden", [0], ROWS[:1])
    with pytest.raises(OrreryError, match=r"has hidden as \[3, 2\] torch.float32, and is given \[2\] torch.float32"):
        made.put("hidden", [1], ROWS[:1, 0])
