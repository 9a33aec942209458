"""The energy study's tables, from real simulated runs of a tiny model."""

from __future__ import annotations

import pytest

import harness
from harness.records import Record
from results import parallelisms
from results.parallelisms import ALONE, DATA, PIPELINE, SEQUENCE, STUDY, TENSOR


def run(method: str, testbed: str, batch_size: int = 8) -> Record:
    shared = {"embeddings": "everywhere"} if method in (SEQUENCE, TENSOR) else {}
    record: Record = harness.run(
        method=method,
        model="bert-tiny",
        dataset="synthetic",
        technique="full",
        testbed=testbed,
        seq_len=32,
        batch_size=batch_size,
        steps=4,
        options=shared,
    )
    return record


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [run(method, testbed) for testbed in ("nano-4", "nano-cpu-4") for method in (*STUDY, ALONE)]


def test_break_even_is_that_of_the_closed_form(records: list[Record]) -> None:
    tables = {table.name: table.frame for table in parallelisms.tables(records)}
    for row in tables["break-even"].to_dict("records"):
        assert row["simulated"] == pytest.approx(row["closed form"], rel=0.05)


def test_above_the_break_even_data_parallelism_sends_less(records: list[Record]) -> None:
    """And below it more. Sequence parallelism sends more than data parallelism, and pipelines least."""
    tables = {table.name: table.frame for table in parallelisms.tables(records)}
    tokens = tables["break-even"]["closed form"][0]
    for rows, less in ((int(tokens / 32 * 0.9), False), (int(tokens / 32 * 1.1) + 1, True)):
        sent = {method: run(method, "nano-4", rows).comm_bytes or 0 for method in STUDY}
        assert (sent[DATA] < sent[TENSOR]) == less
        assert sent[SEQUENCE] > sent[DATA]
        assert min(sent, key=lambda method: sent[method]) == PIPELINE


def test_statements_have_verdicts(records: list[Record]) -> None:
    (table,) = (table for table in parallelisms.tables(records) if table.name == "verdicts")
    found = {(row["testbed"], row["statement"]): row for row in table.frame.to_dict("records")}
    assert {statement for testbed, statement in found if testbed == "nano-4"} == {"(i)", "(ii)", "(iii)", "(iv)"}
    assert {statement for testbed, statement in found if testbed == "nano-cpu-4"} == {"(iii)", "(iv)"}
    by_method = {record.method: record for record in records if record.testbed == "nano-4"}
    ranked = sorted(STUDY, key=lambda method: by_method[method].energy_j or 0)
    assert (found["nano-4", "(i)"]["verdict"] == "holds") == (set(ranked[:2]) == {DATA, PIPELINE})
    assert found["nano-4", "(ii)"]["verdict"] == "holds"


def test_energy_beside_one_device_is_the_closed_form(records: list[Record]) -> None:
    """E_n / E_1 = 1 + r (n / S - 1), with r the idle over the loaded power."""
    alone, pipeline = (next(r for r in records if r.method == method) for method in (ALONE, PIPELINE))
    assert alone.energy_j and pipeline.energy_j and alone.total_time_s and pipeline.total_time_s
    speedup = alone.total_time_s / pipeline.total_time_s
    assert pipeline.energy_j / alone.energy_j == pytest.approx(1 + 1.39 / 7.28 * (4 / speedup - 1), rel=0.02)


def test_what_runs_out_of_memory_is_said(records: list[Record]) -> None:
    by_method = {record.method: record for record in records if record.testbed == "nano-4"}
    short = {"status": "oom", "reason": "device0 needs more", "energy_j": None, "comm_bytes": None}
    some = [by_method[m].model_copy(update=short if m in (DATA, SEQUENCE) else {}) for m in STUDY]
    (table,) = (table for table in parallelisms.tables(some) if table.name == "verdicts")
    (row,) = (row for row in table.frame.to_dict("records") if row["statement"] == "(v)")
    assert row["verdict"] == "holds"
    assert row["seen"] == "out of memory: DP, SP; fits: TP, PP"


def test_without_all_four_there_is_no_table(records: list[Record]) -> None:
    assert not parallelisms.text([record for record in records if record.method != TENSOR])


def test_a_testbed_from_a_file_has_no_statement_about_its_gpus(records: list[Record]) -> None:
    elsewhere = [r.model_copy(update={"testbed": "my-boards"}) for r in records if r.testbed == "nano-4"]
    (table,) = (table for table in parallelisms.tables(elsewhere) if table.name == "verdicts")
    assert set(table.frame["statement"]) == {"(iii)", "(iv)"}
