"""File trees of boards as their kernels lay them out, in a temporary folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.meters.system import System

#: Label -> watts. NC: a channel that is connected to nothing.
Chip = Sequence[tuple[str, float]]

NANO: Chip = [("POM_5V_IN", 5.0), ("POM_5V_GPU", 1.5), ("POM_5V_CPU", 1.2)]
TX2_MODULE: list[Chip] = [
    [("VDD_SYS_GPU", 1.0), ("VDD_SYS_SOC", 0.8), ("VDD_4V0_WIFI", 0.1)],
    [("VDD_IN", 6.0), ("VDD_SYS_CPU", 2.0), ("VDD_SYS_DDR", 1.0)],
]
TX2_CARRIER: list[Chip] = [
    [("VDD_MUX", 2.5), ("VDD_5V0_IO_SYS", 1.0), ("VDD_3V3_SYS", 0.5)],
    [("VDD_3V3_IO_SLP", 0.1), ("VDD_1V8_IO", 0.2), ("VDD_3V3_SYS_M2", 0.1)],
]
ONE_PARENT: Chip = [("VDD_IN", 7.0), ("VDD_CPU_GPU_CV", 3.0), ("VDD_SOC", 2.0)]
AGX_XAVIER: list[Chip] = [
    [("GPU", 4.0), ("CPU", 3.0), ("SOC", 2.0)],
    [("CV", 0.5), ("VDDRQ", 1.0), ("SYS5V", 2.5)],
]
AGX_ORIN: list[Chip] = [
    [("VDD_GPU_SOC", 6.0), ("VDD_CPU_CV", 2.0), ("VIN_SYS_5V0", 4.0)],
    [("NC", 0.0), ("VDDQ_VDD2_1V8AO", 1.5), ("NC", 0.0)],
]


def board(root: Path, model: str) -> System:
    """A machine whose device tree names the model."""
    write(root / "proc/device-tree/model", model + "\0")
    return System(root)


def old_layout(root: Path, chips: Sequence[Chip]) -> None:
    """L4T up to 32: `ina3221x`, milliwatts."""
    for number, chip in enumerate(chips):
        folder = root / f"sys/bus/i2c/drivers/ina3221x/6-004{number}/iio:device{number}"
        for channel, (label, watts) in enumerate(chip):
            write(folder / f"rail_name_{channel}", f"{label}\n")
            write(folder / f"in_power{channel}_input", f"{round(watts * 1e3)}\n")
            write(folder / f"in_voltage{channel}_input", "5000\n")
            write(folder / f"in_current{channel}_input", f"{round(watts * 1e3 / 5)}\n")


def new_layout(root: Path, chips: Sequence[Chip], hwmon: int = 3) -> None:
    """L4T from 34 on: `ina3221`, millivolts and milliamperes, and `in7`, the sum of shunt voltages."""
    for number, chip in enumerate(chips):
        folder = root / f"sys/bus/i2c/drivers/ina3221/1-004{number}/hwmon/hwmon{hwmon + number}"
        for channel, (label, watts) in enumerate(chip, start=1):
            write(folder / f"in{channel}_label", f"{label}\n")
            write(folder / f"in{channel}_input", "5000\n")
            write(folder / f"curr{channel}_input", f"{round(watts * 1e3 / 5)}\n")
        write(folder / "in7_label", "sum of shunt voltages\n")
        write(folder / "in7_input", "123456\n")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def set_watts(root: Path, watts: Mapping[str, float]) -> None:
    """Change what rails read, wherever they lie, in both layouts."""
    drivers = root / "sys/bus/i2c/drivers"
    for name in [*drivers.rglob("rail_name_*"), *drivers.rglob("in?_label")]:
        label = name.read_text().strip()
        if label not in watts:
            continue
        number = name.name.removeprefix("rail_name_").removeprefix("in").removesuffix("_label")
        if name.name.startswith("rail_name_"):
            write(name.parent / f"in_power{number}_input", f"{round(watts[label] * 1e3)}\n")
        else:
            write(name.parent / f"curr{number}_input", f"{round(watts[label] * 1e3 / 5)}\n")


def file_of(root: Path, label: str) -> Path:
    """The file of a rail's label."""
    drivers = root / "sys/bus/i2c/drivers"
    (found,) = (
        path
        for path in [*drivers.rglob("rail_name_*"), *drivers.rglob("in?_label")]
        if path.read_text().strip() == label
    )
    return found
