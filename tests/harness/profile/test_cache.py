from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from harness.costs import Costs
from harness.profile import content_key, count, store
from tests.harness.profile.tiny import workload

LOAD = workload("bert-tiny")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "orrery" / "profiles"


def test_what_is_read_back_equals_what_was_counted(cache: Path) -> None:
    cold = count(LOAD)
    (path,) = cache.iterdir()
    written = path.stat().st_mtime_ns
    warm = count(LOAD)
    assert warm == cold
    assert repr(warm) == repr(cold)
    assert hash(warm) == hash(cold)
    assert path.stat().st_mtime_ns == written


def test_the_key_is_what_the_costs_of_a_row_depend_on(tmp_path: Path) -> None:
    same = replace(LOAD, dataset="mrpc", num_samples=9, batch_size=3, epochs=2, optimizer="adamw", seed=5)
    assert content_key(same) == content_key(LOAD)
    others = [
        replace(LOAD, seq_len=13),
        replace(LOAD, technique="inference"),
        replace(LOAD, model="gpt2-tiny"),
        replace(LOAD, dropout=0.0),
        replace(LOAD, num_labels=3),
        replace(LOAD, attn_implementation="sdpa"),
        replace(LOAD, dtype="bfloat16"),
    ]
    assert len({content_key(load) for load in (LOAD, *others)}) == len(others) + 1
    at_folder = replace(LOAD, checkpoint=str(tmp_path))
    keys = set()
    for layers in (2, 3):
        (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
        keys.add(content_key(at_folder))
    assert len(keys) == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "other number", "other shape", "not text"])
def test_a_damaged_entry_is_reported_counted_again_and_mended(cache: Path, damage: str) -> None:
    whole = count(LOAD)
    (path,) = cache.iterdir()
    text = path.read_text()
    flops = str(whole.units[2].forward.matmul.per_row)
    assert flops in text
    damaged = {
        "empty": b"",
        "cut": text[: len(text) // 2].encode(),
        "other number": text.replace(flops, "1" + flops, 1).encode(),
        "other shape": b"[1, 2]",
        "not text": b"\xff\xfe\x00",
    }
    path.write_bytes(damaged[damage])
    with pytest.warns(UserWarning, match=f"{path.name} can't be used"):
        assert count(LOAD) == whole
    assert path.read_text() == text


def test_without_a_folder_to_write_to_it_counts_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_the_way))
    with pytest.warns(UserWarning, match="can't be written.*Set XDG_CACHE_HOME"):
        costs = count(LOAD)
    assert isinstance(costs, Costs)
    assert in_the_way.read_text() == ""


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "entry.json").mkdir()
    with pytest.warns(UserWarning, match="can't be written"):
        store.write(tmp_path / "entry.json", {"key": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["entry.json"]


WARM = """
import sys, time
began = time.perf_counter()
from harness.profile import count
from harness.workload import Workload
costs = count(Workload("t5-large", "mrpc", 3668, 16))
print(len(costs.units), "torch" in sys.modules, time.perf_counter() - began)
"""


def test_a_warm_profile_of_t5_large_does_not_import_torch(cache: Path) -> None:
    units = len(count(replace(LOAD, model="t5-large", seq_len=128)).units)
    command = [sys.executable, "-c", WARM]
    root = Path(__file__).parents[3]
    warm = [subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.split() for _ in range(3)]
    assert [run[:2] for run in warm] == [[str(units), "False"]] * 3
    fastest = min(float(run[2]) for run in warm)
    print(f"t5-large, warm: {fastest:.2f} s")
    assert fastest < 1
