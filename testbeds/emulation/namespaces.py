"""Network namespaces of one emulated testbed: a switch, and devices that are plugged into it.

Namespaces are anonymous: the kernel removes them, and the bridge and links in them, with the last process inside.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.errors import OrreryError

#: Linux's bridge has 1023 ports.
MOST_DEVICES = 1000
SWITCH = "switch"
#: The only link of a device, as it sees it.
DEVICE_PORT = "eth0"
#: Debian's packages of the programs that are called.
PACKAGES = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux", "unshare": "util-linux"}
#: Searched after PATH, in which Debian leaves these folders out for everyone but root.
SYSTEM_FOLDERS = ("/usr/sbin", "/sbin")
#: A command that takes longer hangs.
COMMAND_TIMEOUT_S = 30.0
#: The one that every kernel has and allows in every namespace. The host's own may be a paced one (BBR), which takes
#: seconds to find the rate of a link.
CONGESTION_CONTROL = "reno"

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

NO_NAMESPACES = (
    "Emulated devices need network namespaces. Run as root; or allow everyone their own user namespaces: "
    "sysctl kernel.unprivileged_userns_clone=1 (Debian), kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu 24), "
    "user.max_user_namespaces above 0; a container needs CAP_SYS_ADMIN for it."
)


def enter_switch() -> None:
    """Move this process into a new network namespace with a bridge that devices can be plugged into.

    Where the process may not do that, it enters a user namespace of its own first, in which it is root. The process
    must have one thread: others would stay behind.
    """
    _must_have_one_thread()
    if not _unshare(CLONE_NEWNET):
        _become_root()
        if not _unshare(CLONE_NEWNET):
            raise OrreryError(f"The kernel refuses a network namespace in our own user namespace. {NO_NAMESPACES}")
    Path("/proc/sys/net/ipv4/tcp_congestion_control").write_text(CONGESTION_CONTROL)
    # Port states and group memberships need no learning: nothing but the plan's own traffic crosses the switch.
    run(["ip", "link", "add", SWITCH, "type", "bridge", "stp_state", "0", "mcast_snooping", "0"])
    run(["ip", "link", "set", SWITCH, "up"])
    run(["ip", "link", "set", "lo", "up"])


def enter_device() -> None:
    """Move this process, forked off the one that entered the switch, into a network namespace of its own."""
    _must_have_one_thread()
    if not _unshare(CLONE_NEWNET):
        raise OrreryError(f"The kernel refuses a network namespace for a device. {NO_NAMESPACES}")
    Path("/proc/sys/net/ipv4/tcp_congestion_control").write_text(CONGESTION_CONTROL)
    run(["ip", "link", "set", "lo", "up"])


def plug(rank: int, pid: int) -> None:
    """Link the namespace of process `pid` to the switch, in which this process is: `address(rank)` on its eth0.

    Both ends go with either namespace.
    """
    prefix = f"{address(rank)}/16"
    port = switch_port(rank)
    run(["ip", "link", "add", port, "type", "veth", "peer", "name", DEVICE_PORT, "netns", str(pid)])
    run(["ip", "link", "set", port, "master", SWITCH, "up"])
    in_namespace(pid, ["ip", "address", "add", prefix, "dev", DEVICE_PORT])
    in_namespace(pid, ["ip", "link", "set", DEVICE_PORT, "up"])


def unplug(rank: int) -> None:
    """Remove the link of a device, if there is one."""
    port = switch_port(rank)
    if port in run(["ip", "-brief", "link", "show", "type", "veth"]).replace("@", " ").split():
        run(["ip", "link", "delete", port])


def address(rank: int) -> str:
    """The IPv4 address of a device: 10.77.0.1 for rank 0."""
    if not 0 <= rank < MOST_DEVICES:
        raise OrreryError(
            f"Rank {rank} can't be emulated: a switch takes {MOST_DEVICES} devices, ranks 0 to {MOST_DEVICES - 1}."
        )
    return f"10.77.{rank // 250}.{rank % 250 + 1}"


def switch_port(rank: int) -> str:
    """The switch's end of a device's link."""
    return f"port{rank}"


def in_namespace(pid: int, command: Sequence[str]) -> str:
    """Run a command in the network namespace of process `pid`, and return what it prints."""
    return run(["nsenter", f"--net=/proc/{pid}/ns/net", program(command[0]), *command[1:]])


def run(command: Sequence[str]) -> str:
    """Run a command and return what it prints. An OrreryError where it fails, says what it was and what it said."""
    try:
        done = subprocess.run(
            [program(command[0]), *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise OrreryError(f"`{' '.join(command)}` did not end within {COMMAND_TIMEOUT_S:.0f} s.") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise OrreryError(f"`{' '.join(command)}` failed: {said}")
    return done.stdout


def program(name: str) -> str:
    """Where a program lies. Paths are taken as they are."""
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *SYSTEM_FOLDERS]))
    if found is None:
        package = PACKAGES[name]
        raise OrreryError(f"There is no program `{name}`. Install it: apt install {package} (Debian's name).")
    return found


def _unshare(flags: int) -> bool:
    """Whether the kernel lets this process leave its namespaces for new ones."""
    if ctypes.CDLL(None, use_errno=True).unshare(flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EPERM, errno.ENOSPC, errno.EUSERS):  # no right; or the limit on namespaces is 0
        return False
    raise OrreryError(f"The kernel can't make a namespace: {os.strerror(number)}. {NO_NAMESPACES}")


def _become_root() -> None:
    """Enter a user namespace in which this user is root, with all rights over the namespaces made in it."""
    uid, gid = os.geteuid(), os.getegid()
    if not _unshare(CLONE_NEWUSER):
        raise OrreryError(f"The kernel refuses a user namespace to user {uid}. {NO_NAMESPACES}")
    try:
        # Without it, a group that is denied access could be left (user_namespaces(7)).
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    except OSError as error:
        raise OrreryError(
            f"The kernel refuses to make user {uid} root of a user namespace ({error}). {NO_NAMESPACES}"
        ) from error


def _must_have_one_thread() -> None:
    if sys.platform != "linux":
        raise OrreryError(f"Emulated devices need Linux's namespaces; this is {sys.platform}. Use a Linux machine.")
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise OrreryError(
            f"This process has {threads} threads; only one of them would enter the namespace. Enter it before any "
            "library starts threads (OMP_NUM_THREADS=1 and OPENBLAS_NUM_THREADS=1 keep numpy from it)."
        )
