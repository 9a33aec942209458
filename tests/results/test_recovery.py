"""The tables of devices that were lost."""

from __future__ import annotations

import pytest

import harness
from harness.records import Record
from results import recovery

ASKED = {
    "method": "asteroid",
    "model": "bert-tiny",
    "dataset": "synthetic",
    "num_samples": 80,
    "batch_size": 8,
    "steps": 10,
    "seq_len": 16,
    "testbed": "demo-hetero-3",
}


@pytest.fixture(scope="module")
def runs() -> list[Record]:
    """Every device crashes, each time recovered in both ways; and one run without a failure."""
    found = [harness.run(**ASKED)]
    for device in range(3):
        for how, collector in (("lightweight", "fullest"), ("heavy", "fullest"), ("heavy", "first")):
            options = {"replication_period": 3, "recovery": how, "collector": collector, "micro_batch_size": 2}
            fault = f"crash device{device} at step 4"
            found.append(harness.run(**ASKED, inject=fault, options=options))
    return found


def test_every_failure_has_a_row_with_its_parts(runs: list[Record]) -> None:
    assert all(run.status == "ok" for run in runs), [run.reason for run in runs]
    rows, _ = recovery.tables(runs)
    kinds = ["lightweight", "heavy, first collects", "heavy, fullest collects"]
    assert len(rows.frame) == 9 and list(rows.frame["recovery"]) == kinds * 3
    by_row = {(run.inject, recovery.how(run)): run for run in runs[1:]}
    for _, row in rows.frame.iterrows():
        run = by_row[row["failure"], row["recovery"]]
        (found,) = run.recovery or ()
        assert row["recovery, s"] == pytest.approx(found.regroup_s + (found.transfer_s or 0.0))
        assert row["caught up, s"] == pytest.approx(row["recovery, s"] + row["replay, s"] + row["first round, s"])
        assert (found.in_round, found.back_to_round) == (4, 3)
        assert run.total_time_s is not None and run.total_time_s > row["caught up, s"]
        assert run.memory is None and run.energy_j is None


def test_ratios_are_of_the_same_failures(runs: list[Record]) -> None:
    rows, ratios = recovery.tables(runs)
    frame = rows.frame.set_index(["failure", "recovery"])["caught up, s"].unstack()
    for kind in ("heavy, fullest collects", "heavy, first collects"):
        wanted = frame[kind] / frame["lightweight"]
        (row,) = [row for _, row in ratios.frame.iterrows() if (row["recovery"], row["of"]) == (kind, "caught up")]
        assert row["failures"] == 3
        found = row["least"], row["median"], row["most"]
        assert found == pytest.approx((wanted.min(), wanted.median(), wanted.max()))
    only_heavy = [run for run in runs if run.method_options.get("recovery") != "lightweight" or run.inject is None]
    assert len(list(recovery.tables(only_heavy))) == 1


def test_without_a_failure_there_is_no_table(runs: list[Record]) -> None:
    assert not list(recovery.tables(runs[:1])) and recovery.text(runs[:1]) == ""
