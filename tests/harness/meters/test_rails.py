"""INA3221 rails: totals of every board by the table, on trees as the kernels lay them out."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.meters.measurement import RAIL, NotHere
from harness.meters.rails import Rails, boards, probe
from harness.meters.system import System
from harness.meters.window import Unreadable
from tests.harness.meters.trees import (
    AGX_ORIN,
    AGX_XAVIER,
    NANO,
    ONE_PARENT,
    TX2_CARRIER,
    TX2_MODULE,
    board,
    file_of,
    new_layout,
    old_layout,
    set_watts,
    write,
)

TX2 = [*TX2_MODULE, *TX2_CARRIER]
XAVIER_RAILS = ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V")
ORIN_RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")


@pytest.mark.parametrize(
    ("model", "layout", "chips", "rails", "watts", "carrier"),
    [
        ("NVIDIA Jetson Nano Developer Kit", old_layout, [NANO], ("POM_5V_IN",), 5.0, True),
        ("NVIDIA Jetson TX2 Developer Kit", old_layout, TX2, ("VDD_IN", "VDD_MUX"), 8.5, True),
        ("quill", old_layout, TX2_MODULE, ("VDD_IN",), 6.0, False),
        ("NVIDIA Jetson TX2 NX Developer Kit", old_layout, [ONE_PARENT], ("VDD_IN",), 7.0, False),
        ("NVIDIA Jetson Xavier NX Developer Kit", old_layout, [ONE_PARENT], ("VDD_IN",), 7.0, False),
        ("NVIDIA Jetson Xavier NX Developer Kit", new_layout, [ONE_PARENT], ("VDD_IN",), 7.0, False),
        ("NVIDIA Jetson AGX Xavier Developer Kit", old_layout, AGX_XAVIER, XAVIER_RAILS, 13.0, False),
        ("NVIDIA Jetson AGX Xavier Developer Kit", new_layout, AGX_XAVIER, XAVIER_RAILS, 13.0, False),
        ("NVIDIA Jetson Orin Nano Developer Kit", new_layout, [ONE_PARENT], ("VDD_IN",), 7.0, False),
        ("NVIDIA Jetson Orin NX Engineering Reference", new_layout, [ONE_PARENT], ("VDD_IN",), 7.0, False),
        ("NVIDIA Jetson AGX Orin Developer Kit", new_layout, AGX_ORIN, ORIN_RAILS, 12.0, False),
    ],
)
def test_total_of_each_board(
    tmp_path: Path, model: str, layout: object, chips: list, rails: tuple[str, ...], watts: float, carrier: bool
) -> None:
    system = board(tmp_path, model)
    layout(tmp_path, chips)
    found = probe(None, system)
    assert found.read_w() == pytest.approx(watts)
    facts = found.facts
    assert (facts.rails, facts.energy_source, facts.carrier_included) == (rails, RAIL, carrier)


def test_tx2_without_its_carrier_says_module_only(tmp_path: Path) -> None:
    system = board(tmp_path, "NVIDIA Jetson TX2 Developer Kit")
    old_layout(tmp_path, TX2_MODULE)
    assert "module only" in probe(None, system).facts.scope


def test_numbers_of_hwmon_differ_between_boots(tmp_path: Path) -> None:
    for boot, hwmon in enumerate((0, 7)):
        root = tmp_path / f"boot{boot}"
        system = board(root, "NVIDIA Jetson AGX Orin Developer Kit")
        new_layout(root, AGX_ORIN, hwmon)
        assert probe(None, system).read_w() == pytest.approx(12)


@pytest.mark.parametrize(
    ("model", "layout", "chips", "child"),
    [
        ("NVIDIA Jetson AGX Orin Developer Kit", new_layout, AGX_ORIN, "VDDQ_VDD2_1V8AO"),
        ("NVIDIA Jetson Nano Developer Kit", old_layout, [NANO], "POM_5V_GPU"),
    ],
)
def test_what_a_parent_feeds_is_not_counted_twice(
    tmp_path: Path, model: str, layout: object, chips: list, child: str
) -> None:
    system = board(tmp_path, model)
    layout(tmp_path, chips)
    rails = probe(None, system)
    before = rails.read_w()
    set_watts(tmp_path, {child: 3.5})
    assert rails.read_w() == before


def test_no_board_of_the_table_adds_a_parent_and_its_child() -> None:
    for name, about in boards().items():
        total = {*about.get("total", ()), *about.get("total_if_there", ())}
        for parent, children in about.get("children", {}).items():
            assert not (parent in total and total & set(children)), name


def nano(root: Path, model: str = "NVIDIA Jetson Nano Developer Kit") -> System:
    old_layout(root, [NANO])
    return board(root, model)


def test_a_board_that_nobody_knows_is_refused_with_the_labels(tmp_path: Path) -> None:
    system = nano(tmp_path, "Somebody's Board")
    with pytest.raises(NotHere, match=r"Somebody's Board.*POM_5V_CPU, POM_5V_GPU, POM_5V_IN.*--meter ina3221:"):
        probe(None, system)


def test_board_and_rails_can_be_named(tmp_path: Path) -> None:
    system = nano(tmp_path, "Somebody's Board")
    assert probe("jetson-nano", system).facts.rails == ("POM_5V_IN",)
    both = probe("POM_5V_GPU,POM_5V_CPU", system)
    assert both.read_w() == pytest.approx(2.7)
    assert both.facts.carrier_included is None


@pytest.mark.parametrize(
    ("rails", "found"),
    [
        ("VDD_IN", "VDD_IN is not in .*POM_5V_CPU"),
        ("POM_5V_IN,POM_5V_GPU", "POM_5V_GPU is fed by POM_5V_IN"),
        ("POM_5V_IN,POM_5V_IN", "name one twice"),
    ],
)
def test_rails_that_are_missing_or_count_twice_are_refused(tmp_path: Path, rails: str, found: str) -> None:
    with pytest.raises(NotHere, match=found):
        probe(rails, nano(tmp_path))


def test_a_label_on_two_chips_is_refused(tmp_path: Path) -> None:
    system = board(tmp_path, "NVIDIA Jetson Nano Developer Kit")
    old_layout(tmp_path, [NANO, NANO])
    with pytest.raises(NotHere, match="POM_5V_IN is twice"):
        probe(None, system)


def test_the_nano_2gb_has_no_sensor(tmp_path: Path) -> None:
    with pytest.raises(NotHere, match=r"2 GB has no INA3221.*external"):
        probe(None, board(tmp_path, "NVIDIA Jetson Nano 2GB Developer Kit"))


def test_a_machine_without_the_chip(tmp_path: Path) -> None:
    with pytest.raises(NotHere, match="no INA3221"):
        probe(None, System(tmp_path))


def watched(tmp_path: Path) -> tuple[Rails, Path]:
    """A Nano's rails, and the file of what they read."""
    rails = probe(None, nano(tmp_path))
    return rails, file_of(tmp_path, "POM_5V_IN").parent / "in_power0_input"


@pytest.mark.parametrize("text", ["", "\n", "five\n"])
def test_what_is_no_number_is_said_with_its_file(tmp_path: Path, text: str) -> None:
    rails, file = watched(tmp_path)
    write(file, text)
    with pytest.raises(Unreadable, match=r"in_power0_input holds .*number"):
        rails.read_w()


def test_a_rail_below_zero_is_refused_even_in_a_sum(tmp_path: Path) -> None:
    system = board(tmp_path, "NVIDIA Jetson AGX Xavier Developer Kit")
    new_layout(tmp_path, AGX_XAVIER)
    rails = probe(None, system)
    set_watts(tmp_path, {"CV": -0.5})
    with pytest.raises(Unreadable, match=r"CV reads -0\.5 W"):
        rails.read_w()


def test_a_rail_that_turns_nc_is_refused(tmp_path: Path) -> None:
    rails, _ = watched(tmp_path)
    write(file_of(tmp_path, "POM_5V_IN"), "NC\n")
    with pytest.raises(Unreadable, match="says 'NC'"):
        rails.channels[0].check()


def test_a_file_that_has_gone_is_said(tmp_path: Path) -> None:
    rails, file = watched(tmp_path)
    file.unlink()
    with pytest.raises(Unreadable, match="in_power0_input can't be read: No such file"):
        rails.read_w()
    with pytest.raises(NotHere, match="in_power0_input"):
        probe(None, System(tmp_path))


def test_a_label_that_can_not_be_read_is_refused(tmp_path: Path) -> None:
    """A folder in its place, because nothing is forbidden to root."""
    system = nano(tmp_path)
    label = file_of(tmp_path, "POM_5V_CPU")
    label.unlink()
    label.mkdir()
    with pytest.raises(NotHere, match="rail_name_2"):
        probe(None, system)
