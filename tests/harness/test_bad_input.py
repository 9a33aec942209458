"""What users get wrong from the outside: each class of mistake, the words of the answer, and what stays untouched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import registry, runner, store
from harness.compare import compare
from harness.errors import Broken, OrreryError
from harness.experiment import Request, expand, one, read
from harness.plain import is_name, is_plain, plain
from harness.plan import serial
from harness.records import Record
from harness.workload import MOST_EPOCHS, Workload

ROOT = Path(__file__).resolve().parents[2]
TINY = {"model": "bert-tiny", "dataset": "mrpc", "steps": 4}
MakeRecord = Callable[..., Record]


def request(**changed: Any) -> Request:
    return one({**TINY, "method": "eddl", "testbed": "pac-nano-2", **changed}, {})


def method_file(folder: Path, body: str, options: str = "{}") -> str:
    path = folder / "mine.py"
    path.write_text(f"OPTIONS = {options}\ndef plan(workload, costs, cluster, options):\n    {body}\n")
    return str(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, value) for field in ("batch_size", "seq_len", "image_size", "epochs", "steps") for value in (-1, 0)),
        *(("num_samples", 10**19), ("seed", -1), ("seed", 2**63), ("learning_rate", 0.0), ("learning_rate", -1.0)),
        *(("learning_rate", float("nan")), ("learning_rate", float("inf"))),
        *(("clip_norm", value) for value in (0.0, -1.0, float("nan"), float("inf"))),
        *(("dropout", 1.0), ("dropout", -0.1), ("dropout", float("nan"))),
    ],
)
def test_numbers_out_of_range_are_named(field: str, value: float) -> None:
    asked: dict[str, Any] = {"model": "m", "dataset": "d", "num_samples": 64, "batch_size": 16, field: value}
    with pytest.raises(OrreryError, match=f"^{field} is {value}; it must be "):
        Workload(**asked)


def test_a_run_has_a_bounded_number_of_epochs_however_it_is_asked_for() -> None:
    shape: dict[str, Any] = {"model": "m", "dataset": "d", "num_samples": 20, "batch_size": 16}
    assert Workload(**shape, steps=2 * MOST_EPOCHS).total_samples == 20 * MOST_EPOCHS
    for key, length in (("steps", 2 * MOST_EPOCHS + 1), ("epochs", MOST_EPOCHS + 1)):
        with pytest.raises(OrreryError, match=f"{MOST_EPOCHS + 1} epochs long"):
            Workload(**{**shape, key: length})


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("workload", "learning_rate", float("nan"), "workload.learning_rate is nan"),
        ("workload", "model", "bert\ntiny", "none of them a control character"),
        ("run", "testbed", "\udcff.toml", "Unicode"),
        ("run", "plan", "a\0b.json", "none of them a control character"),
        ("run", "repeats", 0, "repeats is 0"),
        ("options", "eddl", {"shares": []}, "options.eddl.shares is an empty list"),
        ("options", "eddl", {"micro_batch_size": float("inf")}, "options.eddl.micro_batch_size is inf"),
        ("options", "eddl", {"micro_batch_size": {1, 2}}, "options.eddl.micro_batch_size is {1, 2}"),
    ],
)
def test_values_that_no_record_can_hold_are_refused(section: str, key: str, value: object, expected: str) -> None:
    tables: dict[str, dict[str, object]] = {
        "workload": dict(TINY),
        "run": {"testbed": "pac-nano-2"} if key == "plan" else {"method": "eddl", "testbed": "pac-nano-2"},
    }
    tables.setdefault(section, {})[key] = value
    with pytest.raises(OrreryError) as caught:
        expand(tables, "x.toml")
    assert expected in str(caught.value)


@pytest.mark.parametrize("text", ["a = " + "[" * 10_000, "a = " + "9" * 5_000])
def test_toml_beyond_the_parser_is_not_valid_toml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    for reader in (read, lambda path: registry.load_testbed(str(path))):
        with pytest.raises(OrreryError, match=r"x\.toml is not valid TOML"):
            reader(path)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"orrery_plan": 1', f'"orrery_plan": {"9" * 5_000}', "is not JSON"),
        ('"orrery_plan": 1', '"orrery_plan": true', "orrery_plan is true"),
        ('"method": "eddl"', '"method": "\\ud800"', "method is"),
        ('"method": "eddl"', '"method": "a\\nb"', "method is 'a\\nb'"),
        ('"micro_batch_size"', '"rate": NaN, "micro_batch_size"', "allowed is an object of finite numbers"),
    ],
)
def test_plan_files_hold_what_a_record_can_hold(tmp_path: Path, old: str, new: str, expected: str) -> None:
    text = serial.to_json(runner.make_plan(request())[1])
    assert old in text
    path = tmp_path / "plan.json"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(OrreryError) as caught:
        request(method=None, plan=str(path))
    assert expected in str(caught.value)


@pytest.mark.parametrize("options", ["{1: 2}", "{'a': {1, 2}}", "{'a': float('nan')}"])
def test_defaults_that_no_record_can_hold_make_no_method(tmp_path: Path, options: str) -> None:
    with pytest.raises(OrreryError, match="OPTIONS holds"):
        registry.load_method(method_file(tmp_path, "return None", options))


def test_a_method_that_exits_is_broken_and_ends_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(OrreryError, match="can't be imported: SystemExit: 0"):
        registry.load_method(str(path))
    asked = request(method=method_file(tmp_path, "raise SystemExit(0)"))
    with pytest.raises(Broken, match=r"SystemExit: 0 \(.*mine\.py, line 3\)"):
        runner.make_plan(asked)
    record = runner.run(asked)
    assert record.status == "failed" and record.provenance.traceback and "mine.py" in record.provenance.traceback


def test_a_plan_that_is_none_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(OrreryError, match=r"gave None as its plan.*must return a harness\.plan\.Plan"):
        runner.run(request(method=method_file(tmp_path, "return None")))


def test_a_plan_too_malformed_to_be_checked_is_a_failed_row(tmp_path: Path) -> None:
    body = "from harness.plan import Plan; return Plan('x', len(costs.units), {}, ())"
    record = runner.run(request(method=method_file(tmp_path, body)))
    assert record.status == "failed" and record.reason and "too malformed to be checked: IndexError" in record.reason


def test_a_method_neither_prints_into_the_result_nor_changes_the_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = "print('hello'); options['a'].append(2); raise ValueError('\\udc80')"
    asked = request(method=method_file(tmp_path, body, "{'a': [1]}"))
    before = asked.config_hash
    record = runner.run(asked)
    assert asked.config_hash == before and record.method_options == {"a": [1]}
    out, err = capsys.readouterr()
    assert (out, err) == ("", "hello\n")
    assert store.load(store.save(tmp_path, record)) == record, "a lone surrogate in the reason is no obstacle"


def test_a_training_that_diverges_is_a_failed_row(tmp_path: Path) -> None:
    asked = {"testbed": "local-1", "mode": "emulated", "method": "standalone", "learning_rate": 1e30, "batch_size": 2}
    record = runner.run(request(**{**asked, "dataset": "synthetic", "seq_len": 8, "steps": 3}))
    assert record.status == "failed" and record.reason and "loss is nan" in record.reason


def test_records_are_read_before_anything_is_run(tmp_path: Path) -> None:
    (outcome,) = runner.sweep([request()], tmp_path)
    path = store.run_path(tmp_path, outcome.record.provenance.config_hash)
    newer = {**json.loads(path.read_text()), "schema_version": 99}
    path.write_text(json.dumps(newer))
    other = request(batch_size=8)
    with pytest.raises(OrreryError, match="version 99 of the schema"):
        list(runner.sweep([other], tmp_path))
    assert list(path.parent.iterdir()) == [path], "nothing was run"
    assert [o.record.status for o in runner.sweep([request()], tmp_path, force=True)] == ["ok"], "it is overwritten"


def test_two_answers_to_one_question_are_not_compared(record: MakeRecord) -> None:
    twice = [record(total_time_s=1.0), record(total_time_s=2.0)]
    with pytest.raises(OrreryError, match="A holds two answers to one question"):
        compare(twice, [record(method="gpipe"), record()])


def test_plain_values() -> None:
    assert plain({"a": (1, "\ud800")}) == {"a": [1, "?"]}
    assert all(map(is_plain, (None, True, 1, 0.5, "ü", [1, {"a": "b"}])))
    assert not any(map(is_plain, ({1}, object(), float("nan"), [float("inf")], "\ud800", b"")))
    assert is_name("a b ü") and not any(map(is_name, ("", "a\nb", "\0", "\udcff")))


@pytest.mark.parametrize(
    ("redirection", "code", "said"), [(">/dev/full", 2, "No space left"), (">&-", 0, ""), ("2>&-", 0, "bert-tiny")]
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_streams_that_are_full_or_closed(tmp_path: Path, redirection: str, code: int, said: str) -> None:
    command = f"{sys.executable} -m harness list models {redirection}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code and "Traceback" not in done.stderr
    assert said in done.stdout + done.stderr
