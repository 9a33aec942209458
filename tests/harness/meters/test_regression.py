"""Regressions on CPU load, by hand, and the load of /proc/stat."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from harness import meters
from harness.meters import regression
from harness.meters.measurement import REGRESSION, NotHere
from harness.meters.regression import counts, probe, watts
from harness.meters.system import System
from harness.meters.window import Unreadable
from tests.harness.meters.trees import board, write

PI_5 = "Raspberry Pi 5 Model B Rev 1.0"


@pytest.mark.parametrize(
    ("name", "idle_w", "full_w"),
    [
        ("pi-5b", 4.403, 7.861),
        ("pi-4b-1.2-64", 2.286, 6.820),
        ("pi-4b-1.1-64", 2.307, 6.803),
        ("pi-4b-1.2-32", 2.243, 5.727),
        ("pi-4b-1.1-32", 2.206, 5.918),
        ("pi-400", 1.822, 6.847),
        ("pi-3b-plus", 2.002, 5.300),
        ("pi-3b", 1.078, 4.555),
    ],
)
def test_by_hand(name: str, idle_w: float, full_w: float) -> None:
    assert watts(name, 0) == idle_w
    assert watts(name, 1) == pytest.approx(full_w)
    assert watts(name, 0.5) == pytest.approx((idle_w + full_w) / 2)


@pytest.mark.parametrize("load", [-0.01, 1.01, float("nan")])
def test_a_load_that_can_not_be_is_refused(load: float) -> None:
    with pytest.raises(Unreadable, match="0 to 1"):
        watts("pi-5b", load)


@pytest.mark.parametrize(
    ("model", "machine", "name"),
    [
        (PI_5, "aarch64", "pi-5b"),
        ("Raspberry Pi 4 Model B Rev 1.1", "aarch64", "pi-4b-1.1-64"),
        ("Raspberry Pi 4 Model B Rev 1.4", "aarch64", "pi-4b-1.2-64"),
        ("Raspberry Pi 4 Model B Rev 1.1", "armv7l", "pi-4b-1.1-32"),
        ("Raspberry Pi 400 Rev 1.0", "aarch64", "pi-400"),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", "armv7l", "pi-3b-plus"),
        ("Raspberry Pi 3 Model B Rev 1.2", "armv7l", "pi-3b"),
    ],
)
def test_board_by_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, machine: str, name: str
) -> None:
    monkeypatch.setattr(regression.platform, "machine", lambda: machine)
    write(tmp_path / "proc/stat", "cpu  10 0 10 80 0 0 0 0 0 0\n")
    found = probe(None, board(tmp_path, model))
    assert found.board == name
    assert found.facts.energy_source == REGRESSION
    assert found.facts.constants["base_w"] == watts(name, 0)


def test_another_board_is_refused_and_can_be_named(tmp_path: Path) -> None:
    write(tmp_path / "proc/stat", "cpu  10 0 10 80 0 0 0 0 0 0\n")
    with pytest.raises(NotHere, match=r"Some board.*pi-5b"):
        probe(None, board(tmp_path, "Some board"))
    with pytest.raises(NotHere, match="there is no board 'pi-6'"):
        probe("pi-6", System(tmp_path))
    assert probe("pi-3b", System(tmp_path)).board == "pi-3b"


def test_waiting_for_storage_is_idle_and_guests_count_once(tmp_path: Path) -> None:
    path = tmp_path / "stat"
    path.write_text("cpu  10 1 20 300 40 5 6 7 8 9\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    assert counts(str(path)) == (49, 389)


@pytest.mark.parametrize("text", ["", "cpu 1 2 3\n", "intr 1 2 3 4 5 6 7 8 9\n", "cpu a b c d e f g h\n"])
def test_what_is_no_stat_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path / "proc/stat", text)
    with pytest.raises(NotHere, match="does not begin with a line 'cpu'"):
        probe("pi-5b", System(tmp_path))


def test_load_is_of_the_time_between_two_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "FIRST_S", 0.0)
    file = tmp_path / "proc/stat"
    write(file, "cpu  0 0 0 100 0 0 0 0 0 0\n")
    meter = probe("pi-5b", System(tmp_path))
    with pytest.raises(Unreadable, match="counts no time"):
        meter.read()
    write(file, "cpu  25 0 0 175 0 0 0 0 0 0\n")
    first = meter.read()
    assert first[1] == pytest.approx(4.403 + 3.458 * 0.25)
    assert meter.read() == first, "nothing was counted since: it is the same reading"
    write(file, "cpu  125 0 0 175 0 0 0 0 0 0\n")
    assert meter.read()[1] == pytest.approx(4.403 + 3.458)
    write(file, "cpu  25 0 0 475 0 0 0 0 0 0\n")
    with pytest.raises(Unreadable, match="0 to 1"):
        meter.read()


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="reads /proc/stat")
def test_a_window_on_this_machine() -> None:
    with meters.opened(meters.Choice("regression:pi-5b")) as meter:
        meter.begin()
        time.sleep(2.5)
        found = meter.end()
    assert found.reason is None
    assert found.energy_j is not None and found.duration_s is not None
    assert 4.403 * found.duration_s <= found.energy_j <= 7.861 * found.duration_s
