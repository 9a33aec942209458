"""Testbeds by name: the environments under `environments/`, or a TOML file of your own.

A file called `pac-nano-N.toml` is a family: `counts` lists its members, and `any_count` opens it to every N.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from harness.cluster import Cluster
from harness.errors import OrreryError, unknown_name
from testbeds.constants import Constant, Table, read
from testbeds.profiles import MEDIA, MODEL_CONSTANTS, PORT_CONSTANTS, DeviceProfile, devices, load_device

__all__ = ["Assumption", "Testbed", "devices", "load", "load_device", "names"]

MODES = ("simulated", "emulated", "real")
DUPLEX = ("full", "half", "shared")
MAX_DEVICES = 10_000
FAMILY = "-N"


@dataclass(frozen=True)
class Assumption:
    """A constant of `owner` (a device profile or "link") that is assumed, or fitted to published cells."""

    owner: str
    key: str
    constant: Constant


@dataclass(frozen=True)
class Testbed:
    """Devices and links, the modes that can run on them, and the assumed and fitted constants underneath."""

    name: str
    description: str
    cluster: Cluster
    modes: tuple[str, ...]
    assumptions: tuple[Assumption, ...]
    path: Path

    __test__ = False  # not a test class, whatever pytest makes of the name


def names() -> list[str]:
    """The names of all testbeds of the library; of a family that is open to every N, the usual ones."""
    found: list[str] = []
    for path in sorted(_folder().glob("*.toml")):
        if _is_family(path):
            found += [_member(path, count) for count in _counts(read(path))]
        else:
            found.append(path.stem)
    return found


def load(name_or_path: str) -> Testbed:
    """A testbed by its name, or by the path of a TOML file. Raises OrreryError for anything wrong with either."""
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path).expanduser()
        if _is_family(path):
            raise OrreryError(
                f"{path} describes a family of testbeds. The file of a single testbed has no {FAMILY!r} at the end of "
                "its name, and `count` in its [[devices]] instead of `counts`."
            )
        return _load(path, path.stem)
    path = _folder() / f"{name_or_path}.toml"
    if path.exists() and not _is_family(path):
        return _load(path, name_or_path)
    if match := re.fullmatch(r"(.+)-([1-9][0-9]*)", name_or_path):
        path = _folder() / f"{match[1]}{FAMILY}.toml"
        if path.exists():
            return _load(path, name_or_path, int(match[2]))
    raise unknown_name("testbed", name_or_path, names())


def _folder() -> Path:
    return Path(str(files("testbeds"))) / "environments"


def _is_family(path: Path) -> bool:
    return path.stem.endswith(FAMILY)


def _member(path: Path, count: int) -> str:
    return f"{path.stem.removesuffix(FAMILY)}-{count}"


def _counts(table: Table) -> list[int]:
    return table.list_of("counts", int, "whole numbers of at least 1", lambda count: count >= 1)


def _load(path: Path, name: str, count: int | None = None) -> Testbed:
    """Read one environment. `count` is the N of a family's member, None where the file is no family."""
    table = read(path)
    description = table.text("description").replace("{N}", str(count))
    modes = table.list_of("modes", str, f"modes, of {', '.join(MODES)}", lambda mode: mode in MODES)
    if count is not None:
        counts = _counts(table)
        open_family = table.has("any_count") and table.take("any_count", bool, "true or false")
        if count not in counts and not open_family:
            members = ", ".join(_member(path, n) for n in counts)
            raise OrreryError(f"There is no testbed called {name!r}. Its family has {members}.")
    profiles = _profiles(table, path.parent, count)
    link = table.table("link")
    table.close()

    medium = link.choice("medium", MEDIA)
    duplex = link.choice("duplex", DUPLEX)
    constants = {
        "nominal_mbit_per_s": link.constant("nominal_mbit_per_s"),
        "tcp_efficiency": link.constant("tcp_efficiency"),
        "latency_s": link.constant("latency_s", allow_zero=True),
    }
    link.close()
    if constants["tcp_efficiency"].value > 1:
        raise link.error("tcp_efficiency", f"is {constants['tcp_efficiency'].value}. It is a fraction, at most 1.")
    mbit_per_s = constants["nominal_mbit_per_s"].value * constants["tcp_efficiency"].value

    ranks = {f"device{rank}": profile for rank, profile in enumerate(profiles)}
    cluster = Cluster(
        name=name,
        devices=tuple(profile.device(d, _memory_bytes(profile, profiles)) for d, profile in ranks.items()),
        bandwidth={d: _port_mbit_per_s(profile, medium, mbit_per_s) * 1e6 / 8 for d, profile in ranks.items()},
        latency_s=constants["latency_s"].value,
        duplex=duplex,
    )
    used = {profile.name: _used(profile, medium) for profile in profiles} | {"link": constants}
    return Testbed(name, description, cluster, tuple(modes), tuple(_assumptions(used)), path)


def _profiles(table: Table, beside: Path, count: int | None) -> list[DeviceProfile]:
    """The profile of every device, in rank order."""
    entries = table.tables("devices")
    if count is not None and len(entries) != 1:
        raise table.error("devices", f"has {len(entries)} entries. A family repeats exactly one.")
    profiles: list[DeviceProfile] = []
    for entry in entries:
        name = entry.text("profile")
        repeat = count or 1
        if entry.has("count"):
            if count is not None:
                raise entry.error("count", "contradicts `counts`: in a family the testbed's name says how many.")
            repeat = entry.take("count", int, "a whole number of at least 1")
        entry.close()
        if not 1 <= repeat <= MAX_DEVICES - len(profiles):
            raise entry.error("count", f"is {repeat}. A testbed has 1 to {MAX_DEVICES} devices.")
        try:
            profiles += [load_device(name, beside)] * repeat
        except OrreryError as error:
            raise entry.error("profile", f"is {name!r}. {error}") from None
    return profiles


def _memory_bytes(profile: DeviceProfile, profiles: list[DeviceProfile]) -> int:
    """A board's usable memory; processes of this machine share what it has installed."""
    if profile.measured is None:
        return int(profile.required("usable_memory_bytes"))
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return installed // sum(p.measured is not None for p in profiles)


def _port_mbit_per_s(profile: DeviceProfile, medium: str, link_mbit_per_s: float) -> float:
    """What TCP gets through a device's port: the link's rate, or the port's own where that is less."""
    if medium not in PORT_CONSTANTS:
        return link_mbit_per_s
    return min(link_mbit_per_s, profile.required(PORT_CONSTANTS[medium]))


def _used(profile: DeviceProfile, medium: str) -> dict[str, Constant]:
    """The constants of a profile that reach the cluster."""
    keys = {*MODEL_CONSTANTS, PORT_CONSTANTS.get(medium)}
    return {key: constant for key, constant in profile.constants.items() if key in keys}


def _assumptions(used: dict[str, dict[str, Constant]]) -> Iterator[Assumption]:
    for owner, constants in used.items():
        for key, constant in constants.items():
            if constant.provenance in ("assumed", "fitted"):
                yield Assumption(owner, key, constant)
