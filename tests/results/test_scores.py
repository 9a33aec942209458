"""The summary's arithmetic on made-up numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from results import papers, scores
from results.comparison import Comparison
from results.papers import Cell

PAC = papers.load("pac")
#: Printed hours of T5-Base on MRPC: 0.45, 0.39, 0.34, 0.41, 0.31 and 0.14, each by another system or technique.
HOURS = [
    cell
    for cell in PAC.cells
    if (cell.artefact, cell.model, cell.dataset, cell.metric) == ("table2", "T5-Base", "MRPC", "training_time_h")
    and cell.devices == "4"
    and cell.number is not None
]


def made(cells: list[Cell], ours: list[float | str], **marks: bool) -> list[Comparison]:
    return [Comparison(cell, value, "a run", **marks) for cell, value in zip(cells, ours, strict=True)]


def only(comparisons: list[Comparison]) -> dict[str, object]:
    table = scores.summary(PAC, comparisons)
    assert table is not None
    (row,) = table.frame.to_dict("records")
    return row


def test_the_papers_own_numbers_are_all_in_order() -> None:
    theirs = [float(cell.value) for cell in HOURS]
    row = only(made(HOURS, list(theirs)))
    assert (row["cells"], row["worst"]) == (6, 0)
    assert row["order"] == "15 of 15"
    assert only(made(HOURS, [1 / hours for hours in theirs]))["order"] == "0 of 15"


def test_pairs_that_the_last_digit_does_not_tell_apart_do_not_count() -> None:
    values = ("1.21", "1.21", "1.2", "1.3", "1.25")
    cells = [replace(cell, value=value) for cell, value in zip(HOURS, values, strict=False)]
    told = [(a, b) for n, a in enumerate(values) for b in values[n + 1 :] if abs(float(a) - float(b)) > 0.0999]
    told += [("1.21", "1.25")] * 2  # two decimals each
    ordered, pairs = scores.in_order(made(cells, [5.0, 5.0, 5.0, 5.0, 5.0]), frozenset())
    assert (ordered, pairs) == (0, len(told)), "a tie is in no order"


def test_order_is_within_one_model_data_set_and_in_figure_9_number_of_devices() -> None:
    assert scores.several(PAC) == {"fig9a", "fig9b", "fig10"}
    bars = [
        c
        for c in PAC.cells
        if (c.artefact, c.model, c.metric) == ("fig9a", "T5-Base", "throughput_samples_per_s") and c.system != "EDDL"
    ]
    assert len(bars) == 8
    faster_alone = [1000.0 / int(c.devices) + float(c.value) for c in bars]
    assert scores.in_order(made(bars, faster_alone), scores.several(PAC)) == (4, 4)
    assert scores.in_order(made(bars, faster_alone), frozenset())[1] == 8 * 7 // 2


@pytest.mark.parametrize("marks", [{"fitted": True}, {"alike": False}])
def test_errors_leave_out_what_proves_nothing(marks: dict[str, bool]) -> None:
    cells = [replace(cell, value="2") for cell in HOURS[:3]]
    row = only([*made(cells[:2], [2.2, 1.0]), *made(cells[2:], [20.0], **marks)])
    assert (row["cells"], row["median"], row["worst"]) == (2, pytest.approx(0.3), 0.5)
    assert (row["fitted"], row["run otherwise"]) == ((1, 0) if "fitted" in marks else (0, 1))


def test_out_of_memory_and_predictions() -> None:
    """An agreement, two contradictions, and two cells that the paper has not."""
    cells = [replace(cell, value=value) for cell, value in zip(HOURS, ("OOM", "OOM", "1.0", "", ""), strict=False)]
    row = only(made(cells, ["OOM", 1.0, "OOM", "OOM", 3.0]))
    assert row["out of memory, groupings"] == "1 of 3"
    assert (row["cells"], row["predictions"]) == (0, 2)


def test_a_comparison_of_several_settings_counts_once() -> None:
    (one, *_), other = made(HOURS, [1.0] * 6), Comparison(HOURS[0], 2.0, "another run")
    same = replace(one, how="with an option that does nothing")
    counted = Comparison(HOURS[1], 3.0, "counted")
    elsewhere = replace(counted, ours=3.1)
    found = scores.of_papers([{"table2": [one, same, counted]}, {"table2": [one, other, elsewhere]}])
    assert found == {"pac": [one, other, counted]}
