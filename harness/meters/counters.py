"""Energy counters by Zeus: NVIDIA GPUs (NVML), x86 processors (RAPL), and Jetsons, of which it adds up the power.

Zeus (package `zeus`) brings many libraries along, so that it is optional and imported when it measures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from harness.meters import rails
from harness.meters.measurement import COUNTER, RAIL, Facts, NotHere
from harness.meters.sampler import Watch
from harness.meters.system import System
from harness.meters.window import Window

KEY = "window"
#: Importing Zeus and asking for its counters takes a few seconds on a small board.
LOOK_S = 60.0
#: A counter is renewed every 0.1 s, and of a window that is not much longer it says little.
SHORTEST_S = 1.0


@dataclass(frozen=True)
class Counters:
    """Zeus's monitor around a window. On a Jetson the total alone counts: its parts overlap."""

    facts: Facts
    jetson: bool

    def window(self, watch: Watch) -> Window:
        zeus = monitor(self.jetson)
        zeus.begin_window(KEY, sync_execution=False)  # nothing of this process is on a GPU
        begin_ns = watch.now_ns()
        watch.begun()
        watch.ended(None)
        duration_s = (watch.now_ns() - begin_ns) / 1e9
        found = counted(zeus.end_window(KEY, sync_execution=False), self.jetson)
        standing = [name for name, energy_j in found.items() if energy_j is None or energy_j <= 0]
        if duration_s < SHORTEST_S:
            return Window(duration_s, reason=f"The window is of {duration_s:.2g} s: no figure below {SHORTEST_S:g} s.")
        if standing or not found:
            stand = ", ".join(standing) or "all that there was"
            return Window(duration_s, reason=f"These counters did not move: {stand}.")
        energy_j = sum(joules for joules in found.values() if joules is not None)
        return Window(duration_s, energy_j, energy_j / duration_s)


def monitor(jetson: bool) -> Any:
    """Zeus's monitor of all that can be counted here; without NVML on a Jetson, where it starts but can't answer."""
    from zeus.monitor import ZeusMonitor

    return ZeusMonitor(gpu_indices=[], cpu_indices=[]) if jetson else ZeusMonitor()


def counted(measured: Any, jetson: bool) -> dict[str, float | None]:
    """J of each counter of a window's result; None where one that is needed was not read."""
    if jetson:
        total_mj = getattr(measured.soc_energy, "total_energy_mj", None)
        return {"total": None if total_mj is None else total_mj / 1e3}
    parts = {"gpu": measured.gpu_energy, "cpu": measured.cpu_energy, "dram": measured.dram_energy}
    return {f"{name}{index}": energy_j for name, part in parts.items() for index, energy_j in (part or {}).items()}


def probe(argument: str | None, system: System) -> Counters:
    """What Zeus can count on this machine."""
    if argument is not None:
        raise NotHere(f"it takes no argument, and {argument!r} is given. Use --meter zeus")
    try:
        about = f"zeus {version('zeus')}"
    except PackageNotFoundError as error:
        raise NotHere("it is not installed. Install it: pip install zeus") from error
    jetson = bool(rails.channels(system.root))
    found = _looked(jetson)
    if jetson and found["total"] is None:
        raise NotHere("Zeus finds no rail that is this board's total. Use --meter ina3221, which knows the board")
    if not found:
        raise NotHere("Zeus finds no GPU with an energy counter, and no readable RAPL, which is for root")
    if jetson:
        scope = "what Zeus takes for the total: the module, without a rail of the carrier board"
        return Counters(Facts(about, RAIL, scope, None, tuple(found), carrier_included=False), jetson)
    scope = "what is counted, and nothing else of the machine: no mainboard, disk, fan or power supply"
    return Counters(Facts(about, COUNTER, scope, None, tuple(found)), jetson)


def _looked(jetson: bool) -> dict[str, float | None]:
    """The counters of an empty window, in a process of its own: Zeus starts others, and holds on to the GPU."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-m", "harness.meters.counters", *(["jetson"] if jetson else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LOOK_S, check=False)
    except subprocess.TimeoutExpired:
        raise NotHere(f"Zeus did not start in {LOOK_S:g} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise NotHere(f"Zeus can't start: {lines[-1] if lines else f'it ended with code {done.returncode}'}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(jetson: bool) -> None:
    """Print what can be counted, as the last line."""
    zeus = monitor(jetson)
    zeus.begin_window(KEY, sync_execution=False)
    print(json.dumps(counted(zeus.end_window(KEY, sync_execution=False), jetson)))


if __name__ == "__main__":
    main(sys.argv[1:] == ["jetson"])
