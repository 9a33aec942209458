"""The power model against closed forms, and its identity on every simulated run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.cluster import Cluster, Device
from harness.plan.actions import COMPUTE, NIC_IN, NIC_OUT
from harness.plan.plan import Plan
from harness.power import energy
from harness.schedules import Pipeline, Stage
from harness.simulator import simulate
from harness.trace import Trace
from tests.harness import toys
from tests.harness.plan.test_validate import pipelines


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


def test_further_states_by_hand() -> None:
    """b waits for 6 of 10 s at 3 - 2 W more than idle, sends for 10 s at 0.5 W and 100 bytes at 0.01 J, and receives
    none: 20 + (7 - 2) x 4 + 6 + 5 + 1 = 52 J. a waits for nothing, and receives them: 20 + 5 x 10 + 0.5 x 0 + 1 J."""
    further = {"wait_w": 3.0, "network_w": 0.5, "network_j_per_byte": 0.01}
    boards = (replace(board(name, 2, 7), **further) for name in "ab")
    run = replace(trace(10, a=10, b=4), link_bytes={("b", "a"): 100})
    run = replace(run, busy_s={**run.busy_s, "a": {COMPUTE: 10.0}})
    found = energy(run, cluster(*boards))
    assert found is not None
    b, a = found.devices["b"], found.devices["a"]
    assert (b.idle_j, b.compute_j, b.wait_j, b.communication_j) == (20, 20, 6, 6)
    assert (a.idle_j, a.compute_j, a.wait_j, a.communication_j) == (20, 50, 0, 1)
    assert (found.gross_j, found.net_of_idle_j) == (52 + 71, 123 - 40)


@given(pipelines(), watts, watts, st.floats(0, 1), st.floats(0, 5), st.floats(0, 1e-6))
def test_identity_on_every_simulated_run(
    plan: Plan, idle: float, extra: float, waiting: float, network: float, per_byte: float
) -> None:
    """E = sum over devices of idle T + what each state adds, counted here from the trace; and never below idle."""
    boards = toys.cluster(len(plan.devices))
    further = {"wait_w": idle + waiting * extra, "network_w": network, "network_j_per_byte": per_byte}
    boards = replace(
        boards,
        devices=tuple(replace(d, idle_w=idle, load_w=idle + extra, **further) for d in boards.devices),
    )
    run = simulate(plan, toys.chain(plan.num_units, tied=bool(plan.phases[0].tied)), boards)
    found = energy(run, boards)
    assert found is not None
    expected = 0.0
    for name, busy in run.busy_s.items():
        moved = sum(nbytes for ends, nbytes in run.link_bytes.items() if name in ends)
        expected += idle * run.total_s + extra * busy[COMPUTE] + waiting * extra * (run.total_s - busy[COMPUTE])
        expected += network * (busy[NIC_OUT] + busy[NIC_IN]) + per_byte * moved
    assert found.gross_j == pytest.approx(expected, rel=1e-9)
    least = idle * run.total_s * len(run.devices)
    assert found.gross_j >= least * (1 - 1e-9)
    assert sum(part.idle_j for part in found.devices.values()) / found.gross_j == pytest.approx(least / expected)


@given(st.integers(1, 6), st.integers(1, 8), watts, watts)
def test_splitting_multiplies_the_idle_term(num_stages: int, count: int, idle: float, extra: float) -> None:
    """E_n / E_1 = 1 + r (n / S - 1) where n equal devices share the work of one: r = idle / load, S the speed-up.
    A GPipe of toys without transfers, whose update is instantaneous, conserves the work."""

    def run(stages: int) -> tuple[float, float]:
        model = toys.chain(num_stages)
        per_stage = num_stages // stages
        names = [f"device{i}" for i in range(stages)]
        split = tuple(Stage((p * per_stage, (p + 1) * per_stage), (name,), (1,)) for p, name in enumerate(names))
        pipeline = Pipeline(model, split)
        phase = pipeline.phase((1,) * count, [count] * stages)
        boards = toys.cluster(stages, bandwidth=float("inf"))
        boards = replace(boards, devices=tuple(replace(d, idle_w=idle, load_w=idle + extra) for d in boards.devices))
        trace = simulate(Plan("test", num_stages, pipeline.tensors, (phase,)), model, boards)
        found = energy(trace, boards)
        assert found is not None
        return found.gross_j, trace.total_s

    (one_j, one_s), (many_j, many_s) = run(1), run(num_stages)
    r, speed_up = idle / (idle + extra), one_s / many_s
    assert many_j / one_j == pytest.approx(1 + r * (num_stages / speed_up - 1), rel=1e-9)
