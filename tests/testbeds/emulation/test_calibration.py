"""Corrections of quotas where cores answer by a formula; on this machine's see `tests/testbeds/test_emulated.py`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import pytest

from harness.errors import OrreryError
from testbeds import library
from testbeds.emulation import calibration
from testbeds.emulation.cgroups import Entrances
from testbeds.emulation.setting import Setting, decide

DEVICES = tuple(f"device{i}" for i in range(4))
CORE = 1e11


class Cores:
    """A machine, and its fleet: what a device gets of a quota is up to `rate(device, share, number of the probe)`."""

    def __init__(self, rate: Callable[[str, float, int], float]) -> None:
        self.fleet, self.rate, self.num_probes = self, rate, 0
        self.entrances = dict.fromkeys(DEVICES, Entrances())
        self.shares: dict[str, float] = {}

    def order(self, what: str, device: str, quota: tuple[int, int] | None) -> None:
        assert what == "cpu"
        self.shares[device] = 1.0 if quota is None else quota[0] / quota[1]

    def probe(self, probes: Mapping[str, object], stall_s: float) -> dict[str, dict[str, float]]:
        self.num_probes += 1
        return {d: {"flops_per_s": self.rate(d, self.shares[d], self.num_probes)} for d in probes}


def setting(share: float = 0.25) -> Setting:
    cluster = library.load("emu-4-50mbit").cluster
    return decide(cluster, frozenset(), dict.fromkeys(DEVICES, share), CORE)


def test_a_device_computes_at_its_share_of_the_core_that_was_measured() -> None:
    """Whether today's is slower, or a quota gives less than it says."""
    assert setting().flops_per_s == dict.fromkeys(DEVICES, 0.25 * CORE)
    for today in (0.7 * CORE, 1.2 * CORE):
        machine = Cores(lambda device, share, _, today=today: today * share * (0.8 if device == "device2" else 0.95))
        found = calibration.cores(machine, setting())
        assert found.flops_per_s == pytest.approx(dict.fromkeys(DEVICES, 0.25 * CORE), rel=calibration.CLOSE_ENOUGH)
        again = machine.num_probes
        assert calibration.cores(machine, setting(), found).shares == found.shares
        assert machine.num_probes == again + 1


def test_what_can_not_be_had_is_refused() -> None:
    """Four devices at 0.25 of a fast core, and a machine that has half of that for them."""
    machine = Cores(lambda device, share, _: min(share, 0.125) * CORE)
    with pytest.raises(OrreryError, match=r"device0 computes with 12.5 GFLOP/s .* should with 25: more than 10% off"):
        calibration.cores(machine, setting())


def test_a_moment_of_another_program_is_got_over() -> None:
    machine = Cores(lambda device, share, number: share * CORE * (0.5 if number < 4 else 1.0))
    found = calibration.cores(machine, setting())
    assert found.flops_per_s == pytest.approx(dict.fromkeys(DEVICES, 0.25 * CORE), rel=calibration.CLOSE_ENOUGH)


def test_paced_devices_leave_the_machine_headroom() -> None:
    """Four at 0.25 of a core each are 1.0 of 2 cores, or of however many there are: time is dilated to leave half."""
    cores, cluster = os.cpu_count() or 1, library.load("emu-4-50mbit").cluster
    alone = decide(cluster, frozenset(), dict.fromkeys(DEVICES, cores / 4), 1e9, headroom=2.0)
    assert alone.dilation == pytest.approx(2.0 * cores / (cores - 0.25))
    one = decide(cluster, frozenset(), {"device0": 1.0}, 1e9, headroom=2.0)
    assert one.shares["device0"] <= 0.5 and one.dilation >= 2.0


def test_a_socket_takes_what_its_link_carries_meanwhile() -> None:
    asked = setting()
    slow, fast = decide_at(asked, 1.0), decide_at(asked, 1000.0)
    assert slow.send_buffer_bytes("device0") == 64 * 1024
    assert fast.send_buffer_bytes("device0") == pytest.approx(0.02 * 1e9 / 8)


def decide_at(asked: Setting, mbit_per_s: float) -> Setting:
    fields = {**vars(asked), "mbit_per_s": dict.fromkeys(DEVICES, mbit_per_s)}
    return Setting(**fields)
