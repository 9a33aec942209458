from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from harness import store
from harness.errors import OrreryError
from harness.records import Record, flat

MakeRecord = Callable[..., Record]


def test_save_and_load(tmp_path: Path, record: MakeRecord) -> None:
    saved = record(total_time_s=0.1)
    path = store.save(tmp_path, saved)
    assert path == tmp_path / "runs" / "0123456789abcdef.json"
    assert store.load(path) == saved
    assert store.load_all(tmp_path) == [saved]
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing else is left behind"


def test_a_trace_lies_beside_its_record_and_is_no_record(tmp_path: Path, record: MakeRecord) -> None:
    path = store.trace_path(tmp_path, "0123456789abcdef")
    assert path == tmp_path / "traces" / "0123456789abcdef.json"
    store.write_whole(path, lambda part: part.write_text("{}"))
    saved = record()
    store.save(tmp_path, saved)
    store.prepare(tmp_path)
    assert store.load_all(tmp_path) == [saved]


def test_same_record_same_bytes(tmp_path: Path, record: MakeRecord) -> None:
    first = store.save(tmp_path / "a", record(total_time_s=1 / 3)).read_bytes()
    assert store.save(tmp_path / "b", record(total_time_s=1 / 3)).read_bytes() == first


@pytest.mark.parametrize(("status", "done"), [("ok", True), ("oom", True), ("failed", False), ("unsupported", False)])
def test_results_are_finished_and_failures_are_not(tmp_path: Path, status: str, done: bool, record: MakeRecord) -> None:
    store.save(tmp_path, record(status=status))
    assert (store.finished(tmp_path, "0123456789abcdef") is not None) == done
    assert store.finished(tmp_path, "another") is None


def test_table_holds_the_flat_rows_in_both_formats(tmp_path: Path, record: MakeRecord) -> None:
    records = [record(model=model, total_time_s=2.0, provenance={"config_hash": model}) for model in ("b", "a")]
    for one in records:
        store.save(tmp_path, one)
    frame = store.table(tmp_path)
    assert list(frame["model"]) == ["a", "b"]
    for read in (pd.read_csv(tmp_path / "runs.csv"), pd.read_parquet(tmp_path / "runs.parquet")):
        assert list(read.columns) == list(flat(records[0]))
        assert list(read["provenance"]) == [flat(r)["provenance"] for r in reversed(records)]
        assert list(read["total_time_s"]) == [2.0, 2.0]


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: text.replace('"ok"', '"fine"')])
def test_corrupt_record_is_named_with_the_remedy(tmp_path: Path, damage: object, record: MakeRecord) -> None:
    path = store.save(tmp_path, record())
    path.write_text(damage(path.read_text()))
    for read in (lambda: store.load(path), lambda: store.table(tmp_path), lambda: store.finished(tmp_path, path.stem)):
        with pytest.raises(OrreryError, match=rf"{path}.*Delete the file") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_folder_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OrreryError, match=r"can't be written: .*--out"):
        store.prepare(tmp_path / "taken")


def test_full_disk_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("old")

    def write(part: Path) -> None:
        part.write_text("ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OrreryError, match="No space left on device"):
        store.write_whole(path, write)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("runs.csv", "old")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_truly_full_device_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(OrreryError, match="No space left on device"):
        store.write_whole(tmp_path / "x", lambda part: Path("/dev/full").write_bytes(b"x" * 10))
    assert list(tmp_path.iterdir()) == []


def test_no_results_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(OrreryError, match="There are no results in"):
        store.load_all(tmp_path / "nowhere")
