"""The Raspberry Pi 5's power chip: pairs by name, whatever the order, and the correction computed by hand."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from harness.meters.measurement import PMIC, NotHere
from harness.meters.pmic import corrected_w, probe
from harness.meters.system import System
from harness.meters.window import Unreadable

#: As the program prints it (amperes first, then volts), with round numbers: 12 pairs of 0.1 A and 2 V make 2.4 W.
NAMES = [
    *("3V7_WL_SW", "3V3_SYS", "1V8_SYS", "DDR_VDD2", "DDR_VDDQ", "1V1_SYS"),
    *("0V8_SW", "VDD_CORE", "3V3_DAC", "3V3_ADC", "0V8_AON", "HDMI"),
]
LINES = [
    *(f"{name:>10}_A current({i})=0.10000000A" for i, name in enumerate(NAMES)),
    *(f"{name:>10}_V volt({i + 8})=2.00000000V" for i, name in enumerate(NAMES)),
    "   EXT5V_V volt(24)=5.15340000V",
    "    BATT_V volt(25)=0.00683760V",
]
BY_HAND_W = 1.1451 * 2.4 + 0.5879


def test_by_hand() -> None:
    assert corrected_w("\n".join(LINES)) == pytest.approx(BY_HAND_W)


def test_the_order_of_lines_makes_no_difference() -> None:
    shuffled = LINES.copy()
    random.Random(0).shuffle(shuffled)
    assert corrected_w("\n".join(shuffled)) == pytest.approx(BY_HAND_W)


def test_pairs_are_by_name_and_not_by_place() -> None:
    """2 V more on a rail of 0.1 A are 0.2 W more."""
    text = "\n".join(LINES).replace("VDD_CORE_V volt(15)=2.0", "VDD_CORE_V volt(15)=4.0")
    assert corrected_w(text) == pytest.approx(BY_HAND_W + 1.1451 * 0.2)


@pytest.mark.parametrize("number", range(24))
def test_a_line_that_is_missing_is_named(number: int) -> None:
    text = "\n".join(LINES[:number] + LINES[number + 1 :])
    with pytest.raises(Unreadable, match=f"did not print {LINES[number].split()[0]}"):
        corrected_w(text)


@pytest.mark.parametrize(
    ("before", "after"),
    [("0.10000000A", "100.00000mA"), ("2.00000000V", "2000.0000mV"), ("volt(8)", "current(8)")],
)
def test_a_unit_that_changed_is_refused(before: str, after: str) -> None:
    with pytest.raises(Unreadable, match=r"It must give .* in [AV]"):
        corrected_w("\n".join(LINES).replace(before, after, 1))


def program(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A `vcgencmd` on the path that does this."""
    path = folder / "vcgencmd"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_program_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("\n".join(LINES))
    program(tmp_path, monkeypatch, f'test "$1" = pmic_read_adc && cat {tmp_path / "text"}')
    found = probe(None, System(tmp_path))
    assert found.read_w() == pytest.approx(BY_HAND_W)
    facts = found.facts
    assert (facts.energy_source, facts.constants) == (PMIC, {"slope": 1.1451, "offset_w": 0.5879})
    assert facts.constants_source is not None and "RPi5-power" in facts.constants_source
    assert "USB" in facts.scope


def test_another_pi_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, monkeypatch, "echo 'error=2 error_msg=\"Invalid arguments\"'; exit 255")
    with pytest.raises(NotHere, match=r"code 255: error=2.*Only the Raspberry Pi 5"):
        probe(None, System(tmp_path))


def test_without_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotHere, match="vcgencmd is not there"):
        probe(None, System(tmp_path))
