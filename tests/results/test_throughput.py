"""Tables of training on several testbeds: what is compared with what, and that ratios are those of the runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness import store
from harness.experiment import expand
from harness.records import Record
from harness.runner import sweep
from results import figures, report, throughput
from results.grids import label

TESTBEDS = ["nano-2@145us", "mix-1tx2-1nx@145us", "demo-hetero-3@145us", "nano-2@1000mbit@145us"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models by three methods on four testbeds, and two of Asteroid's own variants."""
    folder = tmp_path_factory.mktemp("trained")
    workload = {"model": ["bert-tiny", "t5-tiny"], "dataset": "synthetic", "batch_size": 16, "steps": 2, "seq_len": 32}
    for method, options in (
        ("asteroid", {"offload": [True, False]}),
        ("asteroid", {"planner": "exact"}),
        ("eddl", {"shares": "speed"}),
        ("gpipe", {}),
    ):
        asked = {"workload": workload, "run": {"method": method, "testbed": TESTBEDS}, "options": {method: options}}
        for outcome in sweep(expand(asked, "the test"), folder):
            assert outcome.record.status == "ok", outcome.record.reason
    return folder


@pytest.fixture(scope="module")
def records(out: Path) -> list[Record]:
    return store.load_all(out)


def test_the_system_as_it_is_comes_first_and_its_variants_are_apart(records: list[Record]) -> None:
    (grid,) = throughput.groups(records)
    assert grid.columns[0] == "asteroid"
    assert throughput.own(grid)[1:] == ["asteroid (offload=False)", "asteroid (planner=exact)"]
    assert throughput.others(grid) == ["eddl (shares=speed)", "gpipe"]
    assert [testbed for model, testbed in grid.cells if model == "bert-tiny"] == [
        "mix-1tx2-1nx@145us", "nano-2@1000mbit@145us", "nano-2@145us", "demo-hetero-3@145us",
    ]  # fmt: skip


def test_ratios_are_those_of_the_runs(records: list[Record]) -> None:
    (grid,) = throughput.groups(records)
    _, speed, parts = throughput.tables(grid)
    sent = next(throughput.details(grid))
    by_run = {(r.model, r.testbed, label(r)): r for r in records}
    for table, field in ((speed, "time_per_sample_s"), (parts, "time_per_sample_s"), (sent, "comm_bytes")):
        for row in table.frame.to_dict("records"):
            ours = by_run[row["model"], row["testbed"], "asteroid"]
            for name in [*table.frame.columns][2:]:
                other = by_run[row["model"], row["testbed"], name]
                assert row[name] == pytest.approx(getattr(other, field) / getattr(ours, field)), (name, field)
    worst = max(speed.frame["gpipe"])
    assert f"gpipe: {worst:.3g} at most (" in speed.notes[0]


def test_what_did_not_fit_says_so_and_has_no_ratio(records: list[Record]) -> None:
    lost = {
        "status": "oom",
        "reason": "device1 needs more",
        "time_per_sample_s": None,
        "throughput_samples_per_s": None,
    }
    changed = [r.model_copy(update=lost) if r.method == "gpipe" else r for r in records]
    rates, speed, *_ = throughput.tables(throughput.groups(changed)[0])
    assert set(rates.frame["gpipe"]) == {"out of memory"} and speed.frame["gpipe"].isna().all()


def test_details_are_of_the_first_method(records: list[Record]) -> None:
    _, peaks, devices, plans = throughput.details(throughput.groups(records)[0])
    run = next(r for r in records if label(r) == "asteroid" and r.testbed == "demo-hetero-3@145us")
    assert run.plan is not None and run.memory is not None
    row = next(r for r in plans.frame.to_dict("records") if (r["model"], r["testbed"]) == (run.model, run.testbed))
    assert row["asteroid"].count("|") == len(run.plan["grouping"]) - 1
    assert row["asteroid"].endswith(f"; {run.micro_batch_size} rows")
    row = next(r for r in devices.frame.to_dict("records") if (r["model"], r["testbed"]) == (run.model, run.testbed))
    for device, memory in run.memory.items():
        assert row[device].startswith(f"{memory.peak_bytes / 2**20:.0f} (")
    assert list(peaks.frame.columns)[2:] == list(throughput.groups(records)[0].columns)


def test_boards_and_papers_are_not_mixed(record: Callable[..., Record]) -> None:
    """Other boards make another comparison, and three testbeds one at all; PAC's stand beside the paper."""

    def on(*testbeds: str) -> list[Record]:
        return [record(testbed=t, method=m, method_options={}, time_per_sample_s=1.0) for t in testbeds for m in "ab"]

    assert len(throughput.groups(on("x", "y", "z@1000mbit"))) == 1
    assert throughput.groups(on("x", "y", "z@145us")) == throughput.groups(on("x", "y")) == []
    assert len(throughput.groups(on("x@145us", "y@145us", "z@10mbit@145us", "z", "y", "x"))) == 2
    assert throughput.groups(on("x", "y", "pac-nano-4")) == []
    assert throughput.groups(on("x", "y", "z")[::2]) == []


def test_one_testbed_has_figures_of_its_own(records: list[Record], out: Path) -> None:
    """That on which the lead is widest; of the others there are the tables."""
    (grid,) = throughput.groups(records)
    widest = throughput.widest(grid)
    leads = {
        testbed: max(
            min(cell[name].time_per_sample_s for name in throughput.others(grid)) / cell["asteroid"].time_per_sample_s
            for (_, where), cell in grid.cells.items()
            if where == testbed
        )
        for testbed in TESTBEDS
    }
    assert widest == max(leads, key=lambda testbed: leads[testbed])
    report.write(out)
    headings = [line for line in (out / "report.md").read_text().splitlines() if line.startswith("## ")]
    assert [line for line in headings if any(t in line for t in TESTBEDS)] == [
        f"## {widest}: full on synthetic, batch 16"
    ]
    assert "## Training on several testbeds" in headings
    runs = next(out.glob("tables/*-runs.csv")).read_text()
    assert "asteroid" in runs and "offload" not in runs
    (figure,) = figures.leads(grid, out / "figures" / "again")
    assert all(figure.path.with_name(figure.path.name + kind).exists() for kind in (".svg", ".png", ".csv"))
