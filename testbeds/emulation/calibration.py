"""A testbed measures itself before it is used: does every device compute, and every link carry, what was asked for?"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from harness.errors import OrreryError
from harness.fleet.probe import ComputeProbe, LinkProbe
from testbeds.emulation import namespaces
from testbeds.emulation.machine import Machine
from testbeds.emulation.quota import Quota, quota_for
from testbeds.emulation.setting import TCP_SHARE, Setting

#: How far a device or link may be from what it is to be. Beyond it the testbed is refused.
TOLERANCE = 0.10
#: A quota is corrected until every device is so close, at most so many times: by all that is missing, then by half of
#: it, for on a virtual machine the rate of a second is a few percent from that of the next.
CLOSE_ENOUGH, MOST_CORRECTIONS = 0.05, 6
DAMPED = 0.5
#: The whole of it is tried again so often before it is refused.
MOST_ATTEMPTS = 3
#: Links are set this much faster at most than the headers of one-way traffic would have it.
MOST_LINK_CORRECTION = 1.12
COMPUTE_PROBE_S, LINK_PROBE_S = 1.0, 0.5
STALL_S = 60.0

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Cores:
    """Per device: the share of a core that it is given, and the FLOP/s that it had while all devices computed."""

    shares: Mapping[str, float]
    flops_per_s: Mapping[str, float]

    @property
    def quotas(self) -> dict[str, Quota]:
        return {device: quota_for(share) for device, share in self.shares.items()}


@dataclass(frozen=True)
class Links:
    """Per device: the nominal Mbit/s that its link is set to, and the Mbit/s that TCP got from the device before it,
    while all sent as much at once. `hop_s`: one way of a small message, no latency added.
    """

    nominal_mbit_per_s: Mapping[str, float]
    mbit_per_s: Mapping[str, float]
    hop_s: float


def cores(machine: Machine, setting: Setting, before: Cores | None = None) -> Cores:
    """Limit the devices' cores so that each computes at its rate while all do, starting from what was right `before`.

    Raises OrreryError outside the tolerance.
    """
    return _tried(lambda: _cores(machine, setting, before))


def links(machine: Machine, setting: Setting) -> Links:
    """Set the devices' links so that TCP gets its rate in both directions at once. Raises as `cores` does."""
    return _tried(lambda: _links(machine, setting))


def shape(machine: Machine, nominal_mbit_per_s: Mapping[str, float], latency_s: float) -> None:
    """Set every device's link."""
    for device, rate in nominal_mbit_per_s.items():
        machine.order("shape", device, mbit_per_s=rate, latency_s=latency_s)


def _tried(measure: Callable[[], Measured]) -> Measured:
    for _ in range(MOST_ATTEMPTS - 1):
        with contextlib.suppress(OrreryError):  # another program may have had its moment
            return measure()
    return measure()


def _cores(machine: Machine, setting: Setting, before: Cores | None) -> Cores:
    wanted = setting.flops_per_s
    if before is None:
        core = _core(machine, next(iter(wanted)))
        shares = {device: rate / core for device, rate in wanted.items()}
    else:
        shares = dict(before.shares)
    found = _limited(machine, shares)
    for correction in range(MOST_CORRECTIONS):
        got = {device: found[device] / rate for device, rate in wanted.items()}
        if max(abs(ratio - 1) for ratio in got.values()) < CLOSE_ENOUGH:
            break
        part = DAMPED if correction or before is not None else 1.0
        shares = {device: share / min(max(got[device], 0.5), 2.0) ** part for device, share in shares.items()}
        found = _limited(machine, shares)
    giga = 1e-9
    _check(
        "computes with",
        "GFLOP/s",
        {device: rate * giga for device, rate in found.items()},
        {device: rate * giga for device, rate in wanted.items()},
    )
    return Cores(shares, found)


def _core(machine: Machine, device: str) -> float:
    """FLOP/s of one device alone, without a quota."""
    machine.order("cpu", device, quota=None)
    return machine.fleet.probe({device: _compute_probe(machine, device)}, STALL_S)[device]["flops_per_s"]


def _limited(machine: Machine, shares: Mapping[str, float]) -> dict[str, float]:
    """FLOP/s of every device when all compute at once with these shares of a core."""
    for device, share in shares.items():
        machine.order("cpu", device, quota=quota_for(share))
    found = machine.fleet.probe({device: _compute_probe(machine, device) for device in shares}, STALL_S)
    return {device: answer["flops_per_s"] for device, answer in found.items()}


def _compute_probe(machine: Machine, device: str) -> ComputeProbe:
    process, computing = machine.entrances[device]
    return ComputeProbe(COMPUTE_PROBE_S, process + computing)


def _links(machine: Machine, setting: Setting) -> Links:
    wanted = {device: rate * TCP_SHARE for device, rate in _slower_end(setting).items()}
    nominal = dict(setting.mbit_per_s)
    shape(machine, nominal, 0.0)
    found, hop_s = _ring(machine, setting)
    if found:  # a link that carries data both ways carries the acknowledgements of the other way, too
        short = statistics.median(wanted[device] / rate for device, rate in found.items())
        nominal = {device: rate * min(max(short, 1.0), MOST_LINK_CORRECTION) for device, rate in nominal.items()}
        shape(machine, nominal, 0.0)
        found, hop_s = _ring(machine, setting)
    _check("receives", "Mbit/s", found, wanted)
    return Links(nominal, found, hop_s)


def _ring(machine: Machine, setting: Setting) -> tuple[dict[str, float], float]:
    """Mbit/s that every device gets from the one before it in the ring, all at once; and a small message's way."""
    ring = tuple(setting.mbit_per_s)
    if len(ring) == 1:
        return {}, 0.0
    generation, secret = machine.fleet.new_generation()
    slowest = min(setting.mbit_per_s.values())
    probes = {
        device: LinkProbe(
            device=device,
            ring=ring,
            nbytes=int(slowest * 1e6 / 8 * LINK_PROBE_S),
            generation=generation,
            secret=secret,
            host=namespaces.address(rank),
            send_buffer_bytes=setting.send_buffer_bytes(device),
        )
        for rank, device in enumerate(ring)
    }
    found = machine.fleet.probe(probes, STALL_S)
    rates = {device: answer["bytes_per_s"] * 8 / 1e6 for device, answer in found.items()}
    return rates, found[ring[0]]["hop_s"]


def _slower_end(setting: Setting) -> dict[str, float]:
    """Nominal rate of the link from the device before in the ring."""
    ring = list(setting.mbit_per_s)
    return {d: min(setting.mbit_per_s[d], setting.mbit_per_s[ring[i - 1]]) for i, d in enumerate(ring)}


def _check(does: str, unit: str, found: Mapping[str, float], wanted: Mapping[str, float]) -> None:
    for device, value in found.items():
        if abs(value / wanted[device] - 1) > TOLERANCE:
            raise OrreryError(
                f"{device} {does} {value:.3g} {unit} in the measurement before the run, and should with "
                f"{wanted[device]:.3g}: more than {TOLERANCE:.0%} off. Is the machine busy, or slower than when the "
                "units of the workload were measured? Run again when it is quiet, on one with more cores, or with the "
                "measured times removed (`orrery doctor` names the folder)."
            )
