"""A testbed measures itself before it is used: does every device compute, and every link carry, what was asked for?"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from harness.errors import OrreryError
from harness.fleet.probe import ComputeProbe, LinkProbe
from testbeds.emulation import namespaces
from testbeds.emulation.machine import Machine
from testbeds.emulation.quota import quota_for
from testbeds.emulation.setting import SEND_BUFFER_BYTES, TCP_SHARE, Setting

#: How far a device or link may be from what it is to be. Beyond it the testbed is refused.
TOLERANCE = 0.10
#: A quota is corrected until every device is so close, at most so many times.
CLOSE_ENOUGH, MOST_CORRECTIONS = 0.03, 6
#: The whole of it is tried again so often before it is refused.
MOST_ATTEMPTS = 3
#: Links are set this much faster at most than the headers of one-way traffic would have it.
MOST_LINK_CORRECTION = 1.12
COMPUTE_PROBE_S, LINK_PROBE_S = 0.5, 0.5
STALL_S = 60.0

Quota = tuple[int, int] | None


@dataclass(frozen=True)
class Achieved:
    """What was measured. Per device: share of a core; the quota and period in microseconds that give it; the nominal
    Mbit/s that its link is set to; Mbit/s that TCP got from the device before it, while all sent as much at once.
    `hop_s`: one way of a small message, no latency added.
    """

    core_flops_per_s: float
    shares: Mapping[str, float]
    quotas: Mapping[str, Quota]
    nominal_mbit_per_s: Mapping[str, float]
    mbit_per_s: Mapping[str, float]
    hop_s: float


def calibrate(machine: Machine, setting: Setting) -> Achieved:
    """Limit the devices' cores and measure cores and links, all at once. Raises OrreryError outside the tolerance."""
    for _ in range(MOST_ATTEMPTS - 1):
        with contextlib.suppress(OrreryError):  # another program may have had its moment
            return _calibrate(machine, setting)
    return _calibrate(machine, setting)


def _calibrate(machine: Machine, setting: Setting) -> Achieved:
    core = _core(machine, next(iter(setting.shares)))
    asked = dict(setting.shares)
    for _ in range(MOST_CORRECTIONS):
        shares = _limited(machine, asked, core)
        errors = {device: shares[device] / share - 1 for device, share in setting.shares.items()}
        if max(map(abs, errors.values())) < CLOSE_ENOUGH:
            break
        asked = {d: share / min(max(1 + errors[d], 0.5), 2.0) for d, share in asked.items()}
    shares = _limited(machine, asked, core)
    _check("computes with", "of a core", shares, setting.shares)
    wanted = {device: rate * TCP_SHARE for device, rate in _slower_end(setting).items()}
    nominal = dict(setting.mbit_per_s)
    shape(machine, nominal, 0.0)
    bandwidth, hop_s = _links(machine, setting)
    if bandwidth:  # a link that carries data both ways carries the acknowledgements of the other way, too
        short = statistics.median(wanted[device] / rate for device, rate in bandwidth.items())
        nominal = {device: rate * min(max(short, 1.0), MOST_LINK_CORRECTION) for device, rate in nominal.items()}
        shape(machine, nominal, 0.0)
        bandwidth, hop_s = _links(machine, setting)
    _check("receives", "Mbit/s", bandwidth, wanted)
    return Achieved(core, shares, {d: quota_for(share) for d, share in asked.items()}, nominal, bandwidth, hop_s)


def shape(machine: Machine, nominal_mbit_per_s: Mapping[str, float], latency_s: float) -> None:
    """Set every device's link."""
    for device, rate in nominal_mbit_per_s.items():
        machine.order("shape", device, mbit_per_s=rate, latency_s=latency_s)


def _core(machine: Machine, device: str) -> float:
    """FLOP/s of one device alone, without a quota."""
    machine.order("cpu", device, quota=None)
    return machine.fleet.probe({device: _compute_probe(machine, device)}, STALL_S)[device]["flops_per_s"]


def _limited(machine: Machine, shares: Mapping[str, float], core: float) -> dict[str, float]:
    """The share of a core that every device gets when all compute at once under these quotas."""
    for device, share in shares.items():
        machine.order("cpu", device, quota=quota_for(share))
    found = machine.fleet.probe({device: _compute_probe(machine, device) for device in shares}, STALL_S)
    return {device: answer["flops_per_s"] / core for device, answer in found.items()}


def _compute_probe(machine: Machine, device: str) -> ComputeProbe:
    return ComputeProbe(COMPUTE_PROBE_S, tuple(machine.entrances[device]))


def _links(machine: Machine, setting: Setting) -> tuple[dict[str, float], float]:
    """Mbit/s that every device gets from the one before it in the ring, all at once; and a small message's way."""
    ring = tuple(setting.shares)
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
            send_buffer_bytes=SEND_BUFFER_BYTES,
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
                f"{wanted[device]:.3g}: more than {TOLERANCE:.0%} off. Is the machine busy with something else? Run "
                "again when it is quiet, or on one with more cores."
            )
