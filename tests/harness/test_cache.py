"""The activation cache: what went in comes out, or is made again, or the run ends and says why."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import cache, datasets, entries, manifest, models
from harness.cache import ActivationCache
from harness.entries import HEADER_BYTES, SEAL_BYTES
from harness.errors import OrreryError
from harness.manifest import KEY_BYTES
from harness.models import shards
from harness.samples import Texts
from harness.workload import Workload

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


# A cache that is kept


def test_entries_outlive_the_process(tmp_path: Path) -> None:
    """By their samples' content: in another order of the data set, with others among them, twice the same."""
    with closing(opened(tmp_path)) as first:
        first.put("hidden", [7, 0, 3, 9], ROWS)
    keys = [b"new" + bytes(KEY_BYTES - 3), KEYS[3], KEYS[7], KEYS[3], KEYS[1]]
    with closing(opened(tmp_path, keys=keys)) as second:
        assert torch.equal(second.get("hidden", [1, 2, 3]), ROWS[[2, 0, 2]])
        assert second.absent("hidden", range(5)) == [0, 4] and second.absent("other", [1]) == [1]
        second.put("hidden", [0], ROWS[1:2] + 100)
    with closing(opened(tmp_path)) as third:
        assert torch.equal(third.get("hidden", [9, 0]), ROWS[[3, 1]])
        with pytest.raises(OrreryError, match=r"is used by another run\. Wait for it, or name another folder"):
            opened(tmp_path)


def test_what_is_there_is_not_written_again(made: ActivationCache, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    real = entries.Entries.write
    monkeypatch.setattr(
        entries.Entries, "write", lambda self, slot, *rest: written.append(slot) or real(self, slot, *rest)
    )
    made.put("hidden", [0, 1], ROWS[:2])
    made.put("hidden", [0, 1, 2], torch.cat([ROWS[:1], ROWS[:1], ROWS[2:3]]))
    assert written == [0, 1, 1, 2]
    assert torch.equal(made.get("hidden", [0, 1, 2]), ROWS[[0, 0, 2]])


@pytest.mark.parametrize(
    ("identity", "keys", "message"),
    [
        ({"model": "t5-tiny"}, KEYS, "of another model: bert-tiny there, t5-tiny in this run"),
        ({"backbone": "cd34"}, KEYS, "of another digest of the backbone's weights: ab12 there, cd34 in this run"),
        ({}, [bytes(KEY_BYTES)[:-1] + b"x"], "of other samples, by another tokenizer or of other data: it has 10 with"),
    ],
)
def test_a_cache_of_something_else_is_refused(
    identity: Mapping[str, str], keys: Sequence[bytes], message: str, tmp_path: Path
) -> None:
    opened(tmp_path).close()
    before = (tmp_path / manifest.NAME).read_bytes()
    with pytest.raises(OrreryError, match=message + ".* Name another folder with --cache-dir, or remove"):
        opened(tmp_path, {**IDENTITY, **identity}, keys)
    assert (tmp_path / manifest.NAME).read_bytes() == before


def test_a_cache_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as then:
        then.setattr(manifest, "FORMAT", 0)
        opened(tmp_path).close()
    with pytest.raises(OrreryError, match="of another version of the cache's format: 0 there, 1 in this run"):
        opened(tmp_path)


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "no object"])
def test_a_damaged_manifest_is_refused(damage: str, tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as kept:
        kept.put("hidden", [0], ROWS[:1])
    path = tmp_path / manifest.NAME
    text = path.read_text()
    damaged = {"changed": text.replace("0101", "0102", 1), "cut": text[:50], "no object": "[]"}
    path.unlink() if damage == "gone" else path.write_text(damaged[damage])
    with pytest.raises(
        OrreryError, match=r"The manifest of the activation cache in .* is damaged .* Name another folder"
    ):
        opened(tmp_path)


@pytest.mark.parametrize("damage", ["content", "seal", "half written", "cut", "header", "empty"])
def test_what_a_kill_or_a_disk_damages_is_made_again(damage: str, tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as kept:
        kept.put("hidden", [0, 1, 2, 3], ROWS)
    path = tmp_path / "hidden.bin"
    content, slot = bytearray(path.read_bytes()), HEADER_BYTES + 2 * SLOT_BYTES
    match damage:
        case "content" | "seal":
            content[slot + (5 if damage == "content" else 24)] ^= 1
        case "half written":
            content[slot : slot + 12] = bytes(12)
        case "cut":
            del content[slot + 9 :]
        case "header":
            content[0] ^= 1
        case _:
            content.clear()
    path.write_bytes(content)
    lost = {"cut": [2, 3], "header": [0, 1, 2, 3], "empty": [0, 1, 2, 3]}.get(damage, [2])
    for again in (False, True):  # what is made again is kept, and what was not needed yet is not forgotten
        with closing(opened(tmp_path)) as kept:
            kept.recompute = lambda names, samples: {"hidden": ROWS[list(samples)]}
            assert kept.absent("hidden", range(4)) == []
            assert torch.equal(kept.get("hidden", [1, 2]), ROWS[1:3])
            assert kept.recomputed == (0 if again else len({1, 2} & set(lost)))
            if again:
                assert torch.equal(kept.get("hidden", [0, 3]), ROWS[[0, 3]])
                assert kept.recomputed == len({0, 3} & set(lost))


def test_samples_are_known_by_what_the_model_reads() -> None:
    """Of the tokenizer's choice, of the padding: not of the label, nor of the place in the data set."""
    text = Workload("bert-tiny", "synthetic", num_samples=20, batch_size=8, seq_len=16)
    data = datasets.load(text)
    assert isinstance(data, Texts)
    keys = manifest.sample_keys(data, 20)
    assert len(set(keys)) == 20 and {len(key) for key in keys} == {KEY_BYTES}
    assert manifest.sample_keys(replace(data, labels=1 - data.labels), 20) == keys
    turned = replace(data, ids=data.ids.flip(0), types=data.types.flip(0), lengths=data.lengths.flip(0))
    assert manifest.sample_keys(turned, 20) == keys[::-1]
    for changed in (replace(data, ids=data.ids + 1), replace(data, lengths=data.lengths - 1)):
        assert not set(manifest.sample_keys(changed, 20)) & set(keys)


def test_a_backbone_is_known_by_its_frozen_weights(tmp_path: Path) -> None:
    side = Workload("bert-tiny", "synthetic", num_samples=8, batch_size=8, seq_len=16, technique="parallel-adapters")
    digests = []
    for number, changed in enumerate(({}, {"learning_rate": 1.0, "optimizer": "adamw"}, {"seed": 1})):
        shards.write(replace(side, **changed), tmp_path / f"{number}")
        digests.append(shards.frozen_digest(side, tmp_path / f"{number}"))
    tensors = load_file(tmp_path / "0")
    trained = {p.requires_grad: name for name, p in models.build(side).root.named_parameters()}
    for requires_grad, name in trained.items():
        save_file({**tensors, name: tensors[name] + 1}, tmp_path / "other")
        assert (shards.frozen_digest(side, tmp_path / "other") == digests[0]) == requires_grad, name
    assert digests[0] == digests[1] != digests[2]
