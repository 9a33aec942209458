"""CodeCarbon for real, where it is installed: offline, without the user's settings, and labelled as a model.

Our side of it is tested without, too, with a package of the same interface in its place.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.carbon import intensity_of
from harness.errors import OrreryError
from harness.meters.measurement import TDP_MODEL, NotHere
from harness.meters.system import System
from harness.meters.tdp import SETTINGS, probe
from harness.meters.window import Window

HERE = System()


class Briefly:
    """A watch of a window that takes so long."""

    def __init__(self, seconds: float, really: bool = True) -> None:
        self.seconds, self.really = seconds, really
        self.over = False

    def now_ns(self) -> int:
        return time.monotonic_ns() + (round(self.seconds * 1e9) if self.over and not self.really else 0)

    def begun(self) -> None:
        pass

    def ended(self, until_ns: int | None) -> bool:
        if self.really:
            time.sleep(self.seconds)
        self.over = True
        return True

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Who connects, or looks a name up, fails; the list has what was tried."""
    tried: list[object] = []

    def refuse(*what: object) -> None:
        tried.append(what)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


def measured(seconds: float) -> Window:
    return probe(None, HERE).window(Briefly(seconds))


#: What CodeCarbon has of what we use. The energy is filled in; None: it swallows an error and has no result.
FAKE = """
import os
from types import SimpleNamespace

class OfflineEmissionsTracker:
    def __init__(self, *, country_iso_code, tracking_mode, measure_power_secs, save_to_file, log_level,
                 allow_multiple_runs):
        assert (tracking_mode, save_to_file) == ("machine", False)
        settings = {{name: value for name, value in os.environ.items() if name.startswith("CODECARBON_")}}
        assert settings == {{"CODECARBON_TELEMETRY_LEVEL": "disabled"}}, settings
        assert os.listdir(".") == [] and os.environ["HOME"] == os.getcwd()
    def start(self):
        pass
    def stop(self):
        kwh = {kwh}
        if kwh is not None:
            self.final_emissions_data = SimpleNamespace(energy_consumed=kwh)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts a package `codecarbon` into the place of the real one."""

    def make(kwh: str) -> None:
        (tmp_path / "site").mkdir()
        (tmp_path / "site/codecarbon.py").write_text(FAKE.format(kwh=kwh))
        about = tmp_path / "site/codecarbon-3.3.2.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: codecarbon\nVersion: 3.3.2\n")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        for name in [name for name in sys.modules if name.partition(".")[0] == "codecarbon"]:
            monkeypatch.delitem(sys.modules, name)

    yield make
    sys.modules.pop("codecarbon", None)


def test_kwh_become_joules_and_the_users_settings_are_kept_out(
    fake: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("0.001")
    monkeypatch.setenv(f"{SETTINGS}FORCE_CPU_POWER", "100000")
    before, folder = dict(os.environ), Path.cwd()
    window = probe(None, HERE).window(Briefly(100, really=False))
    assert window.energy_j == 3600 and window.mean_w == pytest.approx(36, rel=1e-3)
    assert (dict(os.environ), Path.cwd()) == (before, folder)
    assert probe(None, HERE).facts.meter == "codecarbon 3.3.2"


@pytest.mark.parametrize("kwh", ["None", "0.0"])
def test_a_tracker_that_swallowed_its_error_gives_no_zero(fake: Callable[[str], None], kwh: str) -> None:
    fake(kwh)
    window = probe(None, HERE).window(Briefly(100, really=False))
    assert (window.energy_j, window.reason) == (
        None,
        "CodeCarbon gave no energy. Its own messages are on standard error.",
    )


def test_offline_and_labelled_as_a_model(
    offline: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the user's settings would send figures away, or change them."""
    pytest.importorskip("codecarbon")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".codecarbon.config").write_text("[codecarbon]\nsave_to_api = True\npue = 1000\n")
    monkeypatch.setenv(f"{SETTINGS}EMISSIONS_ENDPOINT", "http://127.0.0.1:1/")
    monkeypatch.setenv(f"{SETTINGS}FORCE_CPU_POWER", "100000")
    before = dict(os.environ)
    window = measured(10.5)
    time.sleep(1)  # for what it might send behind our back
    assert offline == []
    assert window.reason is None
    assert window.mean_w is not None and 1 < window.mean_w < 2000
    assert window.energy_j == pytest.approx(window.mean_w * window.duration_s)
    assert probe(None, HERE).facts.energy_source == TDP_MODEL
    assert dict(os.environ) == before and Path.cwd() == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == [".codecarbon.config"]


def test_a_short_window_has_no_figure() -> None:
    pytest.importorskip("codecarbon")
    window = measured(1.5)
    assert window.energy_j is None
    assert window.reason is not None and "no figure below 10 looks" in window.reason


def test_intensity_of_a_country_is_in_its_tables(offline: list[object]) -> None:
    pytest.importorskip("codecarbon")
    germany = intensity_of("deu")
    assert 100 < germany.g_per_kwh < 1000
    assert "codecarbon" in germany.source and "DEU" in germany.source
    with pytest.raises(OrreryError, match="country with a carbon intensity called 'XYZ'"):
        intensity_of("XYZ")
    assert offline == []


def test_an_argument_is_refused() -> None:
    with pytest.raises(NotHere, match="takes no argument"):
        probe("DEU", HERE)
