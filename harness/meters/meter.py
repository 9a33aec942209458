"""A meter as who measures sees it: begin, end, a measurement. The readings are another process's work."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import pickle
import select
import subprocess
import sys
import time
from datetime import datetime, timezone
from typing import Any, Protocol

from harness.carbon import Intensity
from harness.meters.measurement import Measurement, net_of_idle
from harness.meters.sampler import Probe
from harness.meters.system import System

#: What the sampling process is told, a line each.
BEGIN, END = b"begin", b"end"
#: Longest that the sampling process may take to import its libraries and to answer.
ANSWER_S = 60.0


class Meter(Protocol):
    """A window at a time. Neither begin nor end raises: what goes wrong is the measurement's reason."""

    def begin(self) -> None: ...
    def end(self) -> Measurement: ...
    def close(self) -> None: ...


class NullMeter:
    """Measures nothing, and says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def begin(self) -> None:
        pass

    def end(self) -> Measurement:
        return Measurement(meter="none", reason=self.reason)

    def close(self) -> None:
        pass


class ProbeMeter:
    """A meter whose probe is read in a process of its own, which lives until `close`.

    With `idle_baseline_s` the first window is preceded by one in which nothing happens: what the machine draws idle.
    """

    def __init__(
        self, probe: Probe, system: System, idle_baseline_s: float = 0.0, intensity: Intensity | None = None
    ) -> None:
        self.probe, self.system, self.intensity = probe, system, intensity
        self.idle_baseline_s = idle_baseline_s
        self._process: subprocess.Popen[bytes] | None = None
        self._idle: tuple[Measurement, str] | None = None
        self._broken: str | None = None

    def begin(self) -> None:
        if self.idle_baseline_s > 0 and self._idle is None:
            at = datetime.now(timezone.utc).isoformat(timespec="seconds")
            self._begin()
            time.sleep(self.idle_baseline_s)
            self._idle = self._end(), at
        self._begin()

    def end(self) -> Measurement:
        measured = self._end()
        if self._idle is not None:
            measured = net_of_idle(measured, *self._idle)
        if self.intensity is None or measured.energy_j is None:
            return measured
        return dataclasses.replace(
            measured,
            carbon_g=self.intensity.grams(measured.energy_j),
            carbon_g_per_kwh=self.intensity.g_per_kwh,
            carbon_source=self.intensity.source,
        )

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            try:
                self._process.wait(ANSWER_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process.stdout.close()
            self._process = None

    def _begin(self) -> None:
        self._broken = None
        if self._process is None:
            self._process = self._started()
        self._ask(BEGIN)

    def _end(self) -> Measurement:
        window = self._ask(END) if self._broken is None else {}
        if self._broken is not None:
            window = {"reason": self._broken}
        about = {
            "board": self.system.board(),
            "power_mode": self.system.power_mode(),
            "clocks_pinned": self.system.clocks_pinned(),
            "release": self.system.release(),
        }
        return Measurement(**{**dataclasses.asdict(self.probe.facts), **about, **window})

    def _started(self) -> subprocess.Popen[bytes]:
        probe = base64.b64encode(pickle.dumps(self.probe)).decode()
        command = [sys.executable, "-m", "harness.meters", probe]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0)

    def _ask(self, command: bytes) -> dict[str, Any]:
        """Send a command and take its answer. A process that is lost, or says nothing, is the window's reason."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(command + b"\n")
            if select.select([process.stdout], [], [], ANSWER_S)[0]:
                line = process.stdout.readline()
        if line:
            return dict(json.loads(line))
        if process.poll() is None:
            process.kill()
        self._broken = f"The process that reads the meter gave no answer and ended with code {process.wait()}."
        self.close()
        return {}
