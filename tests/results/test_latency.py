"""Tables of request latencies: systems first, what did not fit said so, ratios against the first method."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.experiment import Request, read
from harness.records import Record
from harness.runner import run
from results import latency

EXPERIMENT = """
[workload]
model = ["bert-tiny"]
dataset = "synthetic"
num_samples = 1
technique = "inference"
batch_size = 1
seq_len = 64

[run]
method = ["megatron", "standalone", "galaxy"]
testbed = ["galaxy-e", "galaxy-e@1000mbit"]

[options.galaxy]
overlap = [true, false]
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    file: Path = tmp_path_factory.mktemp("latency") / "experiment.toml"
    file.write_text(EXPERIMENT)
    asked: list[Request] = read(file)
    return [run(request) for request in asked]


def test_every_environment_has_a_row_and_every_method_a_column(records: list[Record]) -> None:
    (group,) = latency.groups(records)
    assert group.columns == ("galaxy (overlap=True)", "galaxy (overlap=False)", "megatron", "standalone")
    frame = latency.latencies("x", group).frame
    assert list(frame["testbed"]) == ["galaxy-e", "galaxy-e@1000mbit"]
    by_name = {(r.method, r.testbed, r.method_options.get("overlap")): r for r in records}
    assert frame["megatron"][0] == f"{by_name['megatron', 'galaxy-e', None].latency_s:.4g}"


def test_ratios_are_of_the_first_method(records: list[Record]) -> None:
    (group,) = latency.groups(records)
    table = latency.speedups("x", group)
    assert table is not None
    seconds = {(r.method, r.testbed): r.latency_s for r in records if r.method_options.get("overlap", True)}
    for _, row in table.frame.iterrows():
        wanted = seconds["megatron", row["testbed"]] / seconds["galaxy", row["testbed"]]
        assert row["megatron"] == pytest.approx(wanted)
    assert "at most (bert-tiny on galaxy-e" in table.notes[0]


def test_what_did_not_fit_has_no_ratio(records: list[Record]) -> None:
    missing = {"status": "oom", "reason": "device1 needs more", "latency_s": None}
    changed = [r.model_copy(update=missing) if r.method == "megatron" else r for r in records]
    (group,) = latency.groups(changed)
    assert set(latency.latencies("x", group).frame["megatron"]) == {"out of memory"}
    table = latency.speedups("x", group)
    assert table is not None
    assert table.frame["megatron"].isna().all()
    assert "megatron" not in table.notes[0]


def test_nothing_of_training_or_of_a_single_method(records: list[Record]) -> None:
    assert latency.groups([r.model_copy(update={"technique": "full"}) for r in records]) == []
    assert latency.groups([r for r in records if r.method == "megatron"]) == []
