"""Namespaces for real, in a process of their own: the tests' process has threads and must stay where it is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.errors import OrreryError
from testbeds.emulation import namespaces
from tests.testbeds.emulation.yard import ROOT, yard

NOBODY = 65534
SYSTEM_PYTHON = "/usr/bin/python3"

linux = pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")


def can_emulate() -> bool:
    if sys.platform != "linux":
        return False
    try:
        with yard(0):
            return True
    except OrreryError:
        return False


needs_namespaces = pytest.mark.skipif(not can_emulate(), reason="the kernel refuses namespaces here")
needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root drops its rights")


def links() -> str:
    return subprocess.run([namespaces.program("ip"), "-br", "link"], capture_output=True, text=True, check=True).stdout


def inside(names: set[str]) -> list[int]:
    """The processes in any of the network namespaces."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if os.readlink(folder / "ns" / "net") in names:
                    found.append(int(folder.name))
            except OSError:
                continue  # it ended meanwhile
    return found


def test_every_rank_has_an_address_of_its_own() -> None:
    addresses = [namespaces.address(rank) for rank in range(namespaces.MOST_DEVICES)]
    assert addresses[0] == "10.77.0.1" and addresses[250] == "10.77.1.1" and addresses[-1] == "10.77.3.250"
    assert len(set(addresses)) == namespaces.MOST_DEVICES
    with pytest.raises(OrreryError, match="Rank 1000 can't be emulated: a switch takes 1000 devices"):
        namespaces.address(1000)


@needs_namespaces
def test_devices_reach_each_other_and_nothing_else() -> None:
    with yard(3) as three:
        assert three.ask("send", 0, 2, 100_000) < 1
        assert three.ask("send", 2, 1, 100_000) < 1
        interfaces = [line.split()[0] for line in three.ask("show", 1, ["ip", "-br", "link"]).splitlines()]
        assert interfaces == ["lo", next(name for name in interfaces if name.startswith("eth0@"))]
        assert three.ask("show", 1, ["ip", "route"]).split()[:3] == ["10.77.0.0/16", "dev", "eth0"]
        assert len({os.readlink(f"/proc/{pid}/ns/net") for pid in (os.getpid(), *three.pids)}) == 4


@needs_namespaces
def test_nothing_is_left_when_the_nursery_is_killed() -> None:
    before = links()
    with yard(2) as two:
        names = {os.readlink(f"/proc/{pid}/ns/net") for pid in (two.process.pid, *two.pids)}
        assert len(names) == 3 and len(inside(names)) == 3
        assert links() == before  # nothing of it is in the namespace of the tests
        two.process.kill()
        two.process.wait(timeout=5)
        give_up = time.monotonic() + 5
        while inside(names) and time.monotonic() < give_up:
            time.sleep(0.01)
        assert inside(names) == []
    assert links() == before


@needs_namespaces
@needs_root
def test_without_root_in_a_user_namespace() -> None:
    if not can_be_read_by_others():
        pytest.skip("others can't read this checkout, or have no Python")
    try:
        with yard(2, user=NOBODY, python=SYSTEM_PYTHON) as two:
            assert {os.stat(f"/proc/{pid}").st_uid for pid in (two.process.pid, *two.pids)} == {NOBODY}
            two.ask("shape", 0, 50.0)
            two.ask("shape", 1, 50.0)
            assert 0.95 * 0.95 < 1e6 * 8 / 50e6 / two.ask("send", 0, 1, 1_000_000) < 1.05 * 0.95
    except OrreryError as error:
        if "kernel refuses" in str(error):
            pytest.skip(str(error))
        raise


def can_be_read_by_others() -> bool:
    look = f"import os; exit(not os.access({str(ROOT / 'harness' / 'errors.py')!r}, os.R_OK))"
    try:
        return subprocess.run([SYSTEM_PYTHON, "-c", look], user=NOBODY, group=NOBODY, check=False).returncode == 0
    except OSError:
        return False


@linux
@needs_root
def test_a_refused_namespace_says_what_to_do() -> None:
    """As root without rights, in a user namespace whose limit on further ones is 0."""
    limit = "echo 0 > /proc/sys/user/max_user_namespaces; echo 0 > /proc/sys/user/max_net_namespaces"
    program = "from testbeds.emulation import namespaces; namespaces.enter_switch()"
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", f'{limit}; exec "$0" -c "$1"', sys.executable]
    done = subprocess.run([*command, program], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    if "unshare failed" in done.stderr:
        pytest.skip(done.stderr)
    assert "OrreryError: The kernel refuses a user namespace to user 0." in done.stderr
    assert "Run as root; or allow everyone their own user namespaces" in done.stderr


@linux
def test_a_process_with_threads_is_refused() -> None:
    program = (
        "import threading, time; from testbeds.emulation import namespaces\n"
        "threading.Thread(target=time.sleep, args=(0.5,), daemon=True).start()\n"
        "namespaces.enter_switch()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
    )
    assert "OrreryError: This process has 2 threads; only one of them would enter the namespace." in done.stderr


@pytest.mark.parametrize(
    ("name", "package"), [("ip", "iproute2"), ("tc", "iproute2"), ("nsenter", "util-linux"), ("unshare", "util-linux")]
)
def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(namespaces, "SYSTEM_FOLDERS", ())
    with pytest.raises(OrreryError, match=f"There is no program `{name}`. Install it: apt install {package}"):
        namespaces.run([name, "--version"])


@needs_namespaces
def test_a_failed_command_says_what_it_said() -> None:
    with pytest.raises(OrreryError, match=r"`ip link show nowhere` failed: Device \"nowhere\" does not exist."):
        namespaces.run(["ip", "link", "show", "nowhere"])
