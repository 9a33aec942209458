from __future__ import annotations

from dataclasses import replace

import pytest

from harness.records import DeviceMemory, PhaseRecord, Record
from results import papers
from results.comparison import GIB, Comparison, compare, mean_error
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


def test_cells_that_the_paper_has_not_are_predictions(records: list[Record]) -> None:
    """T5-Large is in Table 1 and Figure 3 only."""
    paper = papers.load("pac")
    lacking = {cell.artefact for cell in paper.predicted if cell.model == "T5-Large"}
    assert lacking >= {"table2", "fig8a", "fig8b", "fig9a", "fig9b", "fig10", "fig11"}
    assert not lacking & {"table1", "fig3", "claims"}
    assert all((cell.value, cell.number, cell.provenance) == ("", None, "") for cell in paper.predicted)
    as_of = {"epochs": 1, "dataset": "qnli", "num_samples": 104743, "total_time_s": 3600.0, "model": "t5-large"}
    found = compare(as_in_table_2(records, **as_of))["table2"]
    assert {c.cell.system for c in found} == {"Standalone", "EDDL", "Eco-FL"}
    assert {(c.ours, c.verdict, c.error) for c in found} == {(1.0, "prediction", None)}


def test_the_worst_device_of_figure_8(records: list[Record]) -> None:
    """Kinds of the device on which they are most together; of what is cached, of its own phases alone."""
    small, large = (DeviceMemory(peak_bytes=1, weights_bytes=w * GIB, activations_bytes=GIB) for w in (3, 1))
    moving = large.model_copy(update={"gradients_bytes": GIB, "cache_bytes": 2 * GIB})
    gpipe = {"method": "gpipe", "num_devices": 8, "epochs": 1, "device_time_per_sample_s": 0.5}
    options = {"cuts": "layers", "micro_batch_size": 16}
    asked = {**gpipe, "memory": {"device0": small, "device1": moving}}
    found = compare(as_in_table_2(records, **asked, method_options=options))
    full = {c.cell.metric: c for c in found["fig8b"]}
    assert {metric: c.ours for metric, c in full.items()} == {
        **dict.fromkeys(("weights_gib", "gradients_gib"), 1.0),
        "activations_gib": 3.0,
        "memory_gib": 5.0,
    }
    whole, *_ = (c for c in found["fig8a"] if c.cell.metric == "time_per_sample_s")
    assert (whole.ours, whole.fitted) == (0.5, True), "the sum of two cells that constants were fitted to"
    assert all(c.alike for c in full.values())
    by_time = compare(as_in_table_2(records, **asked, method_options={**options, "cuts": "time"}))["fig8b"]
    assert {(c.error, c.verdict.endswith("run otherwise")) for c in by_time} == {(None, True)}

    cached = PhaseRecord(
        name="cached epoch", repeat=3, time_s=1.0, comm_bytes=0, computing_s=20.0, memory={"device0": moving}
    )
    first = cached.model_copy(update={"name": "train", "memory": {"device0": small}})
    pac = {"method": "pac", "technique": "parallel-adapters", "num_devices": 8, "epochs": 2}
    found = compare(as_in_table_2(records, **pac, method_options={"cache": True}, phases=[first, cached]))
    assert {c.cell.technique for c in found["fig8b"]} == {"PA+cache"}
    assert {c.cell.metric: c.ours for c in found["fig8b"]}["memory_gib"] == 5.0
    time, *_ = (c for c in found["fig8a"] if c.cell.metric == "time_per_sample_s")
    assert time.ours == 20.0 / 40, "of one epoch of 40 samples"


def test_handing_out_takes_a_share_of_the_run(records: list[Record]) -> None:
    phases = [
        PhaseRecord(name=name, repeat=1, time_s=time_s, comm_bytes=0)
        for name, time_s in (("train", 1000.0), ("hand out weights", 50.0), ("hand out cache", 400.0))
    ]
    pac = {"method": "pac", "technique": "parallel-adapters", "model": "bart-large", "method_options": {"cache": True}}
    found, *_ = compare(as_in_table_2(records, **pac, phases=phases))["claims"]
    assert (found.cell.value, found.ours) == ("8", 25.0)


def test_nothing_is_compared_off_the_papers_testbeds(records: list[Record]) -> None:
    other = [s for s in settings(records) if s.first.testbed != "pac-nano-4"]
    assert len(other) == 3
    assert all(compare(setting) == {} for setting in other)


def test_counts_of_t5_base(records: list[Record]) -> None:
    """Figure 3 within 1 %; of Figure 8(a) the cells that the Nano was fitted to are marked and left out.

    The sum of both passes is whole runs' to answer.
    """
    tiny = next(r for r in records if (r.testbed, r.model, r.method) == ("pac-nano-4", "t5-tiny", "standalone"))
    (setting,) = settings([tiny.model_copy(update={"model": "t5-base"})])
    found = compare(setting)
    full = {c.cell.metric: c for c in found["fig3"] if c.cell.technique == "Full"}
    assert set(full) == {"tflop_forward", "tflop_backward", "tflop_total"}
    assert all(abs(c.error) < 0.01 for c in found["fig3"])
    assert {c.cell.metric for c in found["fig8a"]} == {"forward_time_per_sample_s", "backward_time_per_sample_s"}
    assert all(c.fitted and c.error is None for c in found["fig8a"])
    assert mean_error(found["fig8a"]) is None
    assert not any(c.fitted for c in found["fig3"])
