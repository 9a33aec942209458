"""Real models on this project's unequal testbeds: every pipeline of Asteroid's comparison ends in a row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import harness
from harness.records import Record
from harness.registry import load_testbed

METHODS: dict[str, tuple[dict[str, object], ...]] = {
    "eddl": ({"shares": "speed"},),
    "gpipe": ({}, {"cuts": "mean-time"}),
    "pipedream": ({}, {"transfers": True}, {"memory": True}),
    "dapple": ({}, {"estimate": "pivot"}, {"warmup": "PA"}),
}
CASES = [(method, options) for method, several in METHODS.items() for options in several]
UNEQUAL = ("demo-hetero-3", "mix-2nano-1tx2-1nx-100mbit")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is counted is kept for these tests only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def pis(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Boards for which rates of convolutions are known. Those of the Jetson boards are not."""
    path: Path = tmp_path_factory.mktemp("testbeds") / "pis.toml"
    path.write_text(
        """
        description = "Unequal boards"
        modes = ["simulated"]
        devices = [{profile = "raspberry-pi-4b-4gb", count = 2}, {profile = "raspberry-pi-5-8gb"}]
        link.medium = "ethernet"
        link.duplex = "full"
        link.nominal_mbit_per_s = {value = 100, provenance = "definition", source = "a test"}
        link.tcp_efficiency = {value = 0.94, provenance = "derived", source = "a test"}
        link.latency_s = {value = 0.2e-3, low = 0.1e-3, high = 1e-3, provenance = "assumed", source = "a test"}
        """
    )
    return str(path)


def row(method: str, options: dict[str, object], testbed: str, **asked: object) -> Record:
    return harness.run(method=method, options=options, testbed=testbed, num_samples=64, **asked)


def is_sound(record: Record, testbed: str, num_layers: int) -> None:
    """An ok row has all samples and layers, and fits; an oom row says of a device what it needs and has."""
    memory = {device.name: device.memory_bytes for device in load_testbed(testbed).cluster.devices}
    if record.status == "oom":
        needed = re.fullmatch(r"(device\d) needs ([\d.]+) MiB and has ([\d.]+) MiB \(.* missing\)", str(record.reason))
        assert needed is not None, record.reason
        assert float(needed[3]) == pytest.approx(memory[needed[1]] / 2**20, abs=0.1)
        assert float(needed[2]) > float(needed[3])
        return
    assert record.status == "ok" and record.plan is not None and record.total_time_s
    assert record.throughput_samples_per_s == pytest.approx(64 / record.total_time_s)
    cuts = record.plan["layer_cuts"]
    assert [first for first, _ in cuts] == [0, *(last for _, last in cuts[:-1])] and cuts[-1][1] == num_layers
    names = [name for group in record.plan["devices"] for name in group]
    assert names == list(memory)[: len(names)]
    assert record.memory is not None
    assert all(parts.peak_bytes <= memory[name] for name, parts in record.memory.items())


@pytest.mark.parametrize(
    ("testbed", "dataset"), [(UNEQUAL[0], "synthetic"), (UNEQUAL[0], "mrpc"), (UNEQUAL[1], "mrpc")]
)
@pytest.mark.parametrize(("method", "options"), CASES)
def test_bert_small(method: str, options: dict[str, object], testbed: str, dataset: str) -> None:
    record = row(method, options, testbed, model="bert-small", dataset=dataset)
    assert record.status == "ok"
    is_sound(record, testbed, num_layers=6)


@pytest.mark.parametrize(("method", "options"), CASES)
def test_resnet_50(method: str, options: dict[str, object], pis: str) -> None:
    record = row(method, options, pis, model="resnet-50", dataset="cifar10")
    assert record.status == "ok"
    is_sound(record, pis, num_layers=18)


def test_what_is_too_large_is_an_out_of_memory_row() -> None:
    """BERT-Large with AdamW: stages by time don't fit a Nano, and those by PipeDream's account of memory do."""
    statuses = []
    for method, options in CASES:
        record = row(method, options, "demo-hetero-3", model="bert-large", dataset="mrpc", optimizer="adamw")
        is_sound(record, "demo-hetero-3", num_layers=26)
        statuses.append((method, options, record.status))
    assert ("eddl", {"shares": "speed"}, "oom") in statuses
    assert ("gpipe", {}, "ok") in statuses
    assert ("pipedream", {}, "oom") in statuses and ("pipedream", {"memory": True}, "ok") in statuses
    assert ("dapple", {}, "oom") in statuses
