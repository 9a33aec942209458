"""The process that brings up the supervisors of one machine: it imports torch once, and forks one for every device.

Run as `python -m testbeds.emulation.nursery CONTROL DEVICE...`, descriptors of sockets: its own to the runner, and one
for each device's supervisor. When the runner is gone, however it went, it ends the supervisors and removes what was
made for the campaign.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from harness import models
from harness.errors import OrreryError
from harness.fleet.channel import Channel, Closed, Message, ready
from harness.fleet.processes import adopt_orphans, die_with_parent
from testbeds.emulation import cgroups, leftovers, namespaces, shaping
from testbeds.emulation.cgroups import Entrances

#: What workers need, in the order in which it is imported.
PRELOADED = ("torch", "transformers", "harness.fleet.job")
#: What shaping calls.
PROGRAMS = ("ip", "tc", "nsenter")


class _Ended(Exception):
    """The runner wants no more."""


def main(control_descriptor: int, device_descriptors: Sequence[int]) -> None:
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # standard output is the runner's, for records alone
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    adopt_orphans()  # workers whose supervisor was killed
    control = Channel.of_socket(control_descriptor)
    setup: Message = {"remove": ()}
    try:
        setup = control.receive()
        with contextlib.ExitStack() as made:
            _serve(control, device_descriptors, setup, made)
    except _Ended:
        pass
    except OrreryError as error:
        try:
            control.send({"refused": str(error)})
        except Closed:
            leftovers.remove(setup["remove"])
    except Closed:  # the runner can't do it any more
        leftovers.remove(setup["remove"])


def _serve(control: Channel, device_descriptors: Sequence[int], setup: Message, made: contextlib.ExitStack) -> None:
    """Until the runner has enough (_Ended) or is gone (Closed). `made` undoes what was made."""
    devices, isolated = setup["devices"], setup["isolated"]
    if isolated:
        for name in PROGRAMS:  # before anything else takes its time
            namespaces.program(name)
        namespaces.enter_switch()
    groups: cgroups.Groups | None = None
    if setup["limited"]:
        groups = cgroups.Groups()
        made.callback(groups.remove)
        for device in devices:
            groups.add(device)
    for name in (*PRELOADED, *map(models.module_of, models.names())):
        importlib.import_module(name)
        if ready([control], 0.0):
            _obey(control.receive(), control, [], groups, isolated)  # too early for any but the end
    gc.collect()
    gc.freeze()  # so that no process forked from here looks through all of it again, which would copy it
    pids: list[int] = []
    made.callback(_end, pids)
    for rank, descriptor in enumerate(device_descriptors):
        others = [fd for fd in device_descriptors if fd != descriptor]
        pids.append(_fork(control, descriptor, others, isolated))
        if isolated:
            namespaces.plug(rank, pids[-1])
    for descriptor in device_descriptors:
        os.close(descriptor)
    entrances = {device: groups.entrances(device) if groups else Entrances() for device in devices}
    control.send({"pids": pids, "entrances": entrances, "has_netem": isolated and shaping.has_netem()})
    while True:
        control.send(_obey(control.receive(), control, pids, groups, isolated))


def _fork(control: Channel, descriptor: int, others: Sequence[int], isolated: bool) -> int:
    """A supervisor; when this returns it is in its namespace. Raises OrreryError where the kernel refuses one."""
    nursery = os.getpid()
    heard, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            die_with_parent(nursery)
            control.close()
            for other in (*others, heard):
                with contextlib.suppress(OSError):
                    os.close(other)
            if isolated:
                _enter_device(tell)
            os.close(tell)
            from harness.fleet.job import work
            from harness.fleet.supervisor import supervise

            supervise(Channel.of_socket(descriptor), work)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(tell)
    with open(heard) as refusal:
        if text := refusal.read():
            raise OrreryError(text)
    return pid


def _enter_device(tell: int) -> None:
    try:
        namespaces.enter_device()
    except OrreryError as error:
        os.write(tell, str(error).encode())
        raise


def _obey(order: Message, control: Channel, pids: list[int], groups: cgroups.Groups | None, isolated: bool) -> Message:
    """Limit a device, shape its link, now or as an event, or start it anew. What the kernel refuses is for the runner
    to say."""
    if order["do"] == "end":
        raise _Ended
    device, rank = order["device"], order["rank"]
    try:
        match order["do"]:
            case "shape":
                shaping.shape(pids[rank], rank, order["mbit_per_s"], order["latency_s"])
            case "rate":
                shaping.set_rate(pids[rank], rank, order["mbit_per_s"])
            case "link":
                shaping.set_link(rank, order["up"])
            case "cpu":
                assert groups is not None
                groups.limit_cpu(device, order["quota"])
            case "memory":
                assert groups is not None
                groups.limit_memory(device, order["limit_bytes"])
            case "oom-kills":
                assert groups is not None
                return {"oom_kills": groups.memory(device).oom_kills}
            case "restart":
                pids[rank] = _restarted(control, rank, pids[rank], isolated)
                return {"pid": pids[rank]}
        return {"done": order["do"]}
    except OrreryError as error:
        return {"refused": str(error)}


def _restarted(control: Channel, rank: int, old: int, isolated: bool) -> int:
    """A new supervisor for the device of that rank, on the descriptor that the runner sends, with a new link."""
    descriptor = control.take_descriptor()
    with contextlib.suppress(ProcessLookupError):
        os.kill(old, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(old, 0)
        while os.waitpid(-1, os.WNOHANG)[0]:  # workers that have gone with theirs
            pass
    try:
        pid = _fork(control, descriptor, (), isolated)
    finally:
        os.close(descriptor)
    if isolated:
        namespaces.unplug(rank)
        namespaces.plug(rank, pid)
    return pid


def _end(pids: Sequence[int]) -> None:
    """When this returns the supervisors and their workers are gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(descriptor) for descriptor in sys.argv[2:]])
    sys.stderr.flush()
    os._exit(0)  # to take all the libraries down would take longer than to end
