"""Control groups: for real where this machine lets us, version 2 and refusals on folders made to look like them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.errors import OrreryError
from testbeds.emulation import cgroups
from testbeds.emulation.cgroups import Groups, Limits
from tests.testbeds.emulation.yard import ROOT

#: Moves itself into the groups of a device, as a worker does, then computes or fills memory.
WORKER = """
import json, pathlib, sys, time
files, task, amount = json.loads(sys.argv[1]), sys.argv[2], float(sys.argv[3])
for file in files:
    pathlib.Path(file).write_text("0")
if task == "fill":
    filled = bytearray(int(amount))
elif task == "sleep":
    print("in", flush=True)
    time.sleep(amount)
else:
    start, cpu = time.monotonic(), time.process_time()
    while time.monotonic() - start < amount:
        pass
    print((time.process_time() - cpu) / (time.monotonic() - start))
"""


LIMITS = cgroups.available()
needs_limits = pytest.mark.skipif(not (LIMITS.cpu and LIMITS.memory), reason=LIMITS.why)


@pytest.fixture
def groups() -> Iterator[Groups]:
    campaign = Groups()
    try:
        campaign.add("device0")
        campaign.add("device1")
        yield campaign
    finally:
        campaign.remove()


def worker(groups: Groups, device: str, task: str, amount: float) -> subprocess.Popen[str]:
    process, computing = groups.entrances(device)
    command = [sys.executable, "-c", WORKER, json.dumps(process + computing), task, str(amount)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def folders_of(name: str, device: str = "") -> list[Path]:
    found = [Path(folder) for folder, names, _ in os.walk("/sys/fs/cgroup") if os.path.basename(folder) == name]
    return [folder / device for folder in found]


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=20)
    return output


@needs_limits
def test_a_quota_slows_a_process_down(groups: Groups) -> None:
    groups.limit_cpu("device0", (2_000, 10_000))
    assert float(finish(worker(groups, "device0", "compute", 0.5))) == pytest.approx(0.2, abs=0.04)
    groups.limit_cpu("device0", (2_500, 5_000))  # also when it was slower before
    assert float(finish(worker(groups, "device0", "compute", 0.5))) < 0.6
    groups.limit_cpu("device0", None)
    groups.limit_cpu("device0", (50_000, 100_000))


@needs_limits
def test_a_quota_is_for_the_thread_that_computes(groups: Groups) -> None:
    """Those that were there before, and wait for the network, stay outside."""
    program = (
        "import json, pathlib, sys, threading, time\n"
        "other = threading.Thread(target=time.sleep, args=(0.5,)); other.start()\n"
        "for file in json.loads(sys.argv[1]): pathlib.Path(file).write_text('0')\n"
        "tasks = pathlib.Path('/proc/self/task')\n"
        "print(json.dumps([(tasks / str(t.native_id) / 'cgroup').read_text() for t in threading.enumerate()]))"
    )
    process, computing = groups.entrances("device0")
    command = [sys.executable, "-c", program, json.dumps(process + computing)]
    main, other = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=20).stdout)
    in_main, in_other = main.count(groups.name), other.count(groups.name)
    assert in_main == len(folders_of(groups.name)) and (in_other < in_main or len(computing) == 0)


@needs_limits
def test_who_uses_too_much_memory_is_killed_and_counted(groups: Groups) -> None:
    for device in ("device0", "device1"):
        groups.limit_memory(device, 100 * 2**20)
    hungry, modest = worker(groups, "device0", "fill", 200 * 2**20), worker(groups, "device1", "fill", 50 * 2**20)
    finish(hungry)
    finish(modest)
    assert (hungry.returncode, modest.returncode) == (-9, 0)
    killed, lived = groups.memory("device0"), groups.memory("device1")
    assert (killed.oom_kills, lived.oom_kills) == (1, 0)
    if killed.peak_bytes is not None and lived.peak_bytes is not None:
        assert killed.peak_bytes == 100 * 2**20
        assert 50 * 2**20 < lived.peak_bytes < 80 * 2**20
    groups.limit_memory("device0", 300 * 2**20)  # a higher limit than before
    assert finish(worker(groups, "device0", "fill", 200 * 2**20)) == "" and groups.memory("device0").oom_kills == 1


@needs_limits
def test_removing_waits_for_processes_and_kills_none(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    staying = worker(groups, "device1", "sleep", 20)
    assert staying.stdout is not None and staying.stdout.readline() == "in\n"
    monkeypatch.setattr(cgroups, "LEAVE_TIMEOUT_S", 0.1)
    with pytest.raises(OrreryError, match=rf"can't be removed: .* busy. Processes in it: {staying.pid}. End them"):
        groups.remove()
    assert staying.poll() is None
    monkeypatch.setattr(cgroups, "LEAVE_TIMEOUT_S", 10.0)
    staying.kill()
    groups.remove()
    finish(staying)
    assert folders_of(groups.name) == []


@needs_limits
def test_only_groups_of_dead_owners_are_cleaned(groups: Groups) -> None:
    """An owner that was killed leaves its groups, here with a process in them; ours are not touched."""
    program = (
        "import subprocess, sys, time\n"
        "from testbeds.emulation.cgroups import Groups\n"
        "from harness.fleet.processes import enter\n"
        "groups = Groups(); groups.add('device0'); enter(sum(groups.entrances('device0'), ()))\n"
        "orphan = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)'])\n"
        "print(groups.name, orphan.pid, flush=True); time.sleep(30)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    name, orphan = owner.stdout.readline().split()
    assert not [left for left in cgroups.leftovers() if left.path.name == name]
    owner.kill()
    owner.wait(timeout=10)
    left = [left for left in cgroups.leftovers() if left.path.name == name]
    assert [leftover.path for leftover in left] == sorted(folders_of(name))
    assert all(leftover.pids == (int(orphan),) for leftover in left)
    assert left == [cleaned for cleaned in cgroups.clean() if cleaned.path.name == name]
    assert folders_of(name) == [] and len(folders_of(groups.name)) == len(left)
    give_up = time.monotonic() + 5
    while os.path.exists(f"/proc/{orphan}/exe") and time.monotonic() < give_up:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{orphan}/exe")
    owner.stdout.close()


def version_2(folder: Path, own: str, controllers: str = "cpu io memory") -> tuple[Path, Path]:
    """A /proc of one living process, this one, and the unified hierarchy with its group."""
    proc, mount = folder / "proc", folder / "cgroup with blank"
    (proc / "self" / "ns").mkdir(parents=True)
    (proc / "self" / "ns" / "pid").touch()
    (proc / "self" / "cgroup").write_text(f"0::/{own}\n")
    shown = str(mount).replace(" ", "\\040")
    (proc / "self" / "mountinfo").write_text(f"23 1 0:21 / {shown} rw,nosuid shared:9 - cgroup2 cgroup2 rw\n")
    owner(proc, os.getpid(), 4711)
    (mount / own).mkdir(parents=True)
    for group in [mount / own, *(mount / own).parents]:
        (group / "cgroup.controllers").write_text(controllers)
        (group / "cgroup.subtree_control").write_text("")
        if group == mount:
            return proc, mount
    raise AssertionError


def owner(proc: Path, pid: int, start: int, state: str = "S") -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "stat").write_text(f"{pid} (a (b) c) {state} {'0 ' * 18}{start} 0 0\n")


def test_version_2_writes_what_the_kernel_reads(tmp_path: Path) -> None:
    proc, mount = version_2(tmp_path, "user.slice/run.scope")
    assert cgroups.available(proc) == Limits(True, True, "")
    groups = Groups(proc)
    base = mount / "user.slice" / "run.scope"
    place = base / groups.name
    inode = (proc / "self" / "ns" / "pid").stat().st_ino
    assert groups.name == f"orrery-{os.getpid()}-4711-{inode}"
    assert (base / "cgroup.subtree_control").read_text() == "+cpu +memory"
    assert (place / "cgroup.subtree_control").read_text() == "+cpu +memory"
    groups.add("nano-0")
    device = place / "nano-0"
    (device / "memory.swap.max").write_text("max")
    groups.limit_cpu("nano-0", (2_000, 5_000))
    groups.limit_memory("nano-0", 2**30)
    computing = device / cgroups.COMPUTING
    assert groups.entrances("nano-0") == ((str(device / "cgroup.procs"),), (str(computing / "cgroup.threads"),))
    assert {path.name: path.read_text() for path in device.iterdir() if path.is_file()} == {
        "cgroup.subtree_control": "+cpu",
        "memory.max": str(2**30),
        "memory.swap.max": "0",
    }
    assert {path.name: path.read_text() for path in computing.iterdir()} == {
        "cgroup.type": "threaded",
        "cpu.max": "2000 5000",
    }
    groups.limit_cpu("nano-0", None)
    assert (computing / "cpu.max").read_text() == "max"
    (device / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 1\noom_kill 3\noom_group_kill 0\n")
    assert groups.memory("nano-0") == cgroups.Memory(None, 3)
    (device / "memory.peak").write_text("123456\n")
    assert groups.memory("nano-0") == cgroups.Memory(123456, 3)


def test_version_2_goes_up_from_a_group_that_may_not_pass_controllers_on(tmp_path: Path) -> None:
    """A folder where the kernel has a file refuses to be written, as the kernel does in a group with processes."""
    proc, mount = version_2(tmp_path, "user.slice/run.scope")
    control = mount / "user.slice" / "run.scope" / "cgroup.subtree_control"
    control.unlink()
    control.mkdir()
    groups = Groups(proc)
    assert (mount / "user.slice" / groups.name).is_dir()


def test_version_2_without_the_memory_controller(tmp_path: Path) -> None:
    proc, _ = version_2(tmp_path, "run.scope", "cpu io pids")
    limits = cgroups.available(proc)
    assert (limits.cpu, limits.memory) == (True, False)
    assert limits.why.startswith("No control groups with the controller memory are mounted. Run as root, or in a group")
    groups = Groups(proc)
    groups.add("nano-0")
    groups.limit_cpu("nano-0", (2_000, 5_000))
    with pytest.raises(OrreryError, match="The memory of a device can't be limited here: No control groups with"):
        groups.limit_memory("nano-0", 2**30)


def test_version_2_rather_memory_alone_than_a_group_of_others(tmp_path: Path) -> None:
    """As systemd hands groups to users: memory in their own, the processor only in those of root."""
    proc, mount = version_2(tmp_path, "user.slice/run.scope")
    for group in (mount / "user.slice", mount / "user.slice" / "run.scope"):
        (group / "cgroup.controllers").write_text("memory pids")
    (mount / cgroups.group_name(os.getpid(), proc)).write_text("in the way")
    limits = cgroups.available(proc)
    assert (limits.cpu, limits.memory) == (False, True)
    assert limits.why.startswith("No group above this process passes the controller cpu on. Run as root, or in")


def test_where_no_group_can_be_made(tmp_path: Path) -> None:
    proc, mount = version_2(tmp_path, "run.scope")
    for group in (mount, mount / "run.scope"):
        (group / "cgroup.subtree_control").unlink()
        (group / "cgroup.subtree_control").mkdir()
    limits = cgroups.available(proc)
    assert (limits.cpu, limits.memory) == (False, False)
    assert f"'+cpu +memory' can't be written to {mount}/run.scope/cgroup.subtree_control: Is a directory" in limits.why
    assert "systemd-run --user --scope -p Delegate=yes" in limits.why


def test_a_mount_that_shows_a_part_of_its_hierarchy(tmp_path: Path) -> None:
    """In a container the mount begins at the container's own group, and the path in /proc does not."""
    proc, mount = version_2(tmp_path, "app")
    (proc / "self" / "cgroup").write_text("4:memory:/docker/c0ffee/app\n3:cpu,cpuacct:/docker/c0ffee/app\n0::/\n")
    line = "{} 1 0:{} /docker/c0ffee {} ro - cgroup cgroup rw,{}\n"
    shown = str(mount).replace(" ", "\\040")
    (proc / "self" / "mountinfo").write_text(
        line.format(1, 1, shown, "memory") + line.format(2, 2, shown, "cpu,cpuacct")
    )
    assert [h.own for h in cgroups._hierarchies(proc)] == [mount / "app", mount / "app"]
    assert [h.controllers for h in cgroups._hierarchies(proc)] == [("memory",), ("cpu",)]


def test_another_system_has_no_groups(tmp_path: Path) -> None:
    limits = cgroups.available(tmp_path)
    assert (limits.cpu, limits.memory) == (False, False) and "Control groups are Linux's" in limits.why
    assert cgroups.leftovers(tmp_path) == cgroups.clean(tmp_path) == []


def test_whose_owner_is_dead(tmp_path: Path) -> None:
    proc, mount = version_2(tmp_path, "run.scope")
    here = (proc / "self" / "ns" / "pid").stat().st_ino
    owner(proc, 10, 100)
    owner(proc, 11, 100, "Z")
    names = {
        f"orrery-10-100-{here}": False,
        f"orrery-10-99-{here}": True,  # its id was given to another process
        f"orrery-11-100-{here}": True,  # nothing of it is left but an exit code
        f"orrery-12-100-{here}": True,
        f"orrery-12-100-{here + 1}": False,  # of another container: its ids are not ours
        "orrery-12": False,
        "system.slice": False,
    }
    for name in names:
        (mount / name / "device0").mkdir(parents=True)
    (mount / "run.scope" / f"orrery-13-1-{here}").mkdir()  # anywhere in the hierarchy
    (mount / "run.scope" / f"orrery-13-1-{here}" / "cgroup.procs").write_text("")
    dead = {mount / name for name, is_dead in names.items() if is_dead} | {mount / "run.scope" / f"orrery-13-1-{here}"}
    assert {left.path for left in cgroups.leftovers(proc)} == dead
    (mount / "run.scope" / f"orrery-13-1-{here}" / "cgroup.procs").unlink()  # the kernel's files don't hinder removal
    assert {left.path for left in cgroups.clean(proc)} == dead
    assert sorted(path.name for path in mount.iterdir() if path.is_dir()) == sorted(
        ["run.scope", *(name for name, is_dead in names.items() if not is_dead)]
    )
    assert cgroups.clean(proc) == []
