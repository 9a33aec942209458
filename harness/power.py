"""Energy of a run by what its devices do: the modelled power of each state, over the time spent in it.

    E = sum over devices of  idle_w T  +  (load_w - idle_w) busy  +  (wait_w - idle_w) (T - busy)
                           + network_w (sending + receiving)  +  network_j_per_byte (sent + received)

Only the first two powers are known of most boards. Nobody has published what waiting, the network or a byte add: where
a profile leaves them out they add nothing. Devices without a part in the plan are not counted: they are free to do
something else, or to sleep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from harness.cluster import Cluster, Device
from harness.plan.actions import COMPUTE, NIC_IN, NIC_OUT
from harness.trace import Trace

SOURCE = "modelled"


@dataclass(frozen=True)
class DeviceEnergy:
    """Energy of one board over the whole run, in J. The parts add up to its gross energy.

    `idle_j`: as if it had done nothing, all the time. The others are what computing, waiting (as far as that takes more
    than to be idle) and the network add.
    """

    idle_j: float
    compute_j: float
    wait_j: float = 0.0
    communication_j: float = 0.0

    @property
    def net_j(self) -> float:
        return self.compute_j + self.wait_j + self.communication_j

    @property
    def gross_j(self) -> float:
        return self.idle_j + self.net_j


@dataclass(frozen=True)
class Energy:
    """Energy of all devices of a run, in J: gross, net of what they would draw idle, and per device."""

    gross_j: float
    net_of_idle_j: float
    devices: Mapping[str, DeviceEnergy]
    source: str = SOURCE


def energy(trace: Trace, cluster: Cluster) -> Energy | None:
    """Of the trace's devices; None if the idle or load power of one is unknown."""
    parts: dict[str, DeviceEnergy] = {}
    for name in trace.devices:
        found = energy_of(cluster.device(name), trace.total_s, trace.busy_s[name], trace.link_bytes)
        if found is None:
            return None
        parts[name] = found
    net_j = sum(part.net_j for part in parts.values())
    return Energy(net_j + sum(part.idle_j for part in parts.values()), net_j, parts)


def energy_of(
    device: Device, seconds: float, busy_s: Mapping[str, float], link_bytes: Mapping[tuple[str, str], int]
) -> DeviceEnergy | None:
    """Of one device over so many seconds, in which its queues worked for `busy_s` and links passed `link_bytes`."""
    if device.idle_w is None or device.load_w is None:
        return None
    computing_s = busy_s.get(COMPUTE, 0.0)
    networking_s = busy_s.get(NIC_OUT, 0.0) + busy_s.get(NIC_IN, 0.0)
    nbytes = sum(count for ends, count in link_bytes.items() if device.name in ends)
    waiting_w = 0.0 if device.wait_w is None else device.wait_w - device.idle_w
    return DeviceEnergy(
        idle_j=device.idle_w * seconds,
        compute_j=(device.load_w - device.idle_w) * computing_s,
        wait_j=waiting_w * (seconds - computing_s),
        communication_j=(device.network_w or 0.0) * networking_s + (device.network_j_per_byte or 0.0) * nbytes,
    )
