"""The processes of an emulated testbed: a nursery, and a supervisor for every device, up for as many runs as wanted."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.errors import OrreryError
from harness.faults import HEARTBEAT_TIMEOUT_S
from harness.fleet.channel import Channel, Closed, Message, ready
from harness.fleet.coordinator import Fleet
from testbeds.emulation import cgroups
from testbeds.emulation.cgroups import Entrances

#: Libraries must not start threads in the nursery, which forks; and a device computes with one anyway.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
ENVIRONMENT = {**dict.fromkeys(THREADS, "1"), "TOKENIZERS_PARALLELISM": "false"}
#: A nursery that takes longer over an order, or to come up, hangs.
ANSWER_S = 300.0
FAREWELL_S = 10.0


class Machine:
    """Supervisors for `devices`; `isolated` ones have a network namespace each, `limited` ones control groups.

    They come up while the caller does something else, and must be waited for by `ready`. `remove`: what the nursery
    removes if this process is killed.
    """

    def __init__(
        self,
        devices: Sequence[str],
        isolated: bool,
        limited: bool,
        remove: Sequence[Path],
        heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S,
    ) -> None:
        pairs = [socket.socketpair() for _ in range(len(devices) + 1)]
        theirs = [pair[1] for pair in pairs]
        safe = ["-P"] if sys.version_info >= (3, 11) else []  # a numbers.py in the user's folder is none of ours
        command = [sys.executable, *safe, "-m", "testbeds.emulation.nursery", *(str(end.fileno()) for end in theirs)]
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._nursery = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[end.fileno() for end in theirs],
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the runner, which ends it all in order
        )
        for end in theirs:
            end.close()
        control, *channels = (pair[0].detach() for pair in pairs)
        self._control = Channel.of_socket(control)
        self._heartbeat_timeout_s = heartbeat_timeout_s
        supervisors = (Channel.of_socket(channel, heartbeat_timeout_s) for channel in channels)
        self.fleet = Fleet(dict(zip(devices, supervisors, strict=True)), heartbeat_timeout_s)
        self._ranks = {device: rank for rank, device in enumerate(devices)}
        self.pids: list[int] = []
        self.entrances: dict[str, Entrances] = {}
        self.has_netem = False
        setup = {"devices": list(devices), "isolated": isolated, "limited": limited, "remove": [*map(str, remove)]}
        with contextlib.suppress(Closed):  # `ready` says so
            self._control.send(setup)

    def ready(self) -> None:
        """Wait until the supervisors are up. Raises OrreryError where the machine can't be what is asked for."""
        if self.pids:
            return
        try:
            up = self._answer()
        except BaseException:
            self.close()
            raise
        self.pids, self.has_netem = up["pids"], up["has_netem"]
        self.entrances = {device: Entrances(*map(tuple, files)) for device, files in up["entrances"].items()}

    @property
    def broken(self) -> bool:
        """Whether another one is needed: more of it is gone than what `restart` can mend. Asked between runs."""
        idle = [channel for device, channel in self.fleet.supervisors.items() if device not in self.fleet.gone]
        ended = ready(idle, 0.0)  # they have nothing to say now
        return self.fleet.broken or bool(ended) or self._nursery.poll() is not None

    def restart(self, device: str) -> None:
        """Another supervisor in the place of one that is gone, or may be; its link has no limits yet."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._control.send({"do": "restart", "device": device, "rank": self._ranks[device]})
            self._control.send_descriptor(theirs.fileno(), self._nursery.pid)
            self.pids[self._ranks[device]] = self._answer()["pid"]
            self.fleet.supervisors[device].close()
            self.fleet.supervisors[device] = Channel.of_socket(ours.detach(), self._heartbeat_timeout_s)
        self.fleet.gone.discard(device)

    def order(self, do: str, device: str, **arguments: object) -> Message:
        """Have the nursery do one of its orders for a device."""
        try:
            self._control.send({"do": do, "device": device, "rank": self._ranks[device], **arguments})
            return self._answer()
        except Closed:
            raise OrreryError("The process that holds the emulated devices is gone. Run again.") from None

    def kill(self, device: str) -> None:
        """End a device's supervisor, and its worker with it, whatever state they are in."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[self._ranks[device]], signal.SIGKILL)

    def _answer(self) -> Message:
        if not ready([self._control], ANSWER_S):
            raise OrreryError(
                f"The process that holds the emulated devices has not answered for {ANSWER_S:.0f} s. Run again."
            )
        try:
            answer = self._control.receive()
        except Closed:
            code = self._nursery.wait(FAREWELL_S)
            raise OrreryError(f"The process that holds the emulated devices ended with exit code {code}.") from None
        if "refused" in answer:
            raise OrreryError(answer["refused"])
        return answer

    def close(self) -> None:
        """Everything ends and is removed, but what the caller has made. Idempotent."""
        with contextlib.suppress(Closed):
            self._control.send({"do": "end"})
        self.fleet.close()
        self._control.close()
        try:
            self._nursery.wait(FAREWELL_S)
        except subprocess.TimeoutExpired:
            self._nursery.kill()
            self._nursery.wait()
        if self._nursery.returncode < 0:  # killed: it could not remove its control groups
            with contextlib.suppress(OrreryError):  # what is left then is for `orrery doctor --clean`
                cgroups.clean()
