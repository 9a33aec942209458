"""Counters by Zeus. Zeus is replaced by a package of the same interface, because no machine of ours has its hardware:
what is tested is our side of it, the guards among it, and not Zeus."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from harness import meters
from harness.meters.measurement import COUNTER, RAIL, Measurement, NotHere
from harness.meters.system import System
from tests.harness.meters.trees import ONE_PARENT, board, new_layout

#: What Zeus 0.16 has of what we use; the results are filled in. It counts 10 W per second of a window.
FAKE = """
import time
from dataclasses import dataclass

class SoC:
    total_energy_mj = {total_mj}

class Result:
    gpu_energy, cpu_energy, dram_energy = {gpu}, {cpu}, {dram}
    soc_energy = {soc}

class ZeusMonitor:
    def __init__(self, gpu_indices=None, cpu_indices=None):
        assert (gpu_indices, cpu_indices) == ({indices}, {indices})
        print("Zeus says hello on standard output")
        {init}
        self.windows = set()
    def begin_window(self, key, sync_execution=True):
        assert not sync_execution and key not in self.windows
        self.windows.add(key)
    def end_window(self, key, sync_execution=True):
        assert not sync_execution
        self.windows.remove(key)
        return Result()
"""


@pytest.fixture
def zeus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Puts a package `zeus` onto the path."""

    def make(**changed: str) -> None:
        filled = {"total_mj": "None", "gpu": "{}", "cpu": "None", "dram": "None", "soc": "None", "indices": "None"}
        folder = tmp_path / "site/zeus"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        (folder / "monitor.py").write_text(FAKE.format(**{**filled, "init": "pass", **changed}))
        about = tmp_path / "site/zeus-0.16.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: zeus\nVersion: 0.16.0\n")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))

    return make


def window(system: System, seconds: float = 1.2) -> Measurement:
    with meters.opened(meters.Choice("zeus"), system) as meter:
        meter.begin()
        time.sleep(seconds)
        return meter.end()


def jetson(root: Path) -> System:
    new_layout(root, [ONE_PARENT])
    return board(root, "NVIDIA Jetson Orin Nano Developer Kit")


def test_gpus_and_processors_are_added(tmp_path: Path, zeus: object) -> None:
    zeus(gpu="{0: 30.0, 1: 20.0}", cpu="{0: 8.0}", dram="{0: 2.0}")
    found = window(System(tmp_path / "root"))
    assert (found.reason, found.energy_j, found.energy_source) == (None, 60, COUNTER)
    assert found.meter == "zeus 0.16.0"
    assert found.rails == ("gpu0", "gpu1", "cpu0", "dram0")
    assert found.mean_w == pytest.approx(60 / found.duration_s)
    assert (found.samples, found.min_w) == (None, None), "a counter has no samples"


def test_a_jetson_counts_its_total_and_asks_no_nvml(tmp_path: Path, zeus: object) -> None:
    zeus(total_mj="9000.0", soc="SoC()", gpu="{0: 1.0}", indices="[]")
    found = window(jetson(tmp_path / "root"))
    assert (found.reason, found.energy_j, found.energy_source) == (None, 9, RAIL)
    assert found.rails == ("total",)
    assert found.scope is not None and "module" in found.scope
    assert found.carrier_included is False


def test_a_jetson_without_a_total_is_refused(tmp_path: Path, zeus: object) -> None:
    zeus(soc="SoC()", indices="[]")
    with pytest.raises(NotHere, match=r"no rail that is this board's total.*--meter ina3221"):
        meters.named("zeus", jetson(tmp_path / "root"))


@pytest.mark.parametrize("joules", ["0.0", "-1.0"])
def test_a_counter_that_stands_or_goes_back_rejects_the_window(tmp_path: Path, zeus: object, joules: str) -> None:
    zeus(gpu=f"{{0: 30.0, 1: {joules}}}")
    found = window(System(tmp_path / "root"))
    assert found.energy_j is None
    assert found.reason == "These counters did not move: gpu1."


def test_a_short_window_has_no_figure(tmp_path: Path, zeus: object) -> None:
    zeus(gpu="{0: 30.0}")
    found = window(System(tmp_path / "root"), seconds=0.1)
    assert found.energy_j is None
    assert found.reason is not None and "no figure below 1 s" in found.reason


def test_nothing_to_count_is_refused(tmp_path: Path, zeus: object) -> None:
    zeus()
    with pytest.raises(NotHere, match="no GPU with an energy counter, and no readable RAPL"):
        meters.named("zeus", System(tmp_path / "root"))


def test_what_breaks_inside_is_said(tmp_path: Path, zeus: object) -> None:
    zeus(init="raise RuntimeError('NVML: driver not loaded')")
    with pytest.raises(NotHere, match="Zeus can't start: RuntimeError: NVML: driver not loaded"):
        meters.named("zeus", System(tmp_path / "root"))


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.meters import counters

    def missing(name: str) -> str:
        raise counters.PackageNotFoundError(name)

    monkeypatch.setattr(counters, "version", missing)
    with pytest.raises(NotHere, match=r"not installed.*pip install zeus"):
        meters.named("zeus", System(tmp_path))
