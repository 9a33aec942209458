"""The two-state power model against its closed form."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.cluster import Cluster, Device
from harness.plan.actions import COMPUTE, NIC_OUT
from harness.power import energy
from harness.trace import Trace


def board(name: str, idle_w: float | None, load_w: float | None) -> Device:
    return Device(name, "board", {}, 0.0, 1, 1e9, idle_w=idle_w, load_w=load_w)


def cluster(*devices: Device) -> Cluster:
    return Cluster("test", devices, {device.name: 1e6 for device in devices})


def trace(total_s: float, **busy_s: float) -> Trace:
    """A run of `total_s` in which the devices compute for `busy_s` and send all the time."""
    return Trace(
        mode="simulated",
        devices=tuple(busy_s),
        total_s=total_s,
        events=(),
        phases=(),
        busy_s={name: {COMPUTE: busy, NIC_OUT: total_s} for name, busy in busy_s.items()},
        link_bytes={},
        peak_bytes={},
        memory_bytes={},
    )


def test_closed_form() -> None:
    """2 W x 10 s + (7 - 2) W x 4 s = 40 J; 1 W x 10 s + (3 - 1) W x 10 s = 30 J."""
    found = energy(trace(10, a=4, b=10), cluster(board("a", 2, 7), board("b", 1, 3)))
    assert found is not None
    assert (found.devices["a"].idle_j, found.devices["a"].compute_j) == (20, 20)
    assert (found.devices["b"].idle_j, found.devices["b"].compute_j) == (10, 20)
    assert (found.gross_j, found.net_of_idle_j) == (70, 40)
    assert found.source == "modelled"


watts = st.floats(0.1, 100)


@given(total=st.floats(0, 1e6), shares=st.lists(st.floats(0, 1), min_size=1, max_size=5), idle=watts, extra=watts)
def test_between_always_idle_and_always_busy(total: float, shares: list[float], idle: float, extra: float) -> None:
    names = [f"device{i}" for i in range(len(shares))]
    found = energy(
        trace(total, **{name: total * share for name, share in zip(names, shares, strict=True)}),
        cluster(*(board(name, idle, idle + extra) for name in names)),
    )
    assert found is not None
    least, most = idle * total * len(names), (idle + extra) * total * len(names)
    assert least * (1 - 1e-9) <= found.gross_j <= most * (1 + 1e-9)
    assert found.gross_j - found.net_of_idle_j == pytest.approx(least, rel=1e-9)
    parts = [d.idle_j + d.compute_j + d.communication_j for d in found.devices.values()]
    assert sum(parts) == pytest.approx(found.gross_j, rel=1e-9)


def test_idle_run_is_never_below_idle_power() -> None:
    found = energy(trace(3600, a=0), cluster(board("a", 1.39, 7.28)))
    assert found is not None
    assert (found.gross_j, found.net_of_idle_j) == (1.39 * 3600, 0)


@pytest.mark.parametrize("unknown", [{"idle_w": None}, {"load_w": None}])
def test_unknown_power_gives_no_energy(unknown: dict[str, None]) -> None:
    boards = [board("a", 1, 2), replace(board("b", 1, 2), **unknown)]
    assert energy(trace(1, a=1, b=1), cluster(*boards)) is None


def test_boards_that_take_no_part_are_not_counted() -> None:
    found = energy(trace(1, a=1), cluster(board("a", 1, 2), board("b", None, None)))
    assert found is not None
    assert (found.gross_j, list(found.devices)) == (2, ["a"])
