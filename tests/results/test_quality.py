from __future__ import annotations

import statistics
from typing import Any

import pytest

from harness import datasets
from harness.records import Provenance, Record
from harness.techniques import all_options
from results import quality
from results.comparison import qualities
from results.papers import load

#: Technique -> points of three seeds.
METRICS = {
    "full": (84.0, 85.0, 86.0),
    "adapters": (82.0, 84.0, 83.0),
    "lora": (80.0, 81.0, 82.0),
    "parallel-adapters": (83.0, 84.0, 82.0),
}
SECONDS = {"full": 100.0, "adapters": 80.0, "lora": 90.0, "parallel-adapters": 40.0}
ORIGIN: dict[str, Any] = {"schema_version": 2, "package_version": None, "git_commit": None, "git_dirty": None}
NOWHERE: dict[str, Any] = {"libraries": {}, "host": {}, "devices": {}, "assumptions": []}


def made_up(technique: str, seed: int, metric: float | None, **changed: Any) -> Record:
    """A run of T5-Base as Table 3 has it, on two processes of this machine."""
    asked: dict[str, Any] = {
        "method": "eddl",
        "method_options": {},
        "technique": technique,
        "technique_options": all_options(technique),
        "model": "t5-base",
        "dataset": "mrpc",
        "num_samples": 3668,
        "seq_len": 128,
        "decoder_seq_len": 1,
        "image_size": None,
        "batch_size": 16,
        "epochs": 3,
        "steps": None,
        "optimizer": "adamw",
        "learning_rate": 3e-4,
        "clip_norm": None,
        "dropout": None,
        "dtype": "float32",
        "attn_implementation": "eager",
        "checkpoint": "google-t5/t5-base",
        "testbed": "local-2",
        "mode": "emulated",
        "num_devices": 2,
        "status": "ok",
    }
    if technique == "parallel-adapters":
        asked.update(method="pac", method_options={"cache": False}, learning_rate=1e-3)
    asked |= {"total_time_s": SECONDS[technique] + seed, "peak_memory_bytes": 2**20, "metric": metric, **changed}
    name = f"{technique}{seed}{changed}"
    return Record(**asked, provenance=Provenance(**ORIGIN, **NOWHERE, seed=seed, config_hash=name, code_digest=""))


def runs(**changed: Any) -> list[Record]:
    return [made_up(name, seed, m, **changed) for name, found in METRICS.items() for seed, m in enumerate(found)]


def test_means_spread_and_shares_of_full() -> None:
    (group,) = quality.groups(reversed(runs()))
    frame = quality.table("x", group).frame.set_index("technique")
    assert list(frame.index) == ["full", "lora", "adapters", "parallel-adapters"]
    assert {*frame["seeds"]} == {3}
    for name, found in METRICS.items():
        row = frame.loc[name]
        assert row["mean"] == pytest.approx(statistics.fmean(found))
        assert row["deviation"] == pytest.approx(statistics.stdev(found))
        assert (row["lowest"], row["highest"]) == (min(found), max(found))
        assert row["of full's time"] == pytest.approx((SECONDS[name] + 1) / 101), "medians over seeds"
    assert {*frame["of full's peak"]} == {1.0}


@pytest.mark.parametrize(("shift", "place"), [(0, "within"), (-2.9, "within"), (-3.1, "below"), (3.1, "above")])
def test_the_verdict_is_by_the_others_lowest_and_highest_run(shift: float, place: str) -> None:
    """Of the others: 80 to 86, mean 83. Parallel adapters have a mean of 83 before they are shifted."""
    changed = [r.model_copy(update={"metric": r.metric + shift}) if r.method == "pac" else r for r in runs()]
    (group,) = quality.groups(changed)
    (verdict,) = (note for note in quality.table("x", group).notes if note.startswith("parallel-adapters"))
    assert f"without a cache: {shift:+.2f} points from the mean" in verdict
    assert f"is {place} their spread" in verdict and "80.00 to 86.00" in verdict


def test_with_and_without_a_cache_are_two_rows() -> None:
    phases = [
        {"name": "train", "repeat": 1, "time_s": 20.0, "comm_bytes": 0},
        {"name": "cached epoch", "repeat": 2, "time_s": 6.0, "comm_bytes": 0},
    ]
    cached = [made_up("parallel-adapters", s, 83.0, method_options={"cache": True}, phases=phases) for s in range(2)]
    (group,) = quality.groups([*runs(phases=phases[:1]), *cached])
    frame = quality.table("x", group).frame
    beside = frame[frame["technique"] == "parallel-adapters"]
    assert list(beside["cache"]) == ["no", "yes"] and list(beside["seeds"]) == [3, 2]
    assert list(beside["later epoch, s"]) == pytest.approx([41 / 3, 3.0])
    assert sum(note.startswith("parallel-adapters with") for note in quality.table("x", group).notes) == 2


def test_what_was_not_evaluated_or_asked_differently_is_in_no_group() -> None:
    assert quality.groups([made_up("full", 0, None), made_up("full", 1, 80.0, status="failed")]) == []
    apart = [made_up("full", 0, 80.0), made_up("lora", 0, 80.0, dataset="stsb"), made_up("lora", 0, 80.0, epochs=1)]
    assert len(quality.groups(apart)) == 3
    assert quality.text([]) == ""
    alone = quality.text(apart[:1])
    assert "t5-base on mrpc: mean of F1 and accuracy" in alone and "parallel-adapters" not in alone


def test_the_same_training_is_beside_table_3() -> None:
    """On whichever testbed. Printed are 89.71 (full) and 88.24 (parallel adapters) for T5-Base on MRPC."""
    paper, (group,) = load("pac"), quality.groups(runs())
    found = {c.cell.technique: c for c in qualities(paper, [row.records for row in group.rows])}
    assert {name: c.cell.value for name, c in found.items()} == {
        "Full": "89.71",
        "Adapters": "88.73",
        "LoRA": "86.27",
        "PA": "88.24",
    }
    assert found["Full"].ours == 85 and found["Full"].difference == pytest.approx(85 / 89.71 - 1)
    assert found["PA"].how == "pac, mean of 3 seeds"
    tables = list(quality.tables([group]))
    assert [table.name for table in tables] == ["quality-1-t5-base-mrpc", "quality-1-t5-base-mrpc-pac-table3"]
    assert not any("T5-Base" in column for column in tables[0].frame), "other models only"


def test_another_model_or_a_part_of_the_data_is_in_no_error_figure() -> None:
    """Table 3 is shown beside it as what it is: of other models."""
    for changed in ({"model": "minilm-l6"}, {"num_samples": 1024}, {"epochs": 1}):
        (group,) = quality.groups(runs(**changed))
        (table,) = quality.tables([group])
        if "model" in changed:
            row = table.frame.set_index("technique").loc["parallel-adapters"]
            assert [row[f"in PAC, {model}"] for model in ("T5-Base", "BART-Large", "T5-Large")] == [
                *("88.24", "87.71", "91.70")
            ]
            assert any("context only" in note for note in table.notes)


def test_every_table_3_cell_is_of_a_data_set_and_technique_that_can_be_run() -> None:
    cells = [cell for cell in load("pac").cells if cell.is_quality]
    ours = {load("pac").technique(cell) for cell in cells}
    assert len(cells) >= 48 and {*METRICS} <= ours
    names = {"MRPC": "mrpc", "STS-B": "stsb", "SST-2": "sst2", "QNLI": "qnli"}
    assert {cell.dataset for cell in cells} == {*names}
    assert all(datasets.spec(name).validation for name in names.values())
