from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from harness.records import Record, flat, schema_text

MakeRecord = Callable[..., Record]

ROOT = Path(__file__).resolve().parents[2]
#: Every field that readers of records may rely on.
CONTRACT = {
    *(
        "method",
        "method_options",
        "technique",
        "technique_options",
        "model",
        "dataset",
        "num_samples",
        "seq_len",
        "decoder_seq_len",
    ),
    *("batch_size", "micro_batch_size", "epochs", "optimizer", "dtype", "attn_implementation"),
    *("testbed", "mode", "num_devices", "dilation", "status", "reason"),
    *("total_time_s", "time_per_sample_s", "device_time_per_sample_s", "throughput_samples_per_s", "latency_s"),
    *("prefill_time_s", "time_per_token_s", "phases", "repeats", "iqr", "peak_memory_bytes", "memory"),
    *("comm_bytes", "comm_time_s", "compute_time_s", "bubble_fraction"),
    *("energy_j", "energy_net_of_idle_j", "energy_per_sample_j", "energy_source", "energy"),
    *("recovery", "planning_time_s", "plan"),
    *("loss", "metric", "max_rel_error", "provenance"),
}


def test_published_schema_is_the_generated_one() -> None:
    published = (ROOT / "docs" / "record.schema.json").read_text(encoding="utf-8")
    assert published == schema_text(), "write it again: python -m harness.records > docs/record.schema.json"


def test_contract_is_complete_and_every_field_is_written(record: MakeRecord) -> None:
    written = json.loads(record().json_line())
    assert set(written) >= CONTRACT
    assert set(written) == set(Record.model_fields)


def test_json_there_and_back(record: MakeRecord) -> None:
    full = record(
        total_time_s=1.5,
        phases=[{"name": "train", "repeat": 2, "time_s": 1.5, "comm_bytes": 8}],
        memory={"device0": {"peak_bytes": 10, "weights_bytes": 4}},
        energy={"device0": {"idle_j": 1.0, "compute_j": 2.0, "communication_j": 0.0}},
        plan={"cuts": [0, 3]},
    )
    assert Record.model_validate_json(full.json_line()) == full
    assert "\n" not in full.json_line()


def test_flat_row_has_one_scalar_or_text_per_field(record: MakeRecord) -> None:
    row = flat(record(memory={"device0": {"peak_bytes": 10}}))
    assert list(row) == list(Record.model_fields)
    assert all(value is None or isinstance(value, str | int | float) for value in row.values())
    assert json.loads(row["memory"])["device0"]["peak_bytes"] == 10
    assert row["epochs"] == 3


@pytest.mark.parametrize("wrong", [{"speed": 1}, {"total_time_s": float("nan")}, {"status": "fine"}, {"epochs": "x"}])
def test_what_is_not_in_the_contract_is_refused(record: MakeRecord, wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        record(**wrong)
