from __future__ import annotations

from dataclasses import replace

import pytest

from harness import profile
from harness.costs import BACKWARD, FORWARD
from harness.records import Record
from harness.workload import Workload
from results import again, tables
from results.comparison import Comparison
from results.papers import load
from results.settings import Setting, settings
from testbeds import library
from tests.results.conftest import METHODS, SMALL_BOARD_BYTES


@pytest.fixture
def by_testbed(records: list[Record]) -> dict[str, Setting]:
    return {setting.first.testbed: setting for setting in settings(records)}


def rows(table: tables.Table) -> dict[tuple[str, str], dict[str, object]]:
    return {(row["model"], row["method"]): row for row in table.frame.to_dict("records")}


def test_every_method_and_model_has_its_row(by_testbed: dict[str, Setting]) -> None:
    table = tables.runs(by_testbed["pac-nano-4"], {})
    assert list(rows(table)) == [(model, method) for model in ("t5-tiny", "bert-tiny") for method in METHODS]


def test_standalone_takes_what_its_units_take(by_testbed: dict[str, Setting]) -> None:
    """Two epochs of 40 samples in batches of 16: four iterations of 16 rows and two of 8, nothing overlaps."""
    row = rows(tables.runs(by_testbed["pac-nano-4"], {}))["bert-tiny", "standalone"]
    rows_at_once = row["micro-batch"]
    assert 8 % rows_at_once == 0
    costs = profile.count(Workload(model="bert-tiny", dataset="mrpc", num_samples=40, batch_size=16))
    device = library.load("pac-nano-4").cluster.devices[0]
    passes = sum(
        (4 * 16 + 2 * 8) / rows_at_once * costs.seconds(device, 0, len(costs.units), direction, rows_at_once)
        for direction in (FORWARD, BACKWARD)
    )
    weights = sum(p.bytes for p in costs.parameters.values())
    updates = 6 * 3 * weights / device.memory_bandwidth  # reads weights and gradients, writes weights
    (unit,) = (column.removeprefix("in all, ") for column in row if column.startswith("in all, "))
    seconds = row[f"in all, {unit}"] * dict(tables.TIME_UNITS)[unit]
    assert seconds == pytest.approx(passes + updates, rel=0.01)
    assert row[f"per epoch, {unit}"] == row[f"in all, {unit}"] / 2
    assert row["samples/s"] == pytest.approx(2 * 40 / seconds)


def test_what_does_not_fit_is_a_row_with_device_and_bytes(by_testbed: dict[str, Setting]) -> None:
    table = tables.runs(by_testbed["small-3"], {})
    statuses = {key: row["status"] for key, row in rows(table).items()}
    assert "oom" in statuses.values() and "ok" in statuses.values()
    texts = dict(zip(rows(table), table.cells(), strict=True))
    column = list(table.frame.columns)
    for key, row in rows(table).items():
        if row["status"] == "oom":
            assert f"{SMALL_BOARD_BYTES / 2**20:.1f} MiB" in row["note"] and row["note"].startswith("device")
            assert row["peak, MiB"] * 2**20 > SMALL_BOARD_BYTES
            assert texts[key][column.index("samples/s")] == "-"
        else:
            assert row["peak, MiB"] * 2**20 <= SMALL_BOARD_BYTES


def test_a_verdict_within_the_range_of_the_memory_depends_on_it(records: list[Record]) -> None:
    """The Nano's usable memory is 1550 MiB, perhaps 2.5 GB."""
    ok = next(r for r in records if r.testbed == "pac-nano-4")
    reason = "device0 needs 2000.0 MiB and has 1550.0 MiB (450.0 MiB missing)"
    asked = {"status": "oom", "reason": reason}
    assert tables.note(ok.model_copy(update={**asked, "peak_memory_bytes": 2_500_000_000})) == (
        f"{reason}; depends on usable_memory_bytes, which may be up to 2384.2 MiB"
    )
    assert tables.note(ok.model_copy(update={**asked, "peak_memory_bytes": 2_500_000_001})) == reason


def test_the_papers_hours_stand_beside_ours(by_testbed: dict[str, Setting]) -> None:
    setting = by_testbed["pac-nano-4"]
    cell = next(c for c in load("pac").cells if c.unit == "h" and c.system == "EDDL")
    same = Comparison(replace(cell, model="T5-tiny"), 0.1, "eddl")
    table = tables.runs(setting, {"table2": [same]})
    beside = {key: row["paper, h"] for key, row in rows(table).items() if isinstance(row["paper, h"], str)}
    assert beside == {("t5-tiny", "eddl"): "OOM"}
    assert "in all, h" in table.frame


def test_fitted_cells_are_marked_and_not_in_the_mean() -> None:
    paper = load("pac")
    cells = [c for c in paper.cells if c.artefact == "fig8a" and c.technique == "Full"][:2]
    comparisons = [
        Comparison(replace(cells[0], value="1"), 3.0, "one board", fitted=True),
        Comparison(replace(cells[1], value="1"), 1.1, "one board"),
    ]
    table = tables.beside(paper, "fig8a", comparisons)
    assert table.frame["error"].tolist() == ["(+200.0%) fitted", "+10.0%"]
    assert table.notes[0] == "Mean absolute error over 1 cells: 10.0%."
    assert table.title.endswith("Figure 8(a)")


def test_constants_with_their_ranges(by_testbed: dict[str, Setting]) -> None:
    table = tables.constants(by_testbed["pac-nano-4"])
    assert table is not None
    found = {(row["of"], row["constant"]): row for row in table.frame.to_dict("records")}
    known = library.load("pac-nano-4").assumptions
    assert set(found) == {(a.owner, a.key) for a in known}
    assert (
        found["link", "latency_s"]["low"] <= found["link", "latency_s"]["value"] <= found["link", "latency_s"]["high"]
    )
    assert found["jetson-nano-10w", "efficiency_matmul_forward"]["origin"].startswith("fitted to pac fig8a")


def test_simulated_beside_real(by_testbed: dict[str, Setting], records: list[Record]) -> None:
    table = tables.modes(by_testbed["local-1"])
    assert table is not None
    by_mode = {r.mode: r for r in records if r.testbed == "local-1"}
    first = table.frame.iloc[0]
    assert first["emulated"] == by_mode["emulated"].total_time_s
    assert first["simulated / real"] == by_mode["simulated"].total_time_s / by_mode["emulated"].total_time_s
    assert tables.modes(by_testbed["pac-nano-4"]) is None


def test_dropout_masks_explain_part_of_what_is_kept() -> None:
    """bert-tiny, 3 rows of 8 tokens: masks of the embeddings, and per layer of scores, output and MLP; the pooled."""
    from results.dropout import kept_bytes

    workload = Workload(model="bert-tiny", dataset="mrpc", num_samples=3, batch_size=3, seq_len=8)
    width, heads, layers = 64, 4, 4
    elements = 3 * (8 * width + layers * (heads * 8 * 8 + 2 * 8 * width) + width)
    on_gpu, on_cpu, without, _ = kept_bytes(workload).values()
    assert on_cpu - on_gpu == 3 * elements
    assert without < on_gpu


def test_a_record_can_be_asked_again(records: list[Record]) -> None:
    record = next(r for r in records if r.testbed == "pac-nano-4" and r.method == "eddl")
    asked = again.request(record)
    assert asked is not None and asked.config_hash == record.provenance.config_hash
    assert again.workload(record) == asked.workload
    assert again.request(record.model_copy(update={"batch_size": 8})) is None
    unnamed = next(r for r in records if r.testbed == "small-3")
    assert again.request(unnamed) is None
