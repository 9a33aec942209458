"""`orrery plan --objective` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import harness
from harness import registry
from tests.harness.test_cli import TINY, Result

ASKED = f"plan {TINY} --testbed demo-hetero-3 --method eddl"
MINE = "from baselines.eddl import OPTIONS, plan\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_method_is_a_row_or_a_reason() -> None:
    result = Result(f"plan {TINY} --testbed demo-hetero-3 --objective edp --json --carbon 100")
    assert (result.code, result.err) == (0, "")
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert {row["method"] for row in rows} == set(registry.methods())
    ranked = [row for row in rows if row["rank"] is not None]
    assert [row["rank"] for row in ranked] == list(range(1, len(ranked) + 1))
    assert [row["edp_js"] for row in ranked] == sorted(row["time_s"] * row["energy_j"] for row in ranked)
    assert any(row["on_front"] for row in ranked)
    assert all(row["co2_g"] == pytest.approx(row["energy_j"] / 36_000) for row in ranked)
    assert all(row["energy_per_sample_j"] == row["energy_j"] / 64 for row in ranked)
    assert all(row["status"] == "ok" and row["carbon_source"] == "as given by the user" for row in ranked)
    assert all(row["reason"] for row in rows if row["rank"] is None)


def test_a_row_is_what_the_run_takes_and_the_distribution() -> None:
    rows = [json.loads(line) for line in Result(f"{ASKED} --objective time --json").out.splitlines()]
    whole = next(r for r in rows if len(r["devices"]) == 3 and not r["method_options"])
    run = harness.run(method="eddl", model="bert-tiny", dataset="mrpc", steps=4, testbed="demo-hetero-3")
    assert run.total_time_s is not None and run.energy_j is not None
    assert whole["time_s"] == pytest.approx(run.total_time_s + whole["distribution_s"])
    assert whole["energy_j"] == pytest.approx(run.energy_j + whole["distribution_j"])
    assert whole["peak_memory_bytes"] == run.peak_memory_bytes
    assert whole["plan"] == run.plan


def test_table_and_picture(folder: Path) -> None:
    result = Result(f"{ASKED} --objective co2 --picture front.svg")
    assert result.code == 0
    header, first, *_ = result.out.splitlines()
    assert header.split()[:3] == ["rank", "method", "devices"] and first.split()[0] == "1"
    assert "7 of 7 sets of devices that differ were planned for; 475 g CO2 per kWh, assumed" in result.out
    drawn = (folder / "front.svg").read_bytes()
    Result(f"{ASKED} --objective co2 --picture front.svg")
    assert (folder / "front.svg").read_bytes() == drawn


def test_the_plan_of_the_best_can_be_run() -> None:
    out = Result(f"plan {TINY} --testbed demo-hetero-3 --objective energy --json --save-plan best.json").out
    best = json.loads(out.splitlines()[0])
    run = harness.run(plan="best.json", model="bert-tiny", dataset="mrpc", steps=4, testbed="demo-hetero-3")
    assert run.status == "ok" and run.total_time_s is not None and run.energy_j is not None and run.energy is not None
    assert (run.method, list(run.energy)) == (best["method"], best["devices"])
    assert run.total_time_s + best["distribution_s"] == pytest.approx(best["time_s"])
    assert run.energy_j + best["distribution_j"] == pytest.approx(best["energy_j"])


def test_a_method_of_ones_own_is_ranked_like_the_others(folder: Path) -> None:
    (folder / "mine.py").write_text(MINE)
    rows = Result(f"plan {TINY} --testbed demo-hetero-3 --method ./mine.py --objective time --json").out.splitlines()
    assert len(rows) == 7 and {json.loads(row)["method"] for row in rows} == {"mine"}


def test_set_options_are_kept_in_all_candidates() -> None:
    out = Result(f"{ASKED} --objective time --set eddl.shares=speed --json").out
    assert {json.dumps(json.loads(line)["method_options"]) for line in out.splitlines()} == {'{"shares": "speed"}'}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--objective power", "There is no objective called 'power'"),
        ("--objective time --deadline 0", "--deadline is 0 s; it must be more than 0"),
        ("--objective energy --deadline 0.001", "No candidate is done in 0.001 s. The fastest is eddl on"),
        ("--deadline 3", "Give --objective, too"),
        ("--save-plan best.json", "--save-plan is for choosing among methods. Give --objective, too"),
        ("--carbon 3", "Give --objective, too"),
        ("--objective co2 --carbon -1", "from 0 to 5000"),
        ("--objective time --trace t.json", "--trace is about one plan"),
        ("--objective time --picture front.txt", "a picture's name ends in one of"),
        ("--objective time --set gpipe.micro_batch_size=1", "options.gpipe sets options of a method that is not run"),
        ("--objective time --model bert-none", "bert-none"),
    ],
)
def test_mistakes_are_named(flags: str, expected: str) -> None:
    result = Result(f"{ASKED} {flags}")
    assert (result.code, result.out) == (2, "")
    assert expected in result.err
