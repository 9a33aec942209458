"""CPU and memory limits of emulated devices: control groups (cgroups) of version 1, 2, or both mixed.

All groups of a campaign lie in one named after the process that owns it, so that those of dead owners can be told.

Memory is limited per process, computing per thread: what waits for the network and copies what comes must not wait for
the device's share of a core, for no link would be as fast as it is.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from harness.errors import OrreryError

PROC = Path("/proc")
CONTROLLERS = ("cpu", "memory")
#: Process id, its start in clock ticks since boot (ids are used again), its namespace of process ids (ids of another
#: container would look dead here).
NAME = re.compile(r"orrery-(\d+)-(\d+)-(\d+)")
#: A killed process needs this long to leave its group, with all its memory, on a busy machine.
LEAVE_TIMEOUT_S = 10.0
#: Version 2: the group of the threads that compute, inside that of their process.
COMPUTING = "computing"
#: What version 1 reads and shows as "no limit".
UNLIMITED = "-1"

NO_GROUPS = (
    "Run as root, or in a group of your own: systemd-run --user --scope -p Delegate=yes. A container needs a writable "
    "/sys/fs/cgroup. A Raspberry Pi needs cgroup_enable=memory in its kernel's command line."
)


@dataclass(frozen=True)
class Limits:
    """What can be limited on this machine, by this user. `why` is empty where all can."""

    cpu: bool
    memory: bool
    why: str


class Entrances(NamedTuple):
    """Files that take an id: of a process that is to be in the groups of a device, then of its thread that computes."""

    process: tuple[str, ...] = ()
    computing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Memory:
    """What the kernel counted of a device. `peak_bytes` is None where it keeps none (version 2 before Linux 5.19)."""

    peak_bytes: int | None
    oom_kills: int


@dataclass(frozen=True)
class Leftover:
    """A campaign's group whose owner is dead, and the processes still in it and in the groups below."""

    path: Path
    pids: tuple[int, ...]


@dataclass(frozen=True)
class Hierarchy:
    """A mounted tree of groups. `own` is this process's group in it."""

    version: int
    mount: Path
    own: Path
    controllers: tuple[str, ...]


@dataclass(frozen=True)
class Base:
    """The group below which a campaign's groups are made, and what those can limit."""

    version: int
    path: Path
    controllers: tuple[str, ...]


class Groups:
    """The groups of one campaign, owned by this process: one per device in each hierarchy. Removed by `remove`.

    `proc` is the folder that says where the hierarchies are and who is alive.
    """

    def __init__(self, proc: Path = PROC):
        bases, self._why = _bases(proc)
        self.name = group_name(os.getpid(), proc)
        self._places: list[Base] = []
        for base in bases:
            place = Base(base.version, base.path / self.name, base.controllers)
            _make(place.path)
            self._places.append(place)
            if place.version == 2:
                _enable(place.path, place.controllers)

    def add(self, device: str) -> None:
        """Make the groups of a device, without limits."""
        for place in self._places:
            group = place.path / device
            _make(group)
            if place.version == 2 and "cpu" in place.controllers:
                _make(group / COMPUTING)
                _write(group / COMPUTING / "cgroup.type", "threaded")
                _enable(group, ("cpu",))

    def limit_cpu(self, device: str, quota: tuple[int, int] | None) -> None:
        """At most `quota = (quota_us, period_us)`: so many microseconds of computing in each period. None: no limit."""
        place = self._place("cpu")
        group = place.path / device
        if place.version == 2:
            _write(group / COMPUTING / "cpu.max", "max" if quota is None else f"{quota[0]} {quota[1]}")
            return
        _write(group / "cpu.cfs_quota_us", UNLIMITED)  # else the new period with the old quota may be refused
        if quota is not None:
            _write(group / "cpu.cfs_period_us", str(quota[1]))
            _write(group / "cpu.cfs_quota_us", str(quota[0]))

    def limit_memory(self, device: str, limit_bytes: int) -> None:
        """A device that uses more is killed by the kernel, and none of it is swapped out. Rounded down to pages."""
        place = self._place("memory")
        group = place.path / device
        if place.version == 2:
            _write(group / "memory.max", str(limit_bytes))
            if (group / "memory.swap.max").exists():  # not where the kernel can't swap
                _write(group / "memory.swap.max", "0")
            return
        both = group / "memory.memsw.limit_in_bytes"  # memory and swap; not where the kernel does not count swap
        if both.exists():
            _write(both, UNLIMITED)  # may never be less than memory alone
        _write(group / "memory.limit_in_bytes", str(limit_bytes))
        if both.exists():
            _write(both, str(limit_bytes))

    def entrances(self, device: str) -> Entrances:
        """How to enter a device's groups. Where version 1 has one hierarchy for both, all threads share a quota."""
        process, computing = [], []
        for place in self._places:
            group = place.path / device
            if place.controllers == ("cpu",) and place.version == 1:
                computing.append(str(group / "tasks"))
                continue
            process.append(str(group / "cgroup.procs"))
            if place.version == 2 and "cpu" in place.controllers:
                computing.append(str(group / COMPUTING / "cgroup.threads"))
        return Entrances(tuple(process), tuple(computing))

    def memory(self, device: str) -> Memory:
        """The most memory a device ever used, and how many of its processes were killed for using too much."""
        place = self._place("memory")
        group = place.path / device
        if place.version == 2:
            peak, events = group / "memory.peak", group / "memory.events"
        else:
            peak, events = group / "memory.max_usage_in_bytes", group / "memory.oom_control"
        counts = dict(line.split() for line in _read(events).splitlines())
        return Memory(int(_read(peak)) if peak.exists() else None, int(counts["oom_kill"]))

    def remove(self) -> None:
        """Remove all groups. Waits for processes that are ending, and kills none: who is left is an OrreryError."""
        for place in self._places:
            _remove(place.path)
        self._places.clear()

    def _place(self, controller: str) -> Base:
        for place in self._places:
            if controller in place.controllers:
                return place
        raise OrreryError(f"The {controller} of a device can't be limited here: {self._why}")


def available(proc: Path = PROC) -> Limits:
    """What can be limited here: tried out, with a group that is removed at once."""
    if not _has_groups(proc):
        return Limits(False, False, "Control groups are Linux's, and this is another system, or has no /proc.")
    bases, why = _bases(proc)
    can = {controller for base in bases for controller in base.controllers}
    return Limits("cpu" in can, "memory" in can, why)


def leftovers(proc: Path = PROC) -> list[Leftover]:
    """Groups of campaigns whose owner is dead, anywhere in the hierarchies."""
    if not _has_groups(proc):
        return []
    found = []
    for hierarchy in _hierarchies(proc):
        for folder, names, _ in os.walk(hierarchy.mount):
            campaigns = [name for name in names if NAME.fullmatch(name)]
            names[:] = [name for name in names if name not in campaigns]
            dead = [Path(folder, name) for name in campaigns if not _is_alive(name, proc)]
            found += [Leftover(path, tuple(_pids(path))) for path in dead]
    return sorted(found, key=lambda leftover: leftover.path)


def clean(proc: Path = PROC) -> list[Leftover]:
    """Remove the leftovers, killing what runs in them, for its owner is dead. Returns what there was."""
    found = leftovers(proc)
    for leftover in found:
        for pid in leftover.pids:
            _kill(pid, leftover.path)
    for leftover in found:
        _remove(leftover.path)
    return found


def group_name(pid: int, proc: Path = PROC) -> str:
    """The name of the campaign that a living process owns."""
    start = _start(pid, proc)
    if start is None:
        raise OrreryError(f"There is no process {pid} that could own groups.")
    return f"orrery-{pid}-{start}-{_pid_namespace(proc)}"


def is_leftover(name: str, proc: Path = PROC) -> bool:
    """Whether `name` is that of a campaign whose owner is dead."""
    return NAME.fullmatch(name) is not None and not _is_alive(name, proc)


def _is_alive(name: str, proc: Path) -> bool:
    """Whether the owner of a campaign's group lives, or can't be judged from here."""
    match = NAME.fullmatch(name)
    assert match is not None
    pid, start, namespace = map(int, match.groups())
    return namespace != _pid_namespace(proc) or _start(pid, proc) == start


def _start(pid: int, proc: Path) -> int | None:
    """When a process started, in clock ticks since boot. None if there is none, or but its exit code."""
    try:
        stat = (proc / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the program's name may hold blanks and brackets
    return None if state in "ZX" else int(fields[18])


def _pid_namespace(proc: Path) -> int:
    return (proc / "self" / "ns" / "pid").stat().st_ino


def _has_groups(proc: Path) -> bool:
    return (proc / "self" / "cgroup").is_file()


def _hierarchies(proc: Path) -> list[Hierarchy]:
    """The mounted hierarchies that have any of our controllers, each controller once."""
    own: dict[str, str] = {}
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)  # version 2 has the name ""
    found: list[Hierarchy] = []
    for line in (proc / "self" / "mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, mount_point = before.split()[3:5]
        kind, _, options = after.split(" ", 2)
        mount = Path(mount_point.replace("\\040", " "))
        if kind == "cgroup":
            here = tuple(c for c in CONTROLLERS if c in options.split(",") and c in own)
            if here:
                found.append(Hierarchy(1, mount, _inside(mount, root, own[here[0]]), here))
        elif kind == "cgroup2" and "" in own:
            offered = _words(mount / "cgroup.controllers")
            here = tuple(c for c in CONTROLLERS if c in offered)
            if here:
                found.append(Hierarchy(2, mount, _inside(mount, root, own[""]), here))
    taken: set[str] = set()
    once = []
    for hierarchy in found:  # a hierarchy may be mounted more than once
        if not taken & set(hierarchy.controllers):
            once.append(hierarchy)
        taken |= set(hierarchy.controllers)
    return once


def _inside(mount: Path, root: str, path: str) -> Path:
    """Where a group lies below a mount that may show but a part of its hierarchy, as in a container."""
    if path == root or path.startswith(root.rstrip("/") + "/"):
        path = path[len(root.rstrip("/")) :]
    inside = mount / path.lstrip("/")
    return inside if inside.is_dir() else mount


def _bases(proc: Path) -> tuple[list[Base], str]:
    """Where groups can be made, and why some can't."""
    bases: list[Base] = []
    reasons = []
    hierarchies = _hierarchies(proc)
    name = group_name(os.getpid(), proc)
    for hierarchy in hierarchies:
        try:
            bases.append(_base_v1(hierarchy, name) if hierarchy.version == 1 else _base_v2(hierarchy, name))
        except OrreryError as error:
            reasons.append(str(error))
    can = {controller for base in bases for controller in base.controllers}
    tried = {controller for hierarchy in hierarchies for controller in hierarchy.controllers}
    for controller in CONTROLLERS:
        if controller not in tried:
            reasons.append(f"No control groups with the controller {controller} are mounted.")
        elif controller not in can and not reasons:
            reasons.append(f"No group above this process passes the controller {controller} on.")
    return bases, f"{' '.join(reasons)} {NO_GROUPS}" if reasons else ""


def _base_v1(hierarchy: Hierarchy, name: str) -> Base:
    _try(hierarchy.own / name)
    return Base(1, hierarchy.own, hierarchy.controllers)


def _base_v2(hierarchy: Hierarchy, name: str) -> Base:
    """The nearest group, from this process's own upwards, that passes our controllers on to a group of ours below it.

    One that holds processes itself can't ("no internal processes"), save the root; so that it is mostly the parent.
    """
    above = [hierarchy.own, *hierarchy.own.parents]
    candidates = above[: above.index(hierarchy.mount) + 1]
    refusals = []
    for wanted in (hierarchy.controllers, *((c,) for c in hierarchy.controllers[1:] + hierarchy.controllers[:1])):
        for path in candidates:
            if not set(wanted) <= _words(path / "cgroup.controllers"):
                continue
            try:
                _enable(path, wanted)
                _try(path / name)
                return Base(2, path, wanted)
            except OrreryError as error:
                refusals.append(str(error))
    raise OrreryError(refusals[0] if refusals else f"{hierarchy.own} and those above it have no controllers.")


def _enable(group: Path, controllers: tuple[str, ...]) -> None:
    """Pass controllers on to the groups below a group of version 2."""
    control = group / "cgroup.subtree_control"
    if not set(controllers) <= _words(control):
        _write(control, " ".join(f"+{controller}" for controller in controllers))


def _words(file: Path) -> set[str]:
    return set(file.read_text().split()) if file.is_file() else set()


def _try(group: Path) -> None:
    """Make and remove a group, unless this process owns it already."""
    if not group.is_dir():
        _make(group)
        group.rmdir()


def _make(group: Path) -> None:
    try:
        group.mkdir()
    except OSError as error:
        raise OrreryError(f"The group {group} can't be made: {error.strerror}.") from error


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise OrreryError(f"{text!r} can't be written to {file}: {error.strerror}.") from error


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError as error:
        raise OrreryError(f"{file} can't be read: {error.strerror}.") from error


def _below(group: Path) -> Iterator[Path]:
    """A group and all below it, the lowest first."""
    for folder, _, _ in os.walk(group, topdown=False):
        yield Path(folder)


def _pids(group: Path) -> list[int]:
    """The processes in a group and those below it. 0 is one of another namespace of process ids."""
    found: set[int] = set()
    for folder in _below(group):
        try:
            found.update(map(int, (folder / "cgroup.procs").read_text().split()))
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # a group of threads, whose processes are in the one above
                raise
    return sorted(found)


def _kill(pid: int, group: Path) -> None:
    """Kill a process if it is still in the group: its id may have been given to another one."""
    if pid == 0:
        return
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if pid in _pids(group):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)


def _remove(group: Path) -> None:
    """Remove a group and all below it, once their processes have left."""
    give_up = time.monotonic() + LEAVE_TIMEOUT_S
    while group.exists():
        try:
            for folder in _below(group):
                folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError as error:
            if time.monotonic() > give_up:
                living = ", ".join(map(str, _pids(group))) or "none"
                raise OrreryError(
                    f"The group {group} can't be removed: {error.strerror}. Processes in it: {living}. "
                    "End them, then remove it with `orrery doctor --clean`."
                ) from error
            time.sleep(0.01)
