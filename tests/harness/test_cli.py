from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from harness import doctor, models, registry, store
from harness.cli import app
from harness.picture import METADATA
from harness.records import Record

ROOT = Path(__file__).resolve().parents[2]
TINY = "--model bert-tiny --dataset mrpc --steps 4"


class Result:
    """What a call printed, and its exit code. Nothing but typer's own exits may be raised."""

    def __init__(self, command: str) -> None:
        result = CliRunner().invoke(app, command.split())
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every call runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(listing: str) -> list[str]:
    return [line.split()[0] for line in listing.splitlines()]


def test_list_shows_names_with_a_line_about_each() -> None:
    assert names(Result("list models").out) == models.names()
    assert {"standalone", "eddl", "gpipe", "pipedream-1f1b"} <= set(names(Result("list baselines").out))
    assert {"pac-nano-4", "demo-hetero-3", "local-1"} <= set(names(Result("list testbeds").out))
    assert {"mrpc", "digits"} <= set(names(Result("list datasets").out))
    assert "jetson-nano-10w" in names(Result("list devices").out)
    assert "pac-techniques" in names(Result("list experiments").out)
    for kind in ("baselines", "testbeds", "datasets", "models", "devices", "experiments"):
        assert all(len(line.split()) > 1 for line in Result(f"list {kind}").out.splitlines())


def test_list_check_finds_the_built_in_methods_whole() -> None:
    result = Result("list baselines --check")
    assert (result.code, "broken" in result.out) == (0, False)


def test_meters_are_listed_and_say_whether_they_are_here() -> None:
    listed = names(Result("list meters").out)
    assert {"ina3221", "pmic", "zeus", "external", "regression", "codecarbon", "none"} == set(listed)
    result = Result("list meters --check")
    assert result.code == 0, "a meter that is not here is no fault"
    lines = result.out.splitlines()
    assert "here: none" in lines
    assert any(line.startswith("not here: external: it needs a file or a URL") for line in lines)


def test_a_meter_that_nobody_knows_is_refused_whatever_the_mode() -> None:
    result = Result(f"run --method eddl {TINY} --testbed pac-nano-4 --meter ina322")
    assert (result.code, result.out) == (2, "")
    assert "no meter called 'ina322'. Did you mean ina3221" in result.err


def test_list_is_fast_and_brings_no_heavy_library_along() -> None:
    """Beside what importing its two libraries takes, whatever the speed of the machine."""
    libraries = "import pydantic.types, typer.main"
    program = (
        "import sys\nfrom harness.cli import main\n"
        "sys.argv = ['orrery', 'list', 'baselines']\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'pandas', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    seconds: dict[str, list[float]] = {libraries: [], program: []}
    for _ in range(5):
        for text, seen in seconds.items():
            began = cpu_seconds_of_children()
            subprocess.run([sys.executable, "-c", text], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            seen.append(cpu_seconds_of_children() - began)
    assert min(seconds[program]) < 2.5 * min(seconds[libraries])


def cpu_seconds_of_children() -> float:
    """Of those that have ended. Other programs on the machine make no difference, as they do to the wall clock."""
    used = os.times()
    return used.children_user + used.children_system


def test_run_prints_a_table_and_writes_records_and_tables(folder: Path) -> None:
    result = Result(f"run --method eddl {TINY} --testbed pac-nano-2")
    assert result.code == 0
    header, row = result.out.splitlines()
    assert header.split()[:3] == ["method", "model", "technique"]
    assert row.split()[:3] == ["eddl", "bert-tiny", "full"]
    assert result.err.startswith("[1/1] eddl"), "progress, in plain lines where there is no terminal"
    (record,) = store.load_all(folder / "orrery-runs")
    assert pd.read_csv(folder / "orrery-runs" / "runs.csv")["total_time_s"][0] == record.total_time_s
    assert Result(f"run --method eddl {TINY} --testbed pac-nano-2").err.rstrip().endswith("(done before)")
    assert "(done before)" not in Result(f"run --method eddl {TINY} --testbed pac-nano-2 --force").err


def test_clip_norm_is_a_flag_of_run_and_plan() -> None:
    asked = f"--method eddl {TINY} --testbed pac-nano-2 --clip-norm 0.5"
    assert json.loads(Result(f"run {asked} --json").out)["clip_norm"] == 0.5
    assert "clipped by norm.v1" in Result(f"plan {asked}").out
    refused = Result(f"run {asked}".replace("0.5", "-1"))
    assert (refused.code, "clip_norm is -1.0; it must be a number above 0" in refused.err) == (2, True)


def test_no_cache_is_a_flag_of_run_and_plan() -> None:
    """Of methods that have a cache; others refuse it."""
    asked = "--model bert-tiny --technique parallel-adapters --dataset synthetic --num-samples 8 --batch-size 4"
    asked += " --seq-len 16 --epochs 2 --testbed pac-nano-2"
    assert "'cached epoch'" in Result(f"plan --method pac {asked}").out
    assert "'cached epoch'" not in Result(f"plan --method pac {asked} --no-cache").out
    record = json.loads(Result(f"run --method pac {asked} --no-cache --json").out)
    assert record["method_options"]["cache"] is False
    for command, message in (("--method eddl", "option of eddl"), ("", "none is named")):
        refused = Result(f"run {command} {asked} --no-cache")
        assert refused.code == 2 and message in refused.err


def test_json_is_one_record_per_line_and_nothing_else(folder: Path) -> None:
    (folder / "sweep.toml").write_text(
        '[workload]\nmodel = "bert-tiny"\nsteps = 2\n'
        '[run]\nmethod = ["eddl", "gpipe"]\ntestbed = ["pac-nano-2", "pac-nano-8"]\n'
    )
    result = Result("run sweep.toml --json --out results")
    records = [Record.model_validate_json(line) for line in result.out.splitlines()]
    assert [(r.testbed, r.method, r.status) for r in records] == [
        ("pac-nano-2", "eddl", "ok"),
        ("pac-nano-2", "gpipe", "ok"),
        ("pac-nano-8", "eddl", "ok"),
        ("pac-nano-8", "gpipe", "unsupported"),
    ]
    assert result.code == 0, "an impossible combination of a sweep is a result"
    assert {r.provenance.config_hash for r in records} == {p.stem for p in (folder / "results" / "runs").iterdir()}


def test_a_drop_in_method_file_runs(folder: Path) -> None:
    shutil.copy(ROOT / "baselines" / "eddl.py", folder / "my_method.py")
    result = Result(f"run --method ./my_method.py {TINY} --testbed pac-nano-2 --set my-method.shares=speed --json")
    record = json.loads(result.out)
    assert (record["method"], record["method_options"]["shares"]) == ("my-method", "speed")


def test_exit_code_says_how_it_went(folder: Path) -> None:
    assert Result(f"run --method gpipe {TINY} --testbed pac-nano-8").code == 2, "nothing could be run"
    (folder / "broken.py").write_text("OPTIONS = {}\ndef plan(workload, costs, cluster, options): return 1 / 0\n")
    assert Result(f"run --method ./broken.py {TINY} --testbed pac-nano-2").code == 1
    out_of_memory = "from harness.errors import OutOfMemory\nraise OutOfMemory('device0', 2, 1)"
    (folder / "large.py").write_text(
        f"OPTIONS = {{}}\ndef plan(workload, costs, cluster, options):\n    exec({out_of_memory!r})\n"
    )
    assert Result(f"run --method ./large.py {TINY} --testbed pac-nano-2").code == 0, "out of memory is a result"


BAD = {
    "unknown method": (f"run --method edl {TINY} --testbed pac-nano-2", "Did you mean eddl?"),
    "unknown kind": ("list baseline", "Did you mean baselines"),
    "unknown option": (f"run --method eddl {TINY} --testbed pac-nano-2 --set eddl.share=1", "Did you mean shares?"),
    "malformed option": (f"run --method eddl {TINY} --testbed pac-nano-2 --set shares=1", "METHOD.OPTION=VALUE"),
    "missing method": (f"run {TINY} --testbed pac-nano-2", "run.method is missing"),
    "twice": ("run sweep.toml --method eddl", "described twice: by sweep.toml and by flags"),
    "no file": ("run sweep.toml", "sweep.toml can't be read: No such file"),
    "no data": (
        "run --method standalone --model bert-tiny --testbed local-1 --mode emulated --steps 1 --data-dir nowhere",
        "nowhere",
    ),
    "no plan": ("run --plan none.json --model bert-tiny --testbed pac-nano-2", "none.json can't be read"),
    "unknown reproduction": ("reproduce pack", "Did you mean pac"),
    "nothing to report": ("report nowhere", "There are no results in nowhere"),
    "no results": ("compare a b", "can't be read"),
    "unwritable": (f"run --method eddl {TINY} --testbed pac-nano-2 --out taken", "can't be written"),
    "picture": (f"plan --method eddl {TINY} --testbed pac-nano-2 --picture p.bmp", "p.bmp"),
    "check of data": ("list models --check", "goes with systems, baselines or meters"),
}


@pytest.mark.parametrize(("command", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_paragraph_and_exit_code_2(folder: Path, command: str, message: str) -> None:
    (folder / "taken").write_text("")
    result = Result(command)
    assert result.code == 2
    assert result.err.startswith("orrery: ") and message in result.err
    assert "Traceback" not in result.err and result.err.count("\n") == 1
    assert not list(folder.rglob("*.json")) and not list(folder.rglob("*.part"))


def test_corrupt_record_is_named_and_forced_over(folder: Path) -> None:
    command = f"run --method eddl {TINY} --testbed pac-nano-2"
    Result(command)
    (path,) = (folder / "orrery-runs" / "runs").iterdir()
    whole = path.read_text()
    path.write_text(whole[:100])
    result = Result(command)
    assert result.code == 2 and str(path.relative_to(folder)) in result.err
    assert Result(command + " --force").code == 0
    assert json.loads(path.read_text())["total_time_s"] == json.loads(whole)["total_time_s"]


def test_plan_as_text_json_picture_and_trace(folder: Path) -> None:
    question = f"--method gpipe {TINY} --testbed pac-nano-2"
    assert Result(f"plan {question}").out.startswith("gpipe: 2 devices")
    (folder / "plan.json").write_text(Result(f"plan {question} --json").out)
    planned = json.loads(Result(f"run --plan plan.json {TINY} --testbed pac-nano-2 --json").out)
    direct = json.loads(Result(f"run {question} --json").out)
    assert planned["total_time_s"] == direct["total_time_s"]
    for suffix in METADATA:
        assert Result(f"plan {question} --picture p{suffix} --trace t.json").code == 0
        assert (folder / f"p{suffix}").stat().st_size > 1000
    assert json.loads((folder / "t.json").read_text())["traceEvents"]


def test_profile_lists_the_units_with_their_work() -> None:
    lines = Result("profile --model bert-tiny --testbed demo-hetero-3").out.splitlines()
    boards = ["jetson-nano-10w", "jetson-tx2-maxn", "jetson-xavier-nx-15w"]
    assert lines[0].split()[-3:] == boards
    assert lines[-1].split()[0] == "loss"


def test_compare_fails_when_asked_to(folder: Path) -> None:
    for out, tokens in (("a", 64), ("b", 128)):
        Result(f"run --method eddl {TINY} --testbed pac-nano-2 --seq-len {tokens} --out {out}")
    better = Result("compare b a --fail-if throughput_samples_per_s:10%")
    worse = Result("compare a b --fail-if throughput_samples_per_s:10% --fail-if energy_j:1000%")
    assert (better.code, worse.code) == (0, 1)
    assert worse.err == "worse: eddl bert-tiny full mrpc batch 16 pac-nano-2 simulated: throughput_samples_per_s\n"
    (a,), (b,) = store.load_all(folder / "a"), store.load_all(folder / "b")
    (line,) = [line for line in worse.out.splitlines() if " total_time_s " in line]
    assert b.total_time_s and a.total_time_s
    assert float(line.split()[-1]) == pytest.approx(b.total_time_s / a.total_time_s, rel=1e-3)


def test_report_is_written_from_the_records(folder: Path) -> None:
    Result(f"run --method eddl {TINY} --testbed pac-nano-2 --out results")
    result = Result("report results")
    assert (result.code, result.out) == (0, "results/index.html\n")
    assert "bert-tiny" in (folder / "results" / "report.md").read_text()


def test_doctor_finds_this_installation_whole(folder: Path) -> None:
    result = Result("doctor --testbed pac-nano-4 --json")
    checks = {check["name"]: check for check in json.loads(result.out)}
    assert result.code == 0 and all(check["ok"] for check in checks.values())
    assert {"python", "torch", "cache folder", "results folder", "free disk", "meter", "testbed pac-nano-4"} <= set(
        checks
    )
    assert Result("doctor --testbed pac-nano-x").code == 1
    (folder / "taken").write_text("")
    assert "FAIL  results folder: taken" in Result("doctor --out taken").out


def test_doctor_notices_a_package_from_elsewhere(folder: Path) -> None:
    """A folder called `results` before ours on the path takes its place."""
    (folder / "results").mkdir()
    (folder / "results" / "__init__.py").write_text("")
    program = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]; from harness.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "doctor"], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 1
    assert f"FAIL  package results: {folder / 'results'}" in done.stdout
    assert f"It must be {ROOT / 'results'}" in done.stdout


def test_doctor_names_a_broken_method(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(registry, "check_methods", lambda kind: {"mine": "no such library"})
    (check, *_) = [check for check in doctor.examine(folder) if check.name == "method mine"]
    assert (check.ok, check.found) == (False, "no such library")


def test_help_lists_the_commands_in_the_order_of_a_days_work() -> None:
    text = Result("--help").out
    order = ["list", "doctor", "profile", "plan", "run", "compare", "reproduce", "report"]
    assert sorted(order, key=lambda command: text.index(f"\n  {command}  ")) == order
