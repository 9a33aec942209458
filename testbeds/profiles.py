"""Device profiles: one file per board and power mode under `devices/`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from harness.cluster import OPERATOR_CLASSES, Device
from harness.errors import OrreryError, unknown_name
from testbeds.constants import Constant, Table, read

#: What a board draws idle, and while it computes with the profile's accelerator: without them it has no energy.
POWERS = ("idle_w", "load_w")
#: What it draws while it waits, what sending adds, and receiving, and every byte.
FURTHER_POWERS = ("wait_w", "network_w", "network_j_per_byte")
#: Constants that a plan's time, memory or energy rests on. Those a file leaves out are unknown.
MODEL_CONSTANTS = (
    "peak_fp32_flops_per_s",
    *(f"efficiency_{operator}{part}" for operator in OPERATOR_CLASSES for part in ("", "_forward", "_backward")),
    "kernel_overhead_s",
    "usable_memory_bytes",
    "memory_bandwidth_bytes_per_s",
    "storage_read_bytes_per_s",
    "storage_write_bytes_per_s",
    *POWERS,
    *FURTHER_POWERS,
)
#: The first of each pair can't be more than the second.
ORDERED_POWERS = (("idle_w", "load_w"), ("idle_w", "wait_w"), ("wait_w", "load_w"))
#: TCP throughput of the board's own port, by medium. Loopback has no port.
PORT_CONSTANTS = {"ethernet": "ethernet_mbit_per_s", "wifi": "wifi_mbit_per_s"}
MEDIA = (*PORT_CONSTANTS, "loopback")
#: Further facts about a board, for people.
OTHER_CONSTANTS = ("peak_fp16_flops_per_s", "cpu_peak_fp32_flops_per_s", "installed_memory_bytes")


@dataclass(frozen=True)
class DeviceProfile:
    """A board in one power mode. `constants` holds what is known of it.

    `measured`: the device is a process of this machine; the table of that name replaces the rates, and the
    devices of a testbed share this machine's memory.
    """

    name: str
    path: Path
    title: str
    accelerator: str
    note: str
    constants: dict[str, Constant]
    measured: str | None = None

    def value(self, key: str) -> float | None:
        constant = self.constants.get(key)
        return None if constant is None else constant.value

    def required(self, key: str) -> float:
        """The value of a constant that no testbed can do without."""
        value = self.value(key)
        if value is None:
            raise OrreryError(
                f"{self.path}: {key} of {self.title} is unknown, so it can't be part of a testbed. "
                f"Choose another power mode, or copy the file, add {key} with its source and name the copy's path."
            )
        return value

    def rates(self) -> dict[str, tuple[float, float]]:
        """Achieved FLOP/s, forward and backward, of each operator class whose efficiency is known."""
        rates = {}
        for operator in OPERATOR_CLASSES:
            key = f"efficiency_{operator}"
            forward, backward = (self.value(f"{key}_{d}") or self.value(key) for d in ("forward", "backward"))
            if forward is not None and backward is not None:
                peak = self.required("peak_fp32_flops_per_s")
                rates[operator] = (forward * peak, backward * peak)
        return rates

    def device(self, name: str, memory_bytes: int) -> Device:
        """The board as planners and simulator see it."""
        return Device(
            name=name,
            profile=self.name,
            rates=self.rates(),
            kernel_overhead_s=self.required("kernel_overhead_s"),
            memory_bytes=memory_bytes,
            memory_bandwidth=self.required("memory_bandwidth_bytes_per_s"),
            storage_read=self.value("storage_read_bytes_per_s"),
            storage_write=self.value("storage_write_bytes_per_s"),
            idle_w=self.value("idle_w"),
            load_w=self.value("load_w"),
            wait_w=self.value("wait_w"),
            network_w=self.value("network_w"),
            network_j_per_byte=self.value("network_j_per_byte"),
            measured=self.measured,
            accelerator=self.accelerator,
        )


def _folder() -> Path:
    return Path(str(files("testbeds"))) / "devices"


def devices() -> list[str]:
    """The names of all device profiles of the library."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def load_device(name: str, beside: Path | None = None) -> DeviceProfile:
    """A profile by name, or by the path of a TOML file, taken from the folder `beside` if it is relative."""
    if name.endswith(".toml"):
        return _read(Path(beside or ".") / Path(name).expanduser())
    if name not in devices():
        raise unknown_name("device", name, devices())
    return _read(_folder() / f"{name}.toml")


def _read(path: Path) -> DeviceProfile:
    table = read(path)
    keys = (*MODEL_CONSTANTS, *PORT_CONSTANTS.values(), *OTHER_CONSTANTS)
    profile = DeviceProfile(
        name=path.stem,
        path=path,
        title=table.text("title"),
        accelerator=table.choice("accelerator", ("cpu", "gpu")),
        note=table.text("note"),
        measured=table.text("measured") if table.has("measured") else None,
        constants={key: table.constant(key, key == "kernel_overhead_s") for key in keys if table.has(key)},
    )
    table.close()
    _check(profile, table)
    return profile


def _check(profile: DeviceProfile, table: Table) -> None:
    """Refuse constants that contradict each other."""
    known = profile.constants
    for key, constant in known.items():
        if key.startswith("efficiency_") and constant.value > 1:
            raise table.error(key, f"is {constant.value}. It is a fraction of peak_fp32_flops_per_s, at most 1.")
    for operator in OPERATOR_CLASSES:
        key = f"efficiency_{operator}"
        parts = [f"{key}_{direction}" for direction in ("forward", "backward") if f"{key}_{direction}" in known]
        if (key in known and parts) or len(parts) == 1:
            raise table.error(
                key, f"must be given alone or as {key}_forward and {key}_backward. Found: {', '.join(parts)}."
            )
        if (key in known or parts) and "peak_fp32_flops_per_s" not in known:
            raise table.error(key, "is a fraction of peak_fp32_flops_per_s, which is missing.")
    for small, large in (*ORDERED_POWERS, ("usable_memory_bytes", "installed_memory_bytes")):
        if small in known and large in known and known[small].value > known[large].value:
            raise table.error(small, f"is {known[small].value}, more than {large} ({known[large].value}).")
    for key in FURTHER_POWERS:
        if key in known and not set(POWERS) <= known.keys():
            raise table.error(key, f"is of no use alone: a board's energy needs {' and '.join(POWERS)}, too.")
    if ("usable_memory_bytes" in known) == (profile.measured is not None):
        raise table.error(
            "usable_memory_bytes", "must be given for a board, and left out for `measured` processes of this machine."
        )
