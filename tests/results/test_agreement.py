"""The table that lays the simulator beside real runs: its arithmetic on made-up times, and the section on real ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from harness import store
from harness.records import Record
from harness.trace_export import read_chrome_trace
from results import agreement, figures, report
from results.agreement import Pair
from results.settings import settings

METHODS = ("eddl", "gpipe", "pipedream-1f1b")
LINK = ("nominal_mbit_per_s", "measured_mbit_per_s")
ABOUT = {
    "shaped": True,
    "devices": {
        f"device{rank}": {
            "cpu_share": 0.35,
            "measured_cpu_share": 0.34 + rank / 100,
            "quota_us_period_us": [2100, 6000],
            "nominal_mbit_per_s": 52.3,
            "measured_mbit_per_s": 49.0 + rank,
        }
        for rank in range(2)
    },
}


@pytest.fixture
def real(records: list[Record]) -> Record:
    return next(r for r in records if (r.testbed, r.method, r.mode) == ("local-2", "eddl", "emulated"))


def answers(
    real: Record, emulated_s: float, simulated_s: float, compute_s: float = 1.0, comm_s: float = 0.1, **asked: object
) -> list[Record]:
    """One question in both modes: ten iterations, `compute_s` and `comm_s` in either mode."""
    common = {**asked, "steps": 10, "compute_time_s": compute_s, "comm_time_s": comm_s}
    return [
        real.model_copy(
            update={**common, "mode": mode, "total_time_s": seconds, "emulation": ABOUT if mode == "emulated" else None}
        )
        for mode, seconds in (("emulated", emulated_s), ("simulated", simulated_s))
    ]


def pairs(*records: Record) -> list[Pair]:
    return agreement.pairs(settings(records))


def test_seconds_errors_and_shares_of_a_pair(real: Record) -> None:
    (pair,) = pairs(*answers(real, emulated_s=10.0, simulated_s=9.0, compute_s=6.0, comm_s=5.0))
    assert (pair.emulated_s, pair.simulated_s) == (1.0, 0.9)
    assert pair.error == pytest.approx(-0.1)
    assert pair.error_without_overlap == pytest.approx(0.1)
    assert pair.shares == (0.6, 0.5)
    by_epoch = [r.model_copy(update={"steps": None, "epochs": 2}) for r in (pair.emulated, pair.simulated)]
    (pair,) = pairs(*by_epoch)
    assert pair.emulated_s == 10.0 / 4, "two epochs of 16 samples in batches of 8"


def test_only_the_same_question_on_several_devices_is_a_pair(real: Record) -> None:
    emulated, simulated = answers(real, 10.0, 9.0)
    assert len(pairs(emulated, simulated)) == 1
    for other in (
        {"batch_size": 4},
        {"model": "t5-tiny"},
        {"method": "gpipe"},
        {"clip_norm": 1.0},
        {"status": "failed"},
    ):
        assert pairs(emulated, simulated.model_copy(update=other)) == []
    options = {"method_options": {**simulated.method_options, "shares": "speed"}}
    assert pairs(emulated, simulated.model_copy(update=options)) == []
    alone = [r.model_copy(update={"num_devices": 1}) for r in (emulated, simulated)]
    assert pairs(*alone) == []
    assert pairs(simulated) == []


def test_of_several_answers_that_of_the_most_repeats_counts(real: Record) -> None:
    emulated, simulated = answers(real, 10.0, 9.0)
    often = emulated.model_copy(update={"repeats": 3, "total_time_s": 12.0})
    (pair,) = pairs(often, emulated, simulated)
    assert pair.emulated is often


def test_cells_are_rows_in_the_order_of_the_report(real: Record) -> None:
    found = pairs(*(r for method in reversed(METHODS) for r in answers(real, 2.0, 3.0, 1.0, 0.5, method=method)))
    table = agreement.cells(found)
    assert table.frame["method"].tolist() == list(METHODS)
    assert table.cells()[0] == [
        *("local-2", "bert-tiny", "8", "eddl", "0.2", "0.3", "+50.0%", "-25.0%", "50.0%", "25.0%"),
        f"{real.max_rel_error:.1e}",
    ]
    assert table.heads == 4
    inference = answers(real, 2.0, 3.0, technique="inference", max_rel_error=None)
    both = agreement.cells([*found, *pairs(*inference)])
    assert "technique" in both.frame, "what tells rows apart is told"
    assert "max_rel_error" not in agreement.cells(pairs(*inference)).frame


def test_median_and_worst_error(real: Record) -> None:
    times = zip(METHODS, (1.1, 0.8, 1.02), strict=True)
    table = agreement.summary(pairs(*(r for m, s in times for r in answers(real, 1.0, s, 0.5, 0.3, method=m))))
    simulator, closed_form = table.frame.to_dict("records")
    assert (simulator["testbeds"], simulator["cells"]) == ("shaped", 3)
    assert simulator["median error"] == pytest.approx(0.1)
    assert simulator["worst error"] == pytest.approx(0.2)
    assert closed_form["median error"] == closed_form["worst error"] == pytest.approx(0.2)
    assert any("take 25% to 75% of the time in 3 of 3 cells" in note for note in table.notes)


def test_errors_of_unshaped_testbeds_stand_apart(real: Record) -> None:
    emulated, simulated = answers(real, 1.0, 1.5, method="gpipe")
    loopback = emulated.model_copy(update={"emulation": {"shaped": False}})
    table = agreement.summary(pairs(*answers(real, 1.0, 1.1), loopback, simulated))
    assert table.frame["testbeds"].tolist() == ["shaped", "shaped", "unshaped", "unshaped"]
    assert table.frame["worst error"].tolist()[::2] == pytest.approx([0.1, 0.5])
    assert any(note.startswith("Unshaped:") for note in table.notes)


@pytest.mark.parametrize(
    ("simulated_s", "alike"),
    [
        ((1.0, 2.0, 3.0), 1),
        ((1.0, 3.0, 2.0), 1),  # the slower two are 4 % apart: a tie
        ((2.0, 1.0, 3.0), 0),
        ((3.0, 2.0, 1.0), 0),
    ],
)
def test_methods_rank_alike(real: Record, simulated_s: tuple[float, ...], alike: int) -> None:
    times = zip(METHODS, (10.0, 20.0, 20.8), simulated_s, strict=True)
    found = pairs(*(r for m, emulated, s in times for r in answers(real, emulated, s, method=m)))
    assert agreement.ranked_alike(found) == (alike, 1)


def test_ranks_are_within_one_testbed_model_and_batch(real: Record) -> None:
    """Each group agrees with itself; together they would not."""
    groups = (({"batch_size": 4}, 1.0, 5.0), ({"model": "t5-tiny"}, 2.0, 1.0), ({"testbed": "local-4"}, 3.0, 0.1))
    found = pairs(
        *(
            r
            for asked, emulated, simulated in groups
            for method, times in (("eddl", 1.0), ("gpipe", 1.5))
            for r in answers(real, emulated * times, simulated * times, method=method, **asked)
        )
    )
    assert agreement.ranked_alike(found) == (3, 3)
    assert agreement.ranked_alike(found[:1]) == (0, 0), "a method alone has no rank"


def test_out_of_memory_in_both_modes_agrees(real: Record) -> None:
    emulated, simulated = answers(real, 1.0, 1.0, status="oom", method="gpipe")
    ok = answers(real, 1.0, 1.0, method="gpipe")
    kept = answers(real, 1.0, 1.0)
    for gpipe, agreed in (((emulated, simulated), 1), ((emulated, ok[1]), 0), ((ok[0], simulated), 0)):
        found = pairs(*kept, *gpipe)
        assert len(agreement.cells(found).frame) == 1
        text = f"Of 1 cells that ran out of memory in either mode, {agreed} did in both."
        assert text in agreement.summary(found).notes
    assert not any("memory" in note for note in agreement.summary(pairs(*kept, *ok)).notes)


def test_what_a_testbed_measured_of_itself(real: Record) -> None:
    first, second = answers(real, 1.0, 1.0), answers(real, 1.0, 1.0, method="gpipe")
    (table,) = agreement.measured(pairs(*first, *second))
    assert table.cells() == [
        ["device0", "0.35", "0.34", "0.34", "0.34", "52.3", "49"],
        ["device1", "0.35", "0.35", "0.35", "0.35", "52.3", "50"],
    ]
    devices = {name: {**device, "measured_cpu_share": 0.4} for name, device in ABOUT["devices"].items()}
    again = second[0].model_copy(update={"emulation": {**ABOUT, "devices": devices}})
    (table,) = agreement.measured(pairs(*first, again, second[1]))
    assert table.cells()[0] == ["device0", "0.35", "0.37", "0.34", "0.4", "52.3", "49"]
    assert table.notes[0].startswith("Medians of 2 measurements")
    paced = {
        name: {"late_share": 0.01 * rank, **{key: device[key] for key in ("cpu_share", *LINK)}}
        for rank, (name, device) in enumerate(ABOUT["devices"].items())
    }
    of_one = first[0].model_copy(update={"emulation": {**ABOUT, "devices": paced}})
    (table,) = agreement.measured(pairs(of_one, first[1]))
    assert table.cells()[1] == ["device1", "0.35", "1.0%", "1.0%", "52.3", "50"]
    unshaped = first[0].model_copy(update={"emulation": {"shaped": False}})
    assert list(agreement.measured(pairs(unshaped, first[1]))) == []


def test_real_runs_left_their_traces_and_no_others(swept: Path, records: list[Record]) -> None:
    real = [record for record in records if record.mode == "emulated"]
    assert {path.stem for path in (swept / "traces").iterdir()} == {r.provenance.config_hash for r in real}
    for record in real:
        devices, events = read_chrome_trace(store.trace_path(swept, record.provenance.config_hash))
        assert len(devices) == record.num_devices
        assert {event.device for event in events} == {*devices}


@pytest.fixture(scope="module")
def written(swept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agreement")
    for name in ("runs", "traces"):
        shutil.copytree(swept / name, folder / name)
    report.write(folder)
    return folder


def test_the_section_has_the_cells_and_both_timelines(written: Path) -> None:
    text = (written / "report.md").read_text()
    section = text.partition("## Simulated beside emulated")[2].partition("\n## ")[0]
    assert section.count("| local-2 | bert-tiny | 8 |") == 2
    assert "medians of repeats of real runs" in section
    frame = pd.read_csv(written / "tables" / "agreement.csv")
    assert frame["max_rel_error"].max() < 1e-5, "what was timed is what should have been computed"
    (picture,) = (written / "figures").glob("*-overlay.svg")
    assert picture.name == "local-2-full-synthetic-pipedream-1f1b-bert-tiny-overlay.svg"
    events = pd.read_csv(picture.with_suffix(".csv"))
    of_one = events[(events["phase"] == 0) & (events["iteration"] == 1)]
    labels = of_one.groupby("mode")["label"].apply(sorted)
    assert labels["emulated"] == labels["simulated"], "both did the same actions"


def test_the_section_is_absent_without_pairs(written: Path, tmp_path: Path) -> None:
    for record in store.load_all(written):
        if (record.testbed, record.mode) != ("local-2", "emulated"):
            store.save(tmp_path, record)
    report.write(tmp_path)
    assert "Simulated beside emulated" not in (tmp_path / "report.md").read_text()
    assert not list((tmp_path / "figures").glob("*-overlay.*"))


def test_timelines_of_other_times_than_the_records_are_not_drawn(written: Path, tmp_path: Path) -> None:
    """The times of this machine's layers may have been measured anew since."""
    found = agreement.pairs(settings(store.load_all(written)))
    shutil.copytree(written / "traces", tmp_path / "traces")
    changed = [
        Pair(p.setting, p.label, p.emulated, p.simulated.model_copy(update={"total_time_s": 1.0})) for p in found
    ]
    assert figures.laid_on_each_other(changed, tmp_path) is None
    drawn = figures.laid_on_each_other([*changed[1:], found[0]], tmp_path)
    assert drawn is not None and drawn.path.name.startswith(found[0].setting.name)
    shutil.rmtree(tmp_path / "traces")
    assert figures.laid_on_each_other(found, tmp_path) is None, "a run that left no trace"
