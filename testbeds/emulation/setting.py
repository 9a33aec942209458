"""What each process must get of this machine, so that the testbed behaves like its devices: pure arithmetic."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from harness.cluster import Cluster
from harness.costs import BACKWARD, FORWARD, Costs
from harness.errors import OrreryError
from harness.profile.measure import LOCAL

#: Of a core, for the runner, the kernel's share of the links and whatever else the machine does.
RESERVE = 0.25
#: What a paced device's core must be faster than the device: a core of a shared machine may lose a third of its speed
#: within seconds, more when it wakes up.
PACED_HEADROOM = 1.75
#: Beyond it a run takes for ever, and quotas are too short for the kernel.
MOST_DILATION = 50.0
#: What TCP gets of a shaped link's nominal rate, Ethernet's and its own headers included: measured, and checked
#: before every campaign.
TCP_SHARE = 0.956
#: What a socket takes before its link has carried it. Small, so that a send ends when it nearly has; but a sender that
#: waits for its share of a core must not leave the link idle meanwhile.
LEAST_SEND_BUFFER_BYTES, SEND_BUFFER_S = 64 * 1024, 0.02


@dataclass(frozen=True)
class Setting:
    """Per device: share of one core, nominal Mbit/s of its link, memory limit in bytes (None: no limit).

    A core is one of `core_flops_per_s`, as it was when this machine's unit times were measured: today's may be faster
    or slower. `latency_s` and the rates are the testbed's, dilated: a second of the testbed takes `dilation` here.
    """

    dilation: float
    shares: Mapping[str, float]
    core_flops_per_s: float
    mbit_per_s: Mapping[str, float]
    memory_bytes: Mapping[str, int | None]
    latency_s: float

    @property
    def flops_per_s(self) -> dict[str, float]:
        """At which each device computes."""
        return {device: share * self.core_flops_per_s for device, share in self.shares.items()}

    def send_buffer_bytes(self, device: str) -> int:
        return max(LEAST_SEND_BUFFER_BYTES, int(self.mbit_per_s[device] * 1e6 / 8 * SEND_BUFFER_S))


def decide(
    cluster: Cluster,
    own_memory: frozenset[str],
    speeds: Mapping[str, float],
    core_flops_per_s: float,
    headroom: float = 1.0,
) -> Setting:
    """The setting for devices that are `speeds` times as fast as one core of this machine, of `core_flops_per_s`.

    When one or all of them are faster than this machine divided by the headroom, time is dilated. Raises OrreryError
    where that is too much.
    """
    cores = os.cpu_count() or 1
    room = max(cores - RESERVE, 0.5)
    dilation = max(1.0, headroom * sum(speeds.values()) / room, headroom * max(speeds.values()))
    if dilation > MOST_DILATION:
        raise OrreryError(
            f"The {len(speeds)} devices of {cluster.name} are together {sum(speeds.values()):.0f} times as fast as one "
            f"core, and this machine has {cores}: time would have to run {dilation:.0f} times slower, and the most "
            f"that is emulated is {MOST_DILATION:.0f}. Choose fewer or slower devices, or mode simulated."
        )
    return Setting(
        dilation=dilation,
        shares={device: speed / dilation for device, speed in speeds.items()},
        core_flops_per_s=core_flops_per_s,
        mbit_per_s={d: rate * 8 / 1e6 / TCP_SHARE / dilation for d, rate in cluster.bandwidth.items()},
        memory_bytes={d.name: d.memory_bytes if d.name in own_memory else None for d in cluster.devices},
        latency_s=cluster.latency_s * dilation,
    )


def speeds(cluster: Cluster, costs: Costs, rows: int) -> dict[str, float]:
    """How much faster than one core of this machine each device does the workload, forward and backward.

    `costs` must have this machine's measured times. A board has one speed here, its operators have several: it is
    that of the whole workload.
    """
    found = {}
    for device in cluster.devices:
        if device.measured is not None:
            found[device.name] = device.share
            continue
        directions = (FORWARD, BACKWARD) if costs.training else (FORWARD,)
        units = len(costs.units)
        board = sum(costs.seconds(device, 0, units, direction, rows) for direction in directions)
        here = sum(costs.measured_seconds(LOCAL, 0, units, direction, rows) for direction in directions)
        found[device.name] = here / board
    return found
