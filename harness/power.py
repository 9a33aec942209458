"""Energy of a run by a two-state power model: a board draws `idle_w`, and `load_w` while its compute queue is busy.

Nobody has published the energy of a transferred byte for these boards, so communication draws idle power.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from harness.cluster import Cluster
from harness.plan.actions import COMPUTE
from harness.trace import Trace

SOURCE = "modelled"


@dataclass(frozen=True)
class DeviceEnergy:
    """Energy of one board over the whole run, in J. The parts add up to its gross energy."""

    idle_j: float
    compute_j: float
    communication_j: float = 0.0


@dataclass(frozen=True)
class Energy:
    """Energy of all devices of a run, in J: gross, net of what they would draw idle, and per device."""

    gross_j: float
    net_of_idle_j: float
    devices: Mapping[str, DeviceEnergy]
    source: str = SOURCE


def energy(trace: Trace, cluster: Cluster) -> Energy | None:
    """idle_w * T + (load_w - idle_w) * busy, summed over the trace's devices; None if a power is unknown."""
    parts: dict[str, DeviceEnergy] = {}
    for name in trace.devices:
        device = cluster.device(name)
        if device.idle_w is None or device.load_w is None:
            return None
        busy_s = trace.busy_s[name].get(COMPUTE, 0.0)
        parts[name] = DeviceEnergy(device.idle_w * trace.total_s, (device.load_w - device.idle_w) * busy_s)
    net_j = sum(part.compute_j + part.communication_j for part in parts.values())
    return Energy(net_j + sum(part.idle_j for part in parts.values()), net_j, parts)
