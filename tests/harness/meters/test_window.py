"""Energy of a window: known waveforms through a clock that the test turns, and when there is no figure."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.meters import sampler
from harness.meters.measurement import Measurement, net_of_idle
from harness.meters.sampler import sampled
from harness.meters.window import Unreadable, Window, integrate

HZ = 20.0
S = 1_000_000_000


class Clock:
    """A watch whose time passes only by waiting: the window ends at `end_s`."""

    def __init__(self, end_s: float) -> None:
        self.now, self.end = 0, round(end_s * S)
        self.begins = 0

    def now_ns(self) -> int:
        return self.now

    def begun(self) -> None:
        self.begins += 1

    def ended(self, until_ns: int | None) -> bool:
        self.now = self.end if until_ns is None else min(until_ns, self.end)
        return self.now >= self.end

    def pause(self, seconds: float) -> None:
        self.now += round(seconds * S)


def measured(power_w: Callable[[float], float], seconds: float) -> Window:
    clock = Clock(seconds)
    window = sampled(lambda: (clock.now, power_w(clock.now / S)), HZ, clock)
    assert clock.begins == 1
    return window


def test_constant_power_is_exact() -> None:
    window = measured(lambda s: 4.0, 10.0)
    assert window.reason is None
    assert window.energy_j == pytest.approx(40, rel=1e-12)
    assert (window.duration_s, window.mean_w, window.min_w, window.max_w) == (10, 4, 4, 4)
    assert window.samples == 201 and window.achieved_hz == pytest.approx(HZ)
    assert window.largest_gap_s == pytest.approx(1 / HZ)


@given(offset=st.floats(0, 50), slope=st.floats(0, 5), seconds=st.floats(0.6, 30))
def test_a_ramp_is_exact_wherever_the_window_ends(offset: float, slope: float, seconds: float) -> None:
    window = measured(lambda s: offset + slope * s, seconds)
    assert window.energy_j == pytest.approx(offset * seconds + slope * seconds**2 / 2, rel=1e-6, abs=1e-6)


def test_a_square_wave_is_off_by_less_than_an_interval_per_edge() -> None:
    """0 or 10 W, a second each: 20 edges, each wrong by at most 10 W x half an interval."""
    window = measured(lambda s: 10.0 if int(s) % 2 else 0.0, 20.0)
    assert window.energy_j is not None
    assert abs(window.energy_j - 100) <= 20 * 10 * 0.5 / HZ
    assert (window.min_w, window.max_w) == (0, 10)


def with_gap(gap_s: float) -> Window:
    """Twenty seconds, in which one reading takes so long."""
    clock, slow = Clock(20.0), iter([False] * 100 + [True])

    def read() -> tuple[int, float]:
        if next(slow, False):
            clock.now += round((gap_s - 1 / HZ) * S)
        return clock.now, 3.0

    return sampled(read, HZ, clock)


def test_a_gap_of_more_than_a_second_rejects_the_window() -> None:
    window = with_gap(1.1)
    assert window.energy_j is None and window.mean_w is None
    assert window.largest_gap_s == pytest.approx(1.1)
    assert window.reason is not None and "1.1 s" in window.reason
    assert with_gap(0.9).energy_j == pytest.approx(60)


def test_fewer_than_ten_readings_give_no_figure() -> None:
    window = measured(lambda s: 4.0, 0.4)
    assert window.energy_j is None and window.samples == 9
    assert window.reason is not None and "9 readings" in window.reason
    assert measured(lambda s: 4.0, 0.5).energy_j == pytest.approx(2)


def test_the_last_interval_is_not_lost() -> None:
    """The end comes between two readings; one more is taken then."""
    window = measured(lambda s: 4.0, 1.04)
    assert window.energy_j == pytest.approx(4.16)


@given(cut=st.floats(1, 9), powers=st.lists(st.floats(0, 100), min_size=101, max_size=101))
def test_adjacent_windows_add_up(cut: float, powers: list[float]) -> None:
    times = [round(i * 0.1 * S) for i in range(101)]
    parts = [integrate(times, powers, 0, round(cut * S)), integrate(times, powers, round(cut * S), 10 * S)]
    whole = integrate(times, powers, 0, 10 * S)
    # Readings beyond a part's edges don't count as a gap of it, nor into its energy.
    joules = [part.energy_j for part in parts if part.energy_j is not None]
    assert whole.energy_j is not None
    assert math.fsum(joules) == pytest.approx(whole.energy_j, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("power", [-0.1, math.nan, math.inf])
def test_a_power_that_can_not_be_rejects_the_window(power: float) -> None:
    window = measured(lambda s: power if s > 5 else 4.0, 10.0)
    assert window.energy_j is None
    assert window.reason is not None and "nothing can draw that" in window.reason
    assert window.duration_s == 10


@pytest.mark.parametrize("error", [Unreadable("the rail is gone"), PermissionError(13, "Permission denied", "power")])
def test_a_reading_that_fails_rejects_the_window_with_its_reason(error: Exception) -> None:
    def power_w(seconds: float) -> float:
        if seconds > 5:
            raise error
        return 4.0

    window = measured(power_w, 10.0)
    assert window.energy_j is None
    assert window.reason is not None and ("gone" in window.reason or "denied" in window.reason)


def test_a_reading_that_takes_too_long_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0, round(1.1 * S)])
    monkeypatch.setattr(sampler.time, "monotonic_ns", lambda: next(times))
    with pytest.raises(Unreadable, match=r"took 1\.1 s"):
        sampler.timed(lambda: 4.0)


def test_a_meter_that_stops_rejects_the_window() -> None:
    """It says for ever what it said after five seconds."""
    clock = Clock(10.0)
    window = sampled(lambda: (min(clock.now, 5 * S), 4.0), HZ, clock)
    assert window.energy_j is None
    assert window.reason is not None and "Nothing was read for" in window.reason


def test_a_meter_with_its_own_times_is_waited_for_at_the_end() -> None:
    """It says twice a second what was a quarter of a second ago."""
    clock = Clock(10.0)

    def read() -> tuple[int, float]:
        at = (clock.now - S // 4) // (S // 2) * (S // 2)
        return at, max(0.0, 2.0 * at / S)

    window = sampled(read, HZ, clock)
    assert (window.reason, window.samples, window.duration_s) == (None, 22, 10)
    assert window.energy_j == pytest.approx(100)


def test_gross_less_idle_times_duration_is_net() -> None:
    gross = Measurement("meter", energy_j=100.0, duration_s=10.0)
    idle = Measurement("meter", energy_j=120.0, mean_w=2.0, duration_s=60.0)
    net = net_of_idle(gross, idle, "2026-01-01T00:00:00+00:00")
    assert (net.energy_j, net.energy_net_of_idle_j, net.idle_w, net.idle_duration_s) == (100, 80, 2, 60)


@pytest.mark.parametrize(
    ("gross", "idle", "reason"),
    [
        (Measurement("meter", duration_s=10.0, reason="a gap"), Measurement("meter", mean_w=2.0), "a gap"),
        (
            Measurement("meter", energy_j=100.0, duration_s=10.0),
            Measurement("meter", reason="a gap"),
            "Not net of idle: a gap",
        ),
    ],
)
def test_without_a_baseline_or_a_figure_there_is_no_net_but_a_reason(
    gross: Measurement, idle: Measurement, reason: str
) -> None:
    found = net_of_idle(gross, idle, "")
    assert (found.energy_j, found.energy_net_of_idle_j, found.reason) == (gross.energy_j, None, reason)
