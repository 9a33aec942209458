"""Meters as who measures sees them: found or named, read by a process of their own, and never the run's ruin."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import meters
from harness.errors import OrreryError
from harness.meters import Choice
from harness.meters.measurement import RAIL
from harness.meters.meter import NullMeter, ProbeMeter
from harness.meters.system import System
from tests.harness.meters.trees import AGX_XAVIER, NANO, board, file_of, new_layout, old_layout, set_watts, write


def nano(root: Path) -> System:
    old_layout(root, [NANO])
    return board(root, "NVIDIA Jetson Nano Developer Kit")


def opened(system: System, **choice: object) -> ProbeMeter:
    meter = meters._meter(Choice(**choice), system)
    assert isinstance(meter, ProbeMeter)
    return meter


def test_a_window_carries_every_field(tmp_path: Path) -> None:
    system = nano(tmp_path)
    write(tmp_path / "etc/nv_tegra_release", "# R32 (release), REVISION: 7.1, GCID: 1\n# more\n")
    write(tmp_path / "var/lib/nvpmodel/status", "pmode:0000 fmode:fanNull\n")
    for end in ("min", "max"):
        write(tmp_path / f"sys/devices/system/cpu/cpu0/cpufreq/scaling_{end}_freq", "1479000\n")
    with meters.opened(Choice(carbon="400"), system) as meter:
        meter.begin()
        time.sleep(1.0)
        found = meter.end()
    assert found.reason is None
    assert found.energy_j == pytest.approx(5 * found.duration_s)
    assert (found.mean_w, found.min_w, found.max_w) == (pytest.approx(5), 5, 5)
    assert (found.meter, found.energy_source, found.rails) == ("ina3221", RAIL, ("POM_5V_IN",))
    assert (found.carrier_included, found.network_included) == (True, False)
    assert found.nominal_hz == 20 and found.achieved_hz is not None and 10 < found.achieved_hz < 21
    assert found.samples is not None and found.samples >= 10
    assert found.largest_gap_s is not None and found.largest_gap_s < 1
    assert found.board == "NVIDIA Jetson Nano Developer Kit"
    assert found.release == "R32 (release), REVISION: 7.1, GCID: 1"
    assert (found.power_mode, found.clocks_pinned) == ("pmode:0000 fmode:fanNull", True)
    assert found.carbon_g == pytest.approx(found.energy_j / 3.6e6 * 400)
    assert (found.carbon_g_per_kwh, found.carbon_source) == (400, "as given by the user")
    assert found.energy_net_of_idle_j is None and found.idle_w is None


def test_an_idle_baseline_comes_first_and_once(tmp_path: Path) -> None:
    system = nano(tmp_path)
    meter = opened(system, idle_baseline_s=1.0)
    meter.begin()
    set_watts(tmp_path, {"POM_5V_IN": 8.0})
    time.sleep(1.0)
    first = meter.end()
    began = time.monotonic()
    meter.begin()
    assert time.monotonic() - began < 0.9
    time.sleep(0.8)
    second = meter.end()
    meter.close()
    for found in (first, second):
        assert found.idle_w == pytest.approx(5)
        assert found.idle_duration_s == pytest.approx(1.0, abs=0.2)
        assert found.idle_at is not None and found.idle_at.endswith("+00:00")
        assert found.energy_net_of_idle_j == pytest.approx(found.energy_j - 5 * found.duration_s)
    assert second.mean_w == pytest.approx(8)


@pytest.mark.parametrize("what", ["vanishes", "turns NC", "becomes text", "falls below zero", "is emptied"])
def test_what_goes_wrong_in_mid_window_is_its_reason_and_the_next_is_whole(tmp_path: Path, what: str) -> None:
    meter = opened(nano(tmp_path))
    label = file_of(tmp_path, "POM_5V_IN")
    power = label.parent / "in_power0_input"
    meter.begin()
    time.sleep(0.3)
    {
        "vanishes": power.unlink,
        "turns NC": lambda: write(label, "NC\n"),
        "becomes text": lambda: write(power, "five\n"),
        "falls below zero": lambda: write(power, "-5000\n"),
        "is emptied": lambda: write(power, ""),
    }[what]()
    time.sleep(0.5)
    broken = meter.end()
    assert (broken.energy_j, broken.mean_w) == (None, None)
    assert broken.reason
    assert broken.duration_s == pytest.approx(0.8, abs=0.5)
    write(label, "POM_5V_IN\n")
    write(power, "5000\n")
    meter.begin()
    time.sleep(0.8)
    whole = meter.end()
    meter.close()
    assert whole.reason is None and whole.mean_w == pytest.approx(5)


def test_a_sampling_process_that_is_stopped_leaves_a_gap(tmp_path: Path) -> None:
    meter = opened(nano(tmp_path))
    meter.begin()
    time.sleep(0.5)
    assert meter._process is not None
    os.kill(meter._process.pid, signal.SIGSTOP)
    time.sleep(1.2)
    os.kill(meter._process.pid, signal.SIGCONT)
    found = meter.end()
    meter.close()
    assert found.energy_j is None
    assert found.reason is not None
    assert "Nothing was read for 1." in found.reason or "A reading took 1." in found.reason


def test_a_sampling_process_that_dies_is_the_reason_and_another_takes_its_place(tmp_path: Path) -> None:
    meter = opened(nano(tmp_path))
    meter.begin()
    assert meter._process is not None
    meter._process.kill()
    found = meter.end()
    assert found.energy_j is None
    assert found.reason is not None and "ended with code -9" in found.reason
    meter.begin()
    time.sleep(0.8)
    again = meter.end()
    meter.close()
    assert again.mean_w == pytest.approx(5)


def test_no_process_is_left(tmp_path: Path) -> None:
    meter = opened(nano(tmp_path))
    meter.begin()
    assert meter._process is not None
    process = meter._process
    meter.close()
    assert process.returncode == 0, "closing the pipe ends it in mid-window, too"


def test_two_chips_are_one_board(tmp_path: Path) -> None:
    new_layout(tmp_path, AGX_XAVIER)
    system = board(tmp_path, "NVIDIA Jetson AGX Xavier Developer Kit")
    meter = opened(system)
    meter.begin()
    time.sleep(0.8)
    found = meter.end()
    meter.close()
    assert found.mean_w == pytest.approx(13)
    assert len(found.rails) == 6


# Found, named, refused


def test_rails_are_found_before_anything_else(tmp_path: Path) -> None:
    probe, why = meters.found(nano(tmp_path))
    assert probe is not None and probe.facts.meter == "ina3221"
    assert why == ""


def test_without_hardware_there_is_no_figure_but_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with meters.opened(Choice(), System(tmp_path)) as meter:
        assert isinstance(meter, NullMeter)
        meter.begin()
        found = meter.end()
    assert (found.meter, found.energy_j, found.energy_source) == ("none", None, None)
    assert found.reason is not None
    assert "ina3221: there is no INA3221" in found.reason and "pmic: " in found.reason and "zeus: " in found.reason


def test_a_board_that_nobody_knows_is_the_reason_and_no_error(tmp_path: Path) -> None:
    system = nano(tmp_path)
    write(tmp_path / "proc/device-tree/model", "Somebody's Board\0")
    with meters.opened(Choice(), system) as meter:
        assert "Labels found: POM_5V_CPU" in (meter.end().reason or "")
    with pytest.raises(OrreryError, match=r"The meter ina3221 can't be used here: .*Labels found"):
        meters.opened(Choice("ina3221"), system).__enter__()


def test_none_is_none(tmp_path: Path) -> None:
    with meters.opened(Choice("none"), nano(tmp_path)) as meter:
        assert meter.end().reason == "No meter was wanted."


def test_names_and_baselines_that_can_not_be_are_refused() -> None:
    with pytest.raises(OrreryError, match=r"no meter called 'ina3222'. Did you mean ina3221"):
        Choice("ina3222:VDD_IN")
    with pytest.raises(OrreryError, match="idle baseline is -1 s"):
        Choice(idle_baseline_s=-1)


def test_every_meter_says_whether_it_is_here(tmp_path: Path) -> None:
    answers = meters.here(nano(tmp_path))
    assert set(answers) == set(meters.SUMMARIES)
    assert answers["ina3221"] is None and answers["none"] is None
    assert "external:FILE" in (answers["external"] or "")


def test_the_system_of_an_empty_tree_knows_nothing(tmp_path: Path) -> None:
    system = System(tmp_path)
    assert (system.board(), system.power_mode(), system.clocks_pinned(), system.release()) == (None,) * 4
    write(tmp_path / "etc/os-release", 'ID=debian\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n')
    assert system.release() == "Debian GNU/Linux 12 (bookworm)"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_the_reading_process_ends_with_whoever_measures(tmp_path: Path) -> None:
    """Even where that one is killed in mid-window and can close nothing."""
    nano(tmp_path)
    program = (
        "import sys, time; from pathlib import Path; from harness import meters\n"
        "meter = meters._meter(meters.Choice('ina3221'), meters.System(Path(sys.argv[1])))\n"
        "meter.begin(); print(meter._process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        reading = Path("/proc", parent.stdout.readline().strip())
        assert reading.exists()
        parent.kill()
    wait_until = time.monotonic() + 10
    while reading.exists() and "State:\tZ" not in (reading / "status").read_text():
        assert time.monotonic() < wait_until, "it reads on, for nobody"
        time.sleep(0.05)
