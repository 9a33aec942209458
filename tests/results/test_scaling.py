"""Efficiencies of more devices, from records made by hand and by the simulator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness import store
from harness.experiment import expand
from harness.records import Record
from harness.runner import run
from results import latency, report, scaling


def test_strong_and_weak_scaling_are_what_they_say(made: Callable[..., Record]) -> None:
    records = [made(1, 70, 10.0), made(1, 280, 44.0), made(4, 280, 12.5), made(2, 140, 11.0)]
    (group,) = scaling.groups(records)
    (key,) = group.seconds
    assert group.strong(key, 4, 280) == pytest.approx(100 * 44 / (4 * 12.5))
    assert group.weak(key, 4, 70) == pytest.approx(100 * 10 / 12.5)
    assert group.weak(key, 3, 70) is None
    strong, weak = scaling.tables([group])
    assert strong.title == "Strong scaling on galaxy-m-N@16gib, simulated, % of linear: 280 tokens"
    assert strong.cells() == [["gpt2-large", "galaxy", "-", "88 %"]]
    assert weak.cells() == [["gpt2-large", "galaxy", "91 %", "80 %"]]


def test_training_scales_by_its_batches(record: Callable[..., Record]) -> None:
    """As many samples a batch on more devices, or as many on each; what leaves devices idle does not scale."""

    def trained(devices: int, batch: int, seconds: float, **changed: object) -> Record:
        asked = {"method": "asteroid", "method_options": {}, "testbed": f"nano-{devices}@145us", "num_devices": devices}
        return record(**{**asked, "batch_size": batch, "time_per_sample_s": seconds / batch, **changed})

    runs = [trained(1, 32, 4.0), trained(1, 128, 15.0), trained(4, 128, 5.0), trained(4, 128, 5.0, mode="emulated")]
    (group,) = scaling.groups(runs)
    (key,) = group.seconds
    assert group.training and key == ("bert-tiny", "asteroid")
    assert group.strong(key, 4, 128) == pytest.approx(100 * 15 / (4 * 5))
    assert group.weak(key, 4, 32) == pytest.approx(100 * 4 / 5)
    strong, weak = scaling.tables([group])
    assert strong.title == "Strong scaling on nano-N@145us, simulated, % of linear: 128 samples a batch"
    assert weak.cells() == [["bert-tiny", "asteroid", "80 %"]]
    alone = {"memory": {"device0": {"peak_bytes": 1}}}
    assert scaling.groups([runs[1], trained(4, 128, 15.0, **alone)]) == []
    assert scaling.groups([trained(n, 128, 9.0 / n, testbed=f"pac-nano-{n}") for n in (1, 4)]) == []


def test_only_families_with_a_single_device_scale(made: Callable[..., Record]) -> None:
    alone, others = made(1, 70, 10.0), [made(2, 70, 5.5), made(4, 70, 3.0)]
    assert scaling.groups(others) == []
    assert scaling.groups([alone, made(2, 70, 5.5, testbed="galaxy-m-2@1000mbit@16gib")]) == []
    links = [group.links for group in scaling.groups([alone, *others, made(1, 70, 9.0, testbed="galaxy-m-1@5ms")])]
    assert links == ["@16gib"]
    beside = [made(n, 70, 4.0, method="megatron", testbed=f"galaxy-gpu-{n}") for n in (2, 4)]
    ours = [made(n, 70, 3.0, testbed=f"galaxy-gpu-{n}") for n in (2, 4)]
    (group,) = latency.groups([alone, *others, *beside, *ours])
    only = [
        made(1, 70, 9.0, testbed="local-1"),
        *(made(2, 70, 5.0, m, testbed="local-2") for m in ("galaxy", "megatron")),
    ]
    only += [made(1, 140, 8.0, "megatron", testbed="local-1")]
    assert {r.method for g in scaling.groups(only) for r in g.records} == {"galaxy"}
    assert scaling.groups(only[1:3]) == [] and len(latency.groups(only[1:3])) == 1
    assert {testbed for _, testbed in group.cells} == {"galaxy-gpu-2", "galaxy-gpu-4"}


def test_the_parts_of_a_generation_have_tables() -> None:
    asked = {
        "workload": {
            "model": "gpt2-tiny",
            "dataset": "synthetic",
            "technique": "inference",
            "num_samples": 2,
            "batch_size": 1,
            "seq_len": 32,
            "new_tokens": 8,
        },
        "run": {"method": ["galaxy", "megatron"], "testbed": "galaxy-c"},
    }
    records = [run(request) for request in expand(asked, "a test")]
    (group,) = latency.groups(records)
    request, first, further, _ = latency.tables([group])
    assert "further token" in further.title and "32 tokens and 8 new ones" in request.title
    for column, record in zip(group.columns, records, strict=True):
        assert record.latency_s == pytest.approx(record.prefill_time_s + 7 * record.time_per_token_s)
        assert first.frame[column][0] == f"{record.prefill_time_s:.4g}"
        assert further.frame[column][0] == f"{record.time_per_token_s:.4g}"


def test_what_scales_has_its_tables_and_no_section_per_testbed(tmp_path: Path) -> None:
    asked = {
        "workload": {
            "model": "bert-tiny",
            "dataset": "synthetic",
            "technique": "inference",
            "num_samples": 1,
            "batch_size": 1,
            "seq_len": 32,
        },
        "run": {"method": "galaxy", "testbed": ["galaxy-m-1", "galaxy-m-2", "galaxy-c"]},
    }
    for request in expand(asked, "a test"):
        store.save(tmp_path, run(request))
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert "## Latency on more devices" in headings
    assert [line for line in headings if "galaxy-" in line] == ["## galaxy-c: inference on synthetic, batch 1"]
    assert not list((tmp_path / "figures").glob("galaxy-m-*"))
