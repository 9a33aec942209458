"""Runs for real on this machine carry what it drew meanwhile: the host's energy, and no device's."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import harness
from harness import meters, runner
from harness.errors import OrreryError
from harness.experiment import one
from harness.meters.measurement import Measurement
from harness.records import HostEnergy, Record
from tests.testbeds.processes import nothing_left, own_folders

__all__ = ["own_folders"]

WATTS = 40.0
WORKLOAD = {"model": "bert-tiny", "dataset": "synthetic", "num_samples": 32, "batch_size": 8, "seq_len": 16, "steps": 8}
ASKED = {**WORKLOAD, "method": "gpipe", "testbed": "local-2", "mode": "emulated"}
REQUEST = one(ASKED, {"micro_batch_size": 4})


@pytest.fixture
def plug(tmp_path: Path) -> Iterator[str]:
    """A meter at the wall that shows the same power all the time, as a program would log it."""
    path, stop = tmp_path / "plug", threading.Event()

    def work() -> None:
        with path.open("a", buffering=1) as file:
            while not stop.wait(0.05):
                file.write(f"{time.monotonic():.6f} {WATTS}\n")

    thread = threading.Thread(target=work)
    thread.start()
    while not path.exists() or not path.stat().st_size:
        time.sleep(0.01)
    yield f"external:{path}"
    stop.set()
    thread.join()


def swept(out: Path, *requests: Any, **choice: Any) -> list[Record]:
    return [outcome.record for outcome in runner.sweep(requests, out, meter=meters.Choice(**choice))]


def test_a_real_run_carries_the_hosts_energy(own_folders: Path, plug: str, tmp_path: Path) -> None:
    twice = dataclasses.replace(REQUEST, repeats=2)
    with nothing_left(own_folders):
        (record,) = swept(tmp_path / "out", twice, name=plug, carbon="100")
    host = record.host_energy
    assert (record.status, record.repeats) == ("ok", 2)
    assert host is not None and host.reason is None
    assert host.energy_j == pytest.approx(WATTS * host.duration_s)
    assert host.duration_s is not None and record.total_time_s is not None and host.duration_s > record.total_time_s
    assert (host.energy_source, host.meter) == ("external", plug.replace(":", ": ", 1))
    assert host.carbon_g == pytest.approx(host.energy_j / 3.6e6 * 100)
    assert (record.energy_j, record.energy_source, record.energy) == (None, None, None), "no device drew it"
    assert Record.model_validate_json(record.json_line()) == record


def test_the_meter_is_no_part_of_the_question(own_folders: Path, plug: str, tmp_path: Path) -> None:
    (unmetered,) = swept(tmp_path / "out", REQUEST, name="none")
    (stored,) = swept(tmp_path / "out", REQUEST, name=plug)
    assert unmetered.host_energy is not None and unmetered.host_energy.reason == "No meter was wanted."
    assert stored == unmetered, "it has been answered; --force asks again"


def test_without_a_meter_there_is_a_reason_and_never_a_model(
    own_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meters, "FOUND", ())
    record = harness.run(**ASKED, options={"micro_batch_size": 4})
    host = record.host_energy
    assert host is not None
    assert (host.meter, host.energy_j, host.energy_source) == ("none", None, None)
    assert host.reason is not None and host.reason.startswith("No meter was found.")


def test_a_meter_that_is_named_must_be_there(own_folders: Path, tmp_path: Path) -> None:
    with pytest.raises(OrreryError, match=r"meter external:.* can't be used here: .*No such file"):
        swept(tmp_path / "out", REQUEST, name=f"external:{tmp_path / 'nothing'}")


def test_simulated_runs_are_not_metered(tmp_path: Path) -> None:
    simulated = dataclasses.replace(REQUEST, mode="simulated")
    for choice in (meters.Choice(), meters.Choice(f"external:{tmp_path / 'nothing'}")):
        assert runner.run(simulated, choice).host_energy is None
    (record,) = swept(tmp_path / "out", simulated, name=f"external:{tmp_path / 'nothing'}")
    assert record.host_energy is None


class Recorder:
    """A meter that counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def begin(self) -> None:
        self.calls.append("begin")

    def end(self) -> Measurement:
        self.calls.append("end")
        return Measurement("recorder")

    def close(self) -> None:
        self.calls.append("close")


def test_a_run_that_breaks_ends_its_window() -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    meter = Recorder()
    series = runner._Series(REQUEST, meter=meter)
    with pytest.raises(RuntimeError, match="broken"):
        series._metered(broken)
    assert meter.calls == ["begin", "end"]


def test_the_record_has_every_field_of_a_measurement() -> None:
    assert list(HostEnergy.model_fields) == [field.name for field in dataclasses.fields(Measurement)]
