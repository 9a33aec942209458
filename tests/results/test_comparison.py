from __future__ import annotations

from dataclasses import replace

import pytest

from harness.records import Record
from results import papers
from results.comparison import Comparison, compare, mean_error
from results.settings import Setting, settings

CELL = next(c for c in papers.load("pac").cells if c.unit == "h" and c.number is not None)


def comparison(theirs: str, ours: float | str | None, **marks: bool) -> Comparison:
    return Comparison(replace(CELL, value=theirs), ours, "here", **marks)


def test_error() -> None:
    assert comparison("2", 2.5).error == 0.25
    assert comparison("2", 1.5).error == -0.25
    assert comparison("2", 2.5).verdict == "+25.0%"


def test_oom_agrees_or_contradicts() -> None:
    assert comparison("OOM", "OOM").verdict == "agrees"
    assert comparison("OOM", 1.0).verdict == comparison("1.0", "OOM").verdict == "contradicts"
    assert comparison("1.0", None).verdict == "not run"
    assert comparison("OOM", "OOM").error is None


def test_fitted_cells_are_in_no_error_figure() -> None:
    fitted = comparison("2", 3.0, fitted=True)
    assert fitted.verdict == "(+50.0%) fitted"
    assert comparison("2", "OOM", fitted=True).verdict == "(contradicts) fitted"
    assert mean_error([fitted]) is None
    assert mean_error([fitted, comparison("2", 2.5), comparison("2", 1.0)]) == pytest.approx(0.375)


def as_in_table_2(records: list[Record], **changed: object) -> Setting:
    """The real runs of a tiny model on the paper's testbed, as if they were of T5-Base and of full length."""
    named = [
        r.model_copy(
            update={
                "model": "t5-base",
                "method": r.method.replace("pipedream-1f1b", "eco-fl"),
                "epochs": 3,
                "total_time_s": 1800.0,
                "batch_size": 16,
                **changed,
            }
        )
        for r in records
        if (r.testbed, r.model) == ("pac-nano-4", "t5-tiny")
    ]
    (setting,) = settings(named)
    return setting


def test_hours_are_compared_with_the_same_run_of_the_paper(records: list[Record]) -> None:
    found = compare(as_in_table_2(records))
    assert "table2" in found
    by_system = {c.cell.system: c for c in found["table2"]}
    assert set(by_system) == {"Standalone", "EDDL", "Eco-FL"}
    assert (by_system["EDDL"].ours, by_system["EDDL"].cell.value) == (0.5, "OOM")
    assert by_system["EDDL"].verdict == "contradicts"
    assert by_system["Eco-FL"].difference == pytest.approx(0.5 / 0.45 - 1)


def test_cells_with_and_without_a_cache_and_of_other_batches(records: list[Record]) -> None:
    """Figure 11 by the method's option; Figures 9 and 10 with as many samples as devices."""
    adapted = {"method": "pac", "technique": "parallel-adapters", "plan": {"grouping": [2, 2]}}
    for cache, system in ((True, "PA+cache"), (False, "PA")):
        found = compare(as_in_table_2(records, **adapted, method_options={"cache": cache}, epochs=4))
        assert {c.cell.technique for c in found["fig11"]} == {system}
        assert all(c.ours == 0.5 for c in found["fig11"]) and "fig9a" not in found
    small = {"batch_size": 4, "epochs": 1, "throughput_samples_per_s": 12.0}
    found = compare(as_in_table_2(records, **adapted, **small))
    assert {c.ours for c in found["fig9a"]} == {12.0} and "table2" not in found
    assert {(c.cell.value, c.ours, c.verdict) for c in found["fig10"]} == {("[4]", "[2-2]", "contradicts")}


def test_nothing_is_compared_off_the_papers_testbeds(records: list[Record]) -> None:
    other = [s for s in settings(records) if s.first.testbed != "pac-nano-4"]
    assert len(other) == 3
    assert all(compare(setting) == {} for setting in other)


def test_counts_of_t5_base(records: list[Record]) -> None:
    """Figure 3 within 1 %; of Figure 8(a) the cells that the Nano was fitted to are marked and left out."""
    tiny = next(r for r in records if (r.testbed, r.model, r.method) == ("pac-nano-4", "t5-tiny", "standalone"))
    (setting,) = settings([tiny.model_copy(update={"model": "t5-base"})])
    found = compare(setting)
    full = {c.cell.metric: c for c in found["fig3"] if c.cell.technique == "Full"}
    assert set(full) == {"tflop_forward", "tflop_backward"}
    assert all(abs(c.error) < 0.01 for c in found["fig3"])
    assert {c.cell.metric for c in found["fig8a"]} == {"forward_time_per_sample_s", "backward_time_per_sample_s"}
    assert all(c.fitted and c.error is None for c in found["fig8a"])
    assert mean_error(found["fig8a"]) is None
    assert not any(c.fitted for c in found["fig3"])
