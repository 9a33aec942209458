from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness import store
from harness.compare import HIGHER_IS_BETTER, IDENTITY, Limit, Row, compare, parse_limit, read
from harness.errors import OrreryError
from harness.records import Record

MakeRecord = Callable[..., Record]


def test_fields_are_fields_of_the_record() -> None:
    assert {*HIGHER_IS_BETTER, *IDENTITY} <= set(Record.model_fields)


def test_ratio_is_b_over_a_for_each_run_that_both_hold(record: MakeRecord) -> None:
    a = [record(method="eddl", total_time_s=2.0), record(method="gpipe", total_time_s=4.0)]
    b = [record(method="gpipe", total_time_s=5.0), record(method="eddl", total_time_s=1.0)]
    ratios = {row.run.split()[0]: row.ratio for row in compare(a, b) if row.field == "total_time_s"}
    assert ratios == {"eddl": 0.5, "gpipe": 1.25}


def test_two_single_records_are_compared_whatever_they_are(record: MakeRecord) -> None:
    (row,) = compare([record(method="eddl", comm_bytes=8)], [record(method="gpipe", comm_bytes=2)])
    assert (row.field, row.ratio) == ("comm_bytes", 0.25)


def test_nothing_in_common_is_a_clear_error(record: MakeRecord) -> None:
    a = [record(method="eddl"), record(method="gpipe")]
    with pytest.raises(OrreryError, match="Not one of the 2 runs of A is among the 1 of B"):
        compare(a, [record(method="dapple")])


@pytest.mark.parametrize(
    ("field", "a", "b", "worse"),
    [
        ("throughput_samples_per_s", 100.0, 90.0, False),  # exactly the limit
        ("throughput_samples_per_s", 100.0, 89.9, True),
        ("throughput_samples_per_s", 100.0, 200.0, False),
        ("total_time_s", 100.0, 110.0, False),
        ("total_time_s", 100.0, 110.1, True),
        ("total_time_s", 100.0, 1.0, False),
        ("total_time_s", 100.0, None, True),  # a run that no longer gets there
        ("total_time_s", None, 100.0, False),
    ],
)
def test_worse_knows_the_direction(field: str, a: float | None, b: float | None, worse: bool) -> None:
    assert Row("run", field, a, b).worse_than(Limit(field, 0.1)) == worse
    assert not Row("run", field, a, b).worse_than(Limit("energy_j", 0.1))


def test_a_run_that_is_missing_or_out_of_memory_counts_as_worse(record: MakeRecord) -> None:
    whole = record(method="eddl", total_time_s=1.0)
    a = [whole, record(method="gpipe", total_time_s=1.0)]
    for b in ([whole], [whole, record(method="gpipe", status="oom")]):
        worse = [row.run.split()[0] for row in compare(a, b) if row.worse_than(Limit("total_time_s", 0.1))]
        assert worse == ["gpipe"]


def test_limit_is_read_from_text() -> None:
    assert parse_limit("throughput_samples_per_s:12.5%") == Limit("throughput_samples_per_s", 0.125)
    with pytest.raises(OrreryError, match="Did you mean throughput_samples_per_s"):
        parse_limit("throughput_samples:10%")
    with pytest.raises(OrreryError, match="a field and a percentage"):
        parse_limit("total_time_s=10")


def test_reads_a_folder_or_a_file(tmp_path: Path, record: MakeRecord) -> None:
    path = store.save(tmp_path, record())
    assert read(path) == read(tmp_path) == [record()]
