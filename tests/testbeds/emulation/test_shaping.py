"""Rates and events of shaped links, by the clock."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness.errors import OrreryError
from tests.testbeds.emulation.test_namespaces import needs_namespaces
from tests.testbeds.emulation.yard import Yard, yard

#: What TCP gets of a link: 1448 bytes of every Ethernet frame's 1514.
TCP_SHARE = 0.95

pytestmark = needs_namespaces


@pytest.fixture(scope="module")
def two() -> Iterator[Yard]:
    with yard(2) as plugged:
        yield plugged


def shape(two: Yard, *mbit_per_s: float) -> None:
    for rank, rate in enumerate(mbit_per_s):
        two.ask("shape", rank, rate)


def expected_s(num_bytes: int, mbit_per_s: float) -> float:
    return num_bytes * 8 / (TCP_SHARE * mbit_per_s * 1e6)


def fastest_s(two: Yard, src: int, num_bytes: int, mbit_per_s: float) -> float:
    """The fastest of at most 12 transfers: what disturbs one, on a machine with other work, only makes it slower."""
    times: list[float] = []
    while len(times) < 12 and (not times or min(times) > 1.02 * expected_s(num_bytes, mbit_per_s)):
        times.append(two.ask("send", src, 1 - src, num_bytes))
    return min(times)


@pytest.mark.parametrize(
    ("src", "mbit_per_s", "num_bytes"),
    [(0, 5.0, 150_000), (0, 50.0, 1_500_000), (1, 50.0, 1_500_000), (0, 200.0, 4_000_000), (1, 200.0, 4_000_000)],
)
def test_tcp_gets_95_percent_of_nominal(two: Yard, src: int, mbit_per_s: float, num_bytes: int) -> None:
    shape(two, mbit_per_s, mbit_per_s)
    assert fastest_s(two, src, num_bytes, mbit_per_s) == pytest.approx(expected_s(num_bytes, mbit_per_s), rel=0.05)


def test_a_path_is_as_fast_as_its_slower_end(two: Yard) -> None:
    shape(two, 20.0, 100.0)
    for src in (0, 1):
        assert fastest_s(two, src, 500_000, 20.0) == pytest.approx(expected_s(500_000, 20.0), rel=0.1)


def test_shaping_again_replaces_and_unshaping_ends_it(two: Yard) -> None:
    shape(two, 10.0, 10.0)
    shape(two, 100.0, 100.0)
    assert fastest_s(two, 0, 1_000_000, 100.0) == pytest.approx(expected_s(1_000_000, 100.0), rel=0.1)
    for rank in (0, 1, 1):
        two.ask("unshape", rank)
    assert two.ask("send", 0, 1, 10_000_000) < expected_s(10_000_000, 1000.0)


def test_a_rate_changes_under_a_transfer(two: Yard) -> None:
    """Late commands count five-fold here: 1.31 s if the rate changes after 0.2 s, 0.90 s after 0.3 s, 0.42 s never."""
    times: list[float] = []
    while len(times) < 3 and not (times and 0.9 < times[-1] < 1.4):
        shape(two, 100.0, 100.0)
        times.append(two.ask("send", 0, 1, 5_000_000, ["sleep", 0.2], ["set_rate", 0, 20.0]))
    assert 0.9 < times[-1] < 1.4, times
    assert fastest_s(two, 1, 500_000, 20.0) == pytest.approx(expected_s(500_000, 20.0), rel=0.1)


def test_a_pulled_cable_stops_a_transfer_until_it_is_plugged_in(two: Yard) -> None:
    """TCP repeats at doubling intervals from 0.2 s on, so that it goes on up to as long again after the cable."""
    shape(two, 100.0, 100.0)
    pulled_s, plain_s = 0.4, expected_s(4_000_000, 100.0)
    events = (["sleep", 0.1], ["set_link", 1, False], ["sleep", pulled_s], ["set_link", 1, True])
    time_s = two.ask("send", 1, 0, 4_000_000, *events)
    assert plain_s + pulled_s < time_s < plain_s + 2.5
    assert fastest_s(two, 1, 1_000_000, 100.0) == pytest.approx(expected_s(1_000_000, 100.0), rel=0.1)


def test_a_device_without_cable_sees_no_carrier(two: Yard) -> None:
    two.ask("set_link", 1, False)
    assert "NO-CARRIER" in two.ask("show", 1, ["ip", "link", "show", "eth0"])
    two.ask("set_link", 1, True)
    assert "NO-CARRIER" not in two.ask("show", 1, ["ip", "link", "show", "eth0"])


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_an_impossible_rate_is_refused(two: Yard, rate: float) -> None:
    with pytest.raises(OrreryError, match=r"can't be emulated. It must pass 0.01 to 100000 Mbit/s"):
        two.ask("shape", 0, rate)


def test_latency_needs_netem_and_is_there_once_each_way(two: Yard) -> None:
    if not two.ask("has_netem"):
        with pytest.raises(OrreryError, match=r"tc qdisc add dev port0 .* netem delay 20000us .* failed: "):
            two.ask("shape", 0, 100.0, 0.02)
        return
    for rank in (0, 1):
        two.ask("shape", rank, 100.0, 0.02)
    # The bytes take one way, and the acknowledgement the other.
    assert 0.04 <= two.ask("send", 0, 1, 1000) < 0.06
    two.ask("set_rate", 0, 10.0)
    # TCP needs a few round trips more to find the rate; at the former one it would be done after them.
    assert 0.04 + expected_s(500_000, 10.0) < two.ask("send", 0, 1, 500_000) < 0.2 + expected_s(500_000, 10.0)


def test_a_negative_latency_is_refused(two: Yard) -> None:
    with pytest.raises(OrreryError, match=r"The latency of rank 0 is -1 s. It must be 0 or more"):
        two.ask("shape", 0, 100.0, -1)


def test_without_tc() -> None:
    with yard(1) as one:
        one.ask("path", "")
        with pytest.raises(OrreryError, match=r"There is no program `tc`. Install it: apt install iproute2"):
            one.ask("shape", 0, 100.0)
