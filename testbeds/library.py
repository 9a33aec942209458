"""Testbeds by name: the environments under `environments/`, or a TOML file of your own.

A file called `pac-nano-N.toml` is a family: `counts` lists its members, and `any_count` opens it to every N. What
follows an @ is the same testbed with other links: `galaxy-e@500mbit`, `galaxy-e@5ms`, `galaxy-e@500mbit@5ms`. Boards
may have another memory, or take another time to launch a kernel: `nano-4@2.5gib@145us`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from harness.cluster import Cluster, Device
from harness.errors import OrreryError, unknown_name
from harness.faults import HEARTBEAT_TIMEOUT_S
from testbeds.constants import Constant, Table, read
from testbeds.profiles import MEDIA, MODEL_CONSTANTS, PORT_CONSTANTS, POWERS, DeviceProfile, devices, load_device

__all__ = ["Assumption", "Testbed", "devices", "load", "load_device", "names"]

MODES = ("simulated", "emulated", "real")
DUPLEX = ("full", "half", "shared")
PACED, QUOTA = "paced", "quota"
MAX_DEVICES = 10_000
#: Heartbeats come every 0.15 s; a few of them may be late where the machine is busy.
LEAST_TIMEOUT_S = 0.6
FAMILY = "-N"
MEMORY, LAUNCH = "usable_memory_bytes", "kernel_overhead_s"
#: What can be asked for with an @ behind a testbed's name: unit -> the constant that it changes, and its size.
CHANGES = {
    "mbit": ("nominal_mbit_per_s", 1.0),
    "ms": ("latency_s", 1e-3),
    "gib": (MEMORY, 2.0**30),
    "us": (LAUNCH, 1e-6),
}
#: What may be nothing at all.
MAY_BE_ZERO = ("latency_s", LAUNCH)


@dataclass(frozen=True)
class Assumption:
    """A constant of `owner` (a device profile or "link") that is assumed, or fitted to published cells."""

    owner: str
    key: str
    constant: Constant


@dataclass(frozen=True)
class Event:
    """At `at_s` of the run the link of `device` goes "down" or "up", or passes `mbit_per_s` nominal from then on."""

    at_s: float
    device: str
    link: str | None = None
    mbit_per_s: float | None = None


@dataclass(frozen=True)
class Slot:
    """A device's place in a testbed: its profile, its battery, and what this machine gives it as a process here."""

    profile: DeviceProfile
    cpu_share: float = 1.0
    memory_bytes: int | None = None
    battery_j: float | None = None


@dataclass(frozen=True)
class Testbed:
    """Devices and links, the modes that can run on them, and the assumed and fitted constants underneath.

    `medium` is "loopback" where the links are this machine's own. `own_memory` are the devices with a memory of their
    own; the others share this machine's. `events` happen while the testbed is emulated.
    `computing` says what gives emulated devices their speed: "paced" actions take the time that the device needs, by a
    "quota" it has a share of a core. `heartbeat_timeout_s`: a device of which nothing is heard for so
    long is lost.
    """

    name: str
    description: str
    cluster: Cluster
    modes: tuple[str, ...]
    assumptions: tuple[Assumption, ...]
    path: Path
    medium: str
    own_memory: frozenset[str]
    events: tuple[Event, ...] = ()
    computing: str = PACED
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S

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
    """A testbed by its name, or by the path of a TOML file, with other links or memories where an @ asks for them.

    Raises OrreryError for anything wrong with any of it.
    """
    place, *asked = [name_or_path] if name_or_path.endswith(".toml") else name_or_path.split("@")
    if ".toml@" in name_or_path:  # the path of a file may have an @ of its own
        folder, _, rest = name_or_path.rpartition(".toml@")
        place, asked = f"{folder}.toml", rest.split("@")
    changes = _changes(name_or_path, asked)
    if place.endswith(".toml"):
        path = Path(place).expanduser()
        if _is_family(path):
            raise OrreryError(
                f"{path} describes a family of testbeds. The file of a single testbed has no {FAMILY!r} at the end of "
                "its name, and `count` in its [[devices]] instead of `counts`."
            )
        return _load(path, "@".join((path.stem, *asked)), changes)
    path = _folder() / f"{place}.toml"
    if path.exists() and not _is_family(path):
        return _load(path, name_or_path, changes)
    if match := re.fullmatch(r"(.+)-([1-9][0-9]*)", place):
        path = _folder() / f"{match[1]}{FAMILY}.toml"
        if path.exists():
            return _load(path, name_or_path, changes, int(match[2]))
    raise unknown_name("testbed", place, names())


def _changes(name: str, asked: Sequence[str]) -> dict[str, Constant]:
    """The constants that the testbed's name asks for: "500mbit" is a nominal rate of the links, "5ms" their latency,
    "8gib" the memory of every device, "145us" the time that each board takes to launch a kernel."""
    found: dict[str, Constant] = {}
    for text in asked:
        match = re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?)({'|'.join(CHANGES)})", text)
        key, unit = CHANGES[match[2]] if match is not None else ("", 0.0)
        if match is None or key in found or (key not in MAY_BE_ZERO and float(match[1]) == 0):
            raise OrreryError(
                f"The testbed {name!r} asks for {text!r}. Give a rate of the links like @500mbit, a latency like @5ms, "
                "the memory of a device like @8gib, the launch of a kernel like @145us, or several of them, each once."
            )
        found[key] = Constant(float(match[1]) * unit, "definition", "asked for by the testbed's name")
    return found


def _folder() -> Path:
    return Path(str(files("testbeds"))) / "environments"


def _is_family(path: Path) -> bool:
    return path.stem.endswith(FAMILY)


def _member(path: Path, count: int) -> str:
    return f"{path.stem.removesuffix(FAMILY)}-{count}"


def _counts(table: Table) -> list[int]:
    return table.list_of("counts", int, "whole numbers of at least 1", lambda count: count >= 1)


def _load(path: Path, name: str, changes: Mapping[str, Constant], count: int | None = None) -> Testbed:
    """Read one environment. `count` is the N of a family's member, None where the file is no family.

    `changes` are constants that hold instead of the file's: of its links and of every device.
    """
    links = {key: constant for key, constant in changes.items() if key not in (MEMORY, LAUNCH)}
    table = read(path)
    description = table.text("description").replace("{N}", str(count))
    modes = table.list_of("modes", str, f"modes, of {', '.join(MODES)}", lambda mode: mode in MODES)
    if count is not None:
        counts = _counts(table)
        open_family = table.has("any_count") and table.take("any_count", bool, "true or false")
        if count not in counts and not open_family:
            members = ", ".join(_member(path, n) for n in counts)
            raise OrreryError(f"There is no testbed called {name!r}. Its family has {members}.")
    computing = table.choice("computing", (PACED, QUOTA)) if table.has("computing") else PACED
    timeout_s = HEARTBEAT_TIMEOUT_S
    if table.has("heartbeat_timeout_s"):
        timeout_s = table.number("heartbeat_timeout_s", allow_zero=False)
        if timeout_s < LEAST_TIMEOUT_S:
            raise table.error("heartbeat_timeout_s", f"is {timeout_s:g}. It must be at least {LEAST_TIMEOUT_S:g}.")
    slots = _slots(table, path.parent, count)
    if MEMORY in changes:
        slots = [replace(slot, memory_bytes=int(changes[MEMORY].value)) for slot in slots]
    if LAUNCH in changes:
        slots = [_launching(slot, changes[LAUNCH], name) for slot in slots]
    link = table.table("link")
    ranks = {f"device{rank}": slot for rank, slot in enumerate(slots)}
    events = tuple(_events(table, ranks))
    table.close()

    medium = link.choice("medium", MEDIA)
    duplex = link.choice("duplex", DUPLEX)
    constants = {
        "nominal_mbit_per_s": link.constant("nominal_mbit_per_s"),
        "tcp_efficiency": link.constant("tcp_efficiency"),
        "latency_s": link.constant("latency_s", allow_zero=True),
        **links,
    }
    link.close()
    if links and medium == "loopback":
        raise OrreryError(
            f"{name}: nothing shapes the links of a testbed on loopback. Choose one with links of its own."
        )
    if constants["tcp_efficiency"].value > 1:
        raise link.error("tcp_efficiency", f"is {constants['tcp_efficiency'].value}. It is a fraction, at most 1.")
    mbit_per_s = constants["nominal_mbit_per_s"].value * constants["tcp_efficiency"].value

    cluster = Cluster(
        name=name,
        devices=tuple(_device(d, slot, slots) for d, slot in ranks.items()),
        bandwidth={d: _port_mbit_per_s(slot.profile, medium, mbit_per_s) * 1e6 / 8 for d, slot in ranks.items()},
        latency_s=constants["latency_s"].value,
        duplex=duplex,
    )
    used = {slot.profile.name: _used(slot.profile, medium, changes) for slot in slots} | {"link": constants}
    own = {d for d, slot in ranks.items() if slot.memory_bytes is not None or slot.profile.measured is None}
    return Testbed(
        name=name,
        description=description,
        cluster=cluster,
        modes=tuple(modes),
        assumptions=tuple(_assumptions(used)),
        path=path,
        medium=medium,
        own_memory=frozenset(own),
        events=events,
        computing=computing,
        heartbeat_timeout_s=timeout_s,
    )


def _slots(table: Table, beside: Path, count: int | None) -> list[Slot]:
    """Every device, in rank order."""
    entries = table.tables("devices")
    if count is not None and len(entries) != 1:
        raise table.error("devices", f"has {len(entries)} entries. A family repeats exactly one.")
    slots: list[Slot] = []
    for entry in entries:
        name = entry.text("profile")
        repeat = count or 1
        if entry.has("count"):
            if count is not None:
                raise entry.error("count", "contradicts `counts`: in a family the testbed's name says how many.")
            repeat = entry.take("count", int, "a whole number of at least 1")
        if not 1 <= repeat <= MAX_DEVICES - len(slots):
            raise entry.error("count", f"is {repeat}. A testbed has 1 to {MAX_DEVICES} devices.")
        try:
            profile = load_device(name, beside)
        except OrreryError as error:
            raise entry.error("profile", f"is {name!r}. {error}") from None
        slots += [_slot(entry, profile)] * repeat
        entry.close()
    return slots


def _slot(entry: Table, profile: DeviceProfile) -> Slot:
    """`cpu_share` and `memory_bytes` are for processes of this machine: a board has its own. `battery_j`: the joules
    that it may use in a simulated run."""
    share, memory = 1.0, None
    for key in ("cpu_share", "memory_bytes"):
        if entry.has(key) and profile.measured is None:
            raise entry.error(key, f"is for processes of this machine; {profile.name} is a board, and has its own.")
    if entry.has("cpu_share"):
        share = entry.number("cpu_share", allow_zero=False)
        if share > 1:
            raise entry.error("cpu_share", f"is {share}. It is a fraction of one core, at most 1.")
    if entry.has("memory_bytes"):
        memory = entry.take("memory_bytes", int, "a whole number of at least 1")
        if memory < 1:
            raise entry.error("memory_bytes", f"is {memory}. It must be a whole number of at least 1.")
    battery_j = None
    if entry.has("battery_j"):
        battery_j = entry.number("battery_j", allow_zero=False)
        unknown = [key for key in POWERS if profile.value(key) is None]
        if unknown:
            lacks = f"{profile.name} lacks {' and '.join(unknown)}"
            raise entry.error("battery_j", f"is of no use: {lacks}, without which nobody can tell what it uses.")
    return Slot(profile, share, memory, battery_j)


def _launching(slot: Slot, launch: Constant, name: str) -> Slot:
    """The board with another time to launch a kernel."""
    if slot.profile.measured is not None:
        raise OrreryError(f"{name}: what {slot.profile.name} takes to launch a kernel is in its measured times.")
    return replace(slot, profile=replace(slot.profile, constants={**slot.profile.constants, LAUNCH: launch}))


def _events(table: Table, ranks: Mapping[str, Slot]) -> Iterator[Event]:
    """Changes of links while the testbed is emulated, in order of time."""
    found = []
    for entry in table.tables("events") if table.has("events") else ():
        at_s = entry.number("at_s", allow_zero=True)
        device = entry.text("device")
        if device not in ranks:
            raise entry.error("device", f"is {device!r}. The testbed has {', '.join(ranks)}.")
        if entry.has("link") == entry.has("mbit_per_s"):
            raise entry.error("link", 'or `mbit_per_s` must be given, one of the two: "down" or "up", or a rate.')
        if entry.has("link"):
            found.append(Event(at_s, device, link=entry.choice("link", ("down", "up"))))
        else:
            found.append(Event(at_s, device, mbit_per_s=entry.number("mbit_per_s", allow_zero=False)))
        entry.close()
    yield from sorted(found, key=lambda event: event.at_s)


def _device(name: str, slot: Slot, slots: Sequence[Slot]) -> Device:
    """As planners see it: a share of a core has the same share of its memory bandwidth."""
    device = replace(slot.profile.device(name, _memory_bytes(slot, slots)), battery_j=slot.battery_j)
    if slot.profile.measured is None:
        return device
    return replace(device, share=slot.cpu_share, memory_bandwidth=device.memory_bandwidth * slot.cpu_share)


def _memory_bytes(slot: Slot, slots: Sequence[Slot]) -> int:
    """A board's usable memory; processes of this machine share what it has installed, unless told otherwise."""
    if slot.memory_bytes is not None:
        return slot.memory_bytes
    if slot.profile.measured is None:
        return int(slot.profile.required("usable_memory_bytes"))
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return installed // sum(s.profile.measured is not None for s in slots)


def _port_mbit_per_s(profile: DeviceProfile, medium: str, link_mbit_per_s: float) -> float:
    """What TCP gets through a device's port: the link's rate, or the port's own where that is less."""
    if medium not in PORT_CONSTANTS or profile.measured is not None:  # a virtual port is as fast as is asked for
        return link_mbit_per_s
    return min(link_mbit_per_s, profile.required(PORT_CONSTANTS[medium]))


def _used(profile: DeviceProfile, medium: str, changes: Collection[str]) -> dict[str, Constant]:
    """The constants of a profile that reach the cluster: not those in whose place are others."""
    keys = {*MODEL_CONSTANTS, PORT_CONSTANTS.get(medium)}.difference(changes)
    return {key: constant for key, constant in profile.constants.items() if key in keys}


def _assumptions(used: dict[str, dict[str, Constant]]) -> Iterator[Assumption]:
    for owner, constants in used.items():
        for key, constant in constants.items():
            if constant.provenance in ("assumed", "fitted"):
                yield Assumption(owner, key, constant)
