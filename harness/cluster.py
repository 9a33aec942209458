"""Devices and links as the planners and the simulator see them. Units: seconds, bytes, FLOP/s, W."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property

#: Operator classes that have an achieved rate of their own.
OPERATOR_CLASSES = ("matmul", "conv", "depthwise")


@dataclass(frozen=True)
class Device:
    """One board. `rates[operator class] = (forward, backward)` in FLOP/s, achieved, not peak.

    An operator class that is missing has no known rate: a workload that needs it is refused, not guessed.
    `measured` names a table of measured unit times (see `harness.profile.measure`) that replaces the rates.
    Such a device may have but a `share` of the core that was measured.
    `accelerator` is "cpu" or "gpu": what torch keeps of a dropout differs. `load_w` is drawn while that computes,
    `wait_w` while it takes part in a run and does not; sending adds `network_w`, and so does receiving. Powers may be
    unknown. `battery_j` is what it may use in a run; None: as much as it wants.
    """

    name: str
    profile: str
    rates: dict[str, tuple[float, float]] = field(hash=False)
    kernel_overhead_s: float
    memory_bytes: int
    memory_bandwidth: float
    storage_read: float | None = None
    storage_write: float | None = None
    idle_w: float | None = None
    load_w: float | None = None
    wait_w: float | None = None
    network_w: float | None = None
    network_j_per_byte: float | None = None
    battery_j: float | None = None
    measured: str | None = None
    share: float = 1.0
    accelerator: str = "cpu"

    def slowed(self, factor: float) -> Device:
        """The same board where everything that it does takes `factor` times as long."""
        return replace(
            self,
            rates={kind: (forward / factor, backward / factor) for kind, (forward, backward) in self.rates.items()},
            kernel_overhead_s=self.kernel_overhead_s * factor,
            memory_bandwidth=self.memory_bandwidth / factor,
            share=self.share / factor,
        )

    @cached_property
    def kind(self) -> str:
        """The same for devices that compute alike."""
        speeds = self.kernel_overhead_s, self.memory_bandwidth, sorted(self.rates.items())
        return repr((self.profile, self.measured, self.share, speeds))


@dataclass(frozen=True)
class Link:
    """Bytes/s that TCP gets from `src` to `dst`, and latency. Transfers on one `medium` take turns."""

    bandwidth: float
    latency_s: float = 0.0
    medium: str | None = None


@dataclass(frozen=True)
class Cluster:
    """Devices in rank order and the link between any two of them.

    duplex "full": a device sends and receives at once. "half": the two directions between a pair take turns.
    "shared": every transfer of the cluster takes turns on one medium, as on Wi-Fi.
    """

    name: str
    devices: tuple[Device, ...]
    bandwidth: dict[str, float] = field(hash=False)
    latency_s: float = 0.0
    duplex: str = "full"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(d.name for d in self.devices)

    def device(self, name: str) -> Device:
        return self.devices[self.names.index(name)]

    def only(self, names: Collection[str]) -> Cluster:
        """The cluster of these devices, in its own order."""
        return replace(self, devices=tuple(device for device in self.devices if device.name in names))

    def link(self, src: str, dst: str) -> Link:
        """The link between two devices of a switch: as fast as the slower of the two ports."""
        if self.duplex == "shared":
            medium = "medium"
        elif self.duplex == "half":
            medium = "|".join(sorted((src, dst)))
        else:
            medium = None
        return Link(min(self.bandwidth[src], self.bandwidth[dst]), self.latency_s, medium)
