"""Efficiencies of more devices, and what is claimed of Galaxy, from records made by hand and by the simulator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness import store
from harness.experiment import expand
from harness.records import Record
from harness.runner import run
from results import galaxy_claims, latency, report, scaling
from tests.harness.conftest import ASKED

STANDS = galaxy_claims.STANDS


@pytest.fixture
def made() -> Callable[..., Record]:
    """A simulated request on so many devices of a family."""

    def make(devices: int, seq_len: int, seconds: float, method: str = "galaxy", **changed: object) -> Record:
        asked = {
            "model": "gpt2-large",
            "technique": "inference",
            "method": method,
            "method_options": STANDS[method],
            "testbed": f"galaxy-m-{devices}@16gib",
            "num_devices": devices,
            "seq_len": seq_len,
            "latency_s": seconds,
        }
        return Record.model_validate({**ASKED, **asked, **changed})

    return make


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


def test_claims_stand_beside_the_most_of_ours(made: Callable[..., Record]) -> None:
    def on(testbed: str, method: str, seconds: float, **changed: object) -> Record:
        return made(2, 284, seconds, method, testbed=testbed, **changed)

    records = [
        on("galaxy-d", "galaxy", 10.0),
        on("galaxy-d", "megatron", 13.0),
        on("galaxy-e", "galaxy", 10.0),
        on("galaxy-e", "megatron", 24.0),
        on("galaxy-e", "megatron", 99.0, method_options={"shares": "speed"}),
        on("galaxy-a", "galaxy", 10.0),
        on("galaxy-a", "sequence-parallel", 26.0),
        on("galaxy-b", "megatron", 99.0),
    ]
    table = galaxy_claims.table(records)
    assert table is not None
    by_words = {row["claim"]: row for row in table.frame.to_dict("records")}
    most = by_words["end-to-end latency lower than the state of the art by up to"]
    assert (most["ours"], most["from"]) == ("2.6 x", "sequence-parallel, gpt2-large on galaxy-a")
    assert by_words["the same on Jetson Nano, from and to"]["ours"] == "1.3 to 2.4 x"
    assert galaxy_claims.table([on("galaxy-e", "megatron", 24.0)]) is None


def test_claims_of_scaling_stand_beside_the_same_links(made: Callable[..., Record]) -> None:
    quick = [
        made(1, 71, 10.0, testbed="galaxy-m-1@1000mbit@16gib"),
        made(4, 284, 10.1, testbed="galaxy-m-4@1000mbit@16gib"),
    ]
    usual = [made(1, 71, 10.0), made(4, 284, 12.5)]
    for records in (quick + usual, usual + quick):
        table = galaxy_claims.table(records)
        assert table is not None
        assert list(table.frame["ours"]) == ["80 %"]
        assert list(table.frame["from"]) == ["71 tokens per device, galaxy-m-4@16gib"]
    assert galaxy_claims.table(quick) is None


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
