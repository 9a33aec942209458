"""The advisor's pick against brute force, the front against its definition, and what can't be done."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.advisor import OBJECTIVES, Candidate, advise, pareto_front
from harness.cluster import Cluster
from harness.costs import Costs
from harness.distribution import distribution
from harness.errors import OrreryError, OutOfMemory, Unsupported
from harness.experiment import Request
from harness.participants import bound, sets_of_devices
from harness.plan.actions import COMPUTE
from harness.registry import Method, load_method
from harness.simulator import simulate
from harness.workload import Workload
from tests.harness import toys

METHODS = ("standalone", "eddl", "gpipe", "dapple", "pipedream-1f1b")
WORKLOAD = Workload("toy", "toy", num_samples=10, batch_size=4)


@dataclass(frozen=True)
class Bed:
    """What the advisor needs of a testbed."""

    cluster: Cluster
    name: str = "toy"
    events: tuple[object, ...] = ()
    heartbeat_timeout_s: float = 1.0


def requests(cluster: Cluster, *methods: str | Method) -> list[Request]:
    loaded = [load_method(method) if isinstance(method, str) else method for method in methods or METHODS]
    return [Request(method, method.options, WORKLOAD, Bed(cluster), "simulated") for method in loaded]  # type: ignore[arg-type]


def boards(cluster: Cluster, **changed: Any) -> Cluster:
    """The devices with powers, and whatever else is said of all of them."""
    devices = (replace(device, **{"idle_w": 1.0, "load_w": 5.0, **changed}) for device in cluster.devices)
    return replace(cluster, devices=tuple(devices))


def drawn(seed: int, count: int | None = None) -> tuple[Costs, Cluster]:
    """2 to 4 unequal devices, or so many, and 3 to 8 layers of which some don't fit everywhere."""
    draw = random.Random(seed)
    costs = toys.chain(draw.randint(3, 8), forward_flops=draw.uniform(1e8, 2e9), parameters=draw.choice([840, 84_000]))
    size = costs.weight_bytes(0, len(costs.units))[0]
    plain = toys.cluster(count or draw.randint(2, 4), draw.choice([1e5, 1e6, 1e7]), latency_s=1e-3)
    devices = []
    for device in plain.devices:
        speed, idle = draw.choice([0.5e9, 1e9, 3e9]), draw.uniform(0.5, 4)
        rates = dict.fromkeys(device.rates, (speed, speed))
        memory = int(size * draw.choice([1.5, 3, 10])) + 40_000
        devices.append(
            replace(device, rates=rates, memory_bytes=memory, idle_w=idle, load_w=idle + draw.uniform(2, 12))
        )
    return costs, replace(plain, devices=tuple(devices))


@cache
def everything(seed: int, count: int | None = None) -> list[tuple[float, float]]:
    """Time and energy of every method on every subset, alike or not; energy written down anew, and the weights' way
    there."""
    costs, cluster = drawn(seed, count)
    found = []
    for size in range(1, len(cluster.devices) + 1):
        for names in combinations(cluster.names, size):
            part = cluster.only(names)
            for name in METHODS:
                method = load_method(name)
                try:
                    plan = method.plan(WORKLOAD, costs, part, method.options)
                except (OutOfMemory, Unsupported):
                    continue
                trace, before = simulate(plan, costs, part), distribution(plan, cluster)
                if any(trace.peak_bytes[n] > part.device(n).memory_bytes for n in trace.devices):
                    continue
                joules = before.joules or 0.0
                for n in trace.devices:
                    device = part.device(n)
                    busy = trace.busy_s[n][COMPUTE]
                    joules += device.idle_w * (trace.total_s - busy) + device.load_w * busy  # type: ignore[operator]
                found.append((before.seconds + trace.total_s, joules))
    return found


def brute_force(seed: int, objective: str, count: int | None = None) -> float:
    return min({"time": s, "edp": s * joules}.get(objective, joules) for s, joules in everything(seed, count))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_up_to_four_devices_the_pick_is_that_of_brute_force(seed: int, objective: str) -> None:
    costs, cluster = drawn(seed)
    advice = advise(requests(cluster), costs, objective)
    assert advice.num_planned == advice.num_sets
    assert advice.ranked[0].value(objective) == pytest.approx(brute_force(seed, objective), rel=1e-9)


def test_gap_where_not_every_set_is_planned_for() -> None:
    """Of 9 searches among five unequal devices, which have 31 sets."""
    gaps = []
    for seed in range(3):
        costs, cluster = drawn(seed, 5)
        for objective in ("time", "energy", "edp"):
            advice = advise(requests(cluster), costs, objective)
            assert advice.num_planned < advice.num_sets == 31
            value = advice.ranked[0].value(objective)
            assert value is not None
            gaps.append(value / brute_force(seed, objective, 5) - 1)
    assert min(gaps) > -1e-9
    assert sorted(gaps)[len(gaps) // 2] < 1e-9 and max(gaps) < 0.05


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_below_its_bound(seed: int) -> None:
    costs, cluster = drawn(seed)
    for candidate in advise(requests(cluster), costs, "time").ranked:
        devices = [cluster.device(name) for name in candidate.devices]
        seconds, joules = bound(WORKLOAD, costs, devices)
        assert candidate.time_s is not None and candidate.energy_j is not None and joules is not None
        assert seconds <= candidate.time_s * (1 + 1e-9)
        assert joules <= candidate.energy_j * (1 + 1e-9)


def test_devices_that_are_alike_are_not_told_apart() -> None:
    sets = sets_of_devices(toys.cluster(3, speeds=(1.0, 2.0, 1.0)))
    assert sets == [
        ("device0", "device1", "device2"),
        ("device0", "device1"),
        ("device0", "device2"),
        ("device0",),
        ("device1",),
    ]


def test_sets_of_very_many_unequal_devices_are_from_both_ends() -> None:
    sets = sets_of_devices(toys.cluster(40, speeds=tuple(1 + i / 100 for i in range(40))))
    sizes = {len(names) for names in sets}
    assert {1, 2, 38, 39, 40} <= sizes and 20 not in sizes
    assert len(sets) < 2 * 4096


points = st.tuples(st.integers(1, 6), st.one_of(st.none(), st.integers(1, 6)), st.integers(1, 6))


@given(st.lists(points, min_size=1, max_size=30))
def test_the_front_is_what_nothing_else_beats(drawn_points: list[tuple[int, int | None, int]]) -> None:
    """By definition: another one is at least as good in all three, and better in one. Unknown energy is the worst."""
    candidates = [
        Candidate(str(i), {}, (), "ok", time_s=t, energy_j=e, peak_memory_bytes=m)
        for i, (t, e, m) in enumerate(drawn_points)
    ]
    front = {candidate.method for candidate in pareto_front(candidates)}
    known = [(t, float("inf") if e is None else e, m) for t, e, m in drawn_points]
    for i, mine in enumerate(known):
        beaten = any(
            other[0] <= mine[0] and other[1] <= mine[1] and other[2] <= mine[2] and other != mine for other in known
        )
        assert (str(i) in front) == (not beaten)
    assert front


def test_of_equal_candidates_the_one_with_fewer_devices_and_named_first_is_picked() -> None:
    """Standalone, EDDL and GPipe are the same on one device, and nothing is gained by more over so slow a network."""
    cluster = boards(toys.cluster(2, bandwidth=1.0))
    for order in (("eddl", "gpipe", "standalone"), ("gpipe", "standalone", "eddl")):
        ranked = advise(requests(cluster, *order), toys.chain(4), "energy").ranked
        best = ranked[0]
        equal = [c for c in ranked if (c.energy_j, c.peak_memory_bytes) == (best.energy_j, best.peak_memory_bytes)]
        assert [c.method for c in equal] == list(order)
        assert all(c.devices == ("device0",) for c in equal)


def test_a_deadline_leaves_out_what_is_late_and_says_when_nothing_is_in_time() -> None:
    cluster = boards(toys.cluster(2, bandwidth=1e9), idle_w=3.0)
    asked = requests(cluster, "standalone", "eddl")
    free = advise(asked, toys.chain(4), "energy")
    slow, quick = (next(c for c in free.ranked if len(c.devices) == n) for n in (1, 2))
    assert slow.time_s is not None and quick.time_s is not None and quick.time_s < slow.time_s
    late = advise(asked, toys.chain(4), "energy", deadline_s=(slow.time_s + quick.time_s) / 2)
    assert {len(c.devices) for c in late.ranked} == {2}
    assert {c.reason for c in late.others} == {"misses the deadline"}
    with pytest.raises(
        OrreryError, match=rf"done in 1 s. The fastest is eddl on device0, device1 in {quick.time_s:.6g} s"
    ):
        advise(asked, toys.chain(4), "energy", deadline_s=1)


def breaks(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Any:
    raise ZeroDivisionError("nothing to divide by")


def test_what_can_t_be_done_is_a_row_with_its_reason() -> None:
    cluster = boards(toys.cluster(2, speeds=(1.0, 1.0)))
    small, large = cluster.devices
    small = replace(small, memory_bytes=1000)
    empty = replace(cluster, devices=(small, replace(large, battery_j=0.1)))
    cluster = replace(cluster, devices=(small, large))
    rows = advise(requests(cluster, "eddl", "galaxy", Method("mine", {}, breaks)), toys.chain(4), "time").others
    by = {(row.method, row.devices): row for row in rows}
    assert by["eddl", ("device0", "device1")].status == "oom"
    assert "device0 needs" in (by["eddl", ("device0", "device1")].reason or "")
    assert [row.status for row in rows if row.method == "galaxy"] == ["unsupported"], "the same reason once"
    assert by["mine", ("device0", "device1")].status == "failed"
    assert "ZeroDivisionError" in (by["mine", ("device0", "device1")].reason or "")
    with pytest.raises(OrreryError, match="No method can do this workload on these devices"):
        advise(requests(empty, "eddl"), toys.chain(4), "time")


def test_without_powers_time_can_be_ranked_and_energy_can_t() -> None:
    cluster = toys.cluster(2)
    ranked = advise(requests(cluster), toys.chain(4), "time").ranked
    assert ranked and all(candidate.energy_j is None for candidate in ranked)
    with pytest.raises(OrreryError, match="energy needs the powers of all devices"):
        advise(requests(cluster), toys.chain(4), "energy")


def test_distribution_is_counted_once_and_from_the_first_device() -> None:
    """4 layers of 3360 bytes each: EDDL sends all of them to two more devices at 1 MB/s, whatever the run's length;
    the three are idle at 1 W meanwhile."""
    cluster = boards(toys.cluster(3))
    method, costs = load_method("eddl"), toys.chain(4)
    for samples in (4, 400):
        workload = replace(WORKLOAD, num_samples=samples)
        found = distribution(method.plan(workload, costs, cluster, method.options), cluster)
        assert found.seconds == pytest.approx(2 * 4 * 3360 / 1e6)
        assert found.joules == pytest.approx(3 * found.seconds)
    alone = load_method("standalone")
    assert distribution(alone.plan(WORKLOAD, costs, cluster, alone.options), cluster) == (0.0, 0.0)


def test_every_method_is_planned_on_all_of_many_devices() -> None:
    cluster = boards(toys.cluster(6, speeds=(1.0, 1.5, 2.0, 2.5, 3.0, 3.5)))
    advice = advise(requests(cluster), toys.chain(8), "energy")
    seen = {candidate.method for candidate in (*advice.ranked, *advice.others)}
    assert seen == set(METHODS)
    assert advice.num_sets == 63 and 6 <= advice.num_planned < 63
