"""Virtual time against closed forms, bounds and an unrolled run."""

from __future__ import annotations

import dataclasses
import itertools
import math

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.costs import Costs
from harness.plan import Collective, Combine, Compute, Free, Load, Phase, Plan, Recv, Send, Store, Tensor, Value
from harness.plan.flow import link
from harness.schedules import Pipeline, Stage, micro_batches
from harness.simulator import simulate
from tests.harness.plan.test_validate import pipelines
from tests.harness.toys import SAVED, WIDTH, chain, cluster


def straight(num_stages: int, count: int, warmup: list[int], layers: int = 0, **costs) -> tuple[Plan, object]:
    """One stage per device, `count` micro-batches of one row."""
    model = chain(layers or num_stages, **costs)
    per_stage = len(model.units) // num_stages
    stages = tuple(Stage((p * per_stage, (p + 1) * per_stage), (f"device{p}",), (1,)) for p in range(num_stages))
    pipeline = Pipeline(model, stages)
    return Plan("test", len(model.units), pipeline.tensors, (pipeline.phase((1,) * count, warmup),)), model


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 2), (3, 5), (4, 4), (4, 16), (5, 7)])
def test_bubble_is_that_of_the_closed_form(schedule, p, m):
    """(p-1)/(m+p-1) where nothing else interferes: Huang et al., GPipe; the same for 1F1B."""
    warmup = [m] * p if schedule == "gpipe" else [p - i for i in range(p)]
    plan, costs = straight(p, m, warmup)
    trace = simulate(plan, costs, cluster(p, bandwidth=math.inf))
    busy = sum(trace.busy_s[d]["compute"] for d in trace.devices)
    assert 1 - busy / (p * trace.total_s) == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@pytest.mark.parametrize("warmup", [[1, 1, 1], [3, 2, 1], [5, 3, 1], [8, 8, 8]])
def test_activations_in_flight_follow_the_warm_up_counts(warmup):
    plan, costs = straight(3, 8, warmup, parameters=1)
    trace = simulate(plan, costs, cluster(3, bandwidth=math.inf))
    handed = 4 * WIDTH  # what a stage receives it keeps with what it saves
    for p, device in enumerate(trace.devices):
        held = warmup[p] * (SAVED + (handed if p else 0))
        peak = trace.memory_bytes[device]["activations"]
        # Beside those: an output on its way out, an input ahead of its turn, the gradients of one micro-batch.
        assert held <= peak <= held + 5 * handed


@given(st.integers(2, 6), st.integers(1, 5))
def test_all_reduce_bytes_and_time_are_the_ring_s(n, chunk):
    """2 (n-1)/n of the gradient per device; 2 (n-1) steps of chunk/bandwidth + latency."""
    numel = n * chunk
    pipeline = Pipeline(chain(1, parameters=numel), (Stage((0, 1), tuple(f"device{i}" for i in range(n)), (1,) * n),))
    plan = Plan("test", 1, pipeline.tensors, (pipeline.phase((n,), [1]),))
    trace = simulate(plan, pipeline.costs, cluster(n, bandwidth=1e6, latency_s=1e-3))
    for i in range(n):
        assert trace.link_bytes[f"device{i}", f"device{(i + 1) % n}"] == 2 * (n - 1) * 4 * numel // n
    compute = 3.0  # one row forward and backward at 1 GFLOP/s
    assert trace.total_s == pytest.approx(compute + 2 * (n - 1) * (4 * chunk / 1e6 + 1e-3), abs=1e-11)


def test_uneven_all_reduce_moves_no_byte_too_many():
    n, numel = 4, 10
    pipeline = Pipeline(chain(1, parameters=numel), (Stage((0, 1), tuple(f"device{i}" for i in range(n)), (1,) * n),))
    plan = Plan("test", 1, pipeline.tensors, (pipeline.phase((n,), [1]),))
    assert simulate(plan, pipeline.costs, cluster(n)).comm_bytes == 2 * (n - 1) * 4 * numel


def ring(kind: str, shares: tuple[int, ...], tiles: int = 1, width: int = 0) -> Plan:
    """One collective alone, on zeros of 4 bytes an element; without a width the shares are said."""
    said, width = () if width else shares, width or sum(shares)
    group = tuple(f"device{i}" for i in range(len(shares)))
    actions = {}
    for name, share in zip(group, itertools.pairwise(itertools.accumulate(shares, initial=0)), strict=True):
        value = Value("h", width=share if kind == "all-gather" else None)
        result = Value("h", width=share if kind == "reduce-scatter" else None, version=1)
        spent = (value, result) if kind == "all-gather" else (result,)
        actions[name] = (Combine("sum", (), value), Collective(kind, value, result, group, said, tiles), Free(spent))
    phase = Phase("ring", (), {}, actions, {}, training=False)
    return Plan("test", 0, {"h": Tensor("activations", 1, width, 4)}, (phase,))


STEPS = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1}


@given(st.sampled_from(sorted(STEPS)), st.integers(2, 6), st.integers(1, 9), st.booleans())
def test_ring_time_and_memory_of_even_shares(kind, n, chunk, said):
    """(n-1) steps of chunk/bandwidth + latency, in an all-reduce twice.

    The whole, and beside it a chunk to be added or left; a share is given back when it is copied into the whole.
    """
    plan = ring(kind, (chunk,) * n, width=0 if said else n * chunk)
    trace = simulate(plan, chain(1), cluster(n, bandwidth=1e6, latency_s=1e-3))
    assert trace.total_s == pytest.approx(STEPS[kind] * (n - 1) * (4 * chunk / 1e6 + 1e-3), abs=1e-11)
    assert trace.comm_bytes == STEPS[kind] * (n - 1) * 4 * chunk * n
    assert set(trace.peak_bytes.values()) == {4 * chunk * (n + (kind != "all-gather"))}


@st.composite
def uneven_rings(draw: st.DrawFn) -> tuple[str, tuple[int, ...]]:
    shares = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)
    return draw(st.sampled_from(sorted(STEPS))), tuple(draw(shares))


@given(uneven_rings(), st.integers(2, 5), st.sampled_from([1e5, 1e6, 1e7, math.inf]))
def test_tiles_move_the_same_bytes_and_are_never_slower(kind_and_shares, tiles, memory_bandwidth):
    kind, shares = kind_and_shares
    testbed = cluster(len(shares), bandwidth=1e6, latency_s=1e-4, memory_bandwidth=memory_bandwidth)
    whole, tiled = (simulate(ring(kind, shares, count), chain(1), testbed) for count in (1, tiles))
    assert tiled.link_bytes == whole.link_bytes
    assert tiled.comm_bytes == STEPS[kind] * (len(shares) - 1) * 4 * sum(shares)
    assert tiled.total_s <= whole.total_s + 1e-9
    for trace in (whole, tiled):
        assert all(points[-1][1] == 0 for points in trace.memory_timeline.values())


def test_tiles_hide_sums_behind_transfers():
    """Two members, 4 s of transfer and 4 s of sums in one piece; in four pieces only one sum of 1 s remains."""
    value = 10**6
    testbed = cluster(2, bandwidth=1e6, memory_bandwidth=3e6)
    zeros = 3 * 8 * value / 3e6
    one, four = (
        simulate(ring("reduce-scatter", (value, value), tiles), chain(1), testbed).total_s - zeros for tiles in (1, 4)
    )
    assert (one, four) == (pytest.approx(4 + 4), pytest.approx(4 + 1))


def test_sums_of_one_step_take_turns():
    """However many tiles, a sum is 3 times its bytes over memory bandwidth: 12 s here, behind a fast link."""
    testbed = cluster(2, bandwidth=math.inf, memory_bandwidth=1e6)
    times = [simulate(ring("reduce-scatter", (10**6, 10**6), t), chain(1), testbed).total_s for t in (1, 2, 8)]
    assert times == [pytest.approx(3 * 8 + 3 * 4)] * 3


@given(st.integers(1, 5), st.sampled_from([1e6, 1e9]))
def test_clipping_costs_a_pass_over_the_gradients_and_a_ring_of_one_number(n, memory_bandwidth):
    """The number goes round twice: summed on the way, then to all."""
    testbed = cluster(n, bandwidth=1e6, latency_s=1e-3, memory_bandwidth=memory_bandwidth)
    stages = (Stage((0, 1), tuple(f"device{i}" for i in range(n)), (1,) * n),)
    plain, clipped = (
        simulate(Plan("test", 1, p.tensors, (p.phase((n,), [1]),)), p.costs, testbed)
        for p in (Pipeline(chain(1), stages, clip=clip) for clip in (False, True))
    )
    extra = 4 * 840 / memory_bandwidth + (n - 1) * (2 * (4 / 1e6 + 1e-3) + 3 * 4 / memory_bandwidth)
    assert clipped.total_s - plain.total_s == pytest.approx(extra, abs=1e-10)
    assert clipped.comm_bytes - plain.comm_bytes == 2 * (n - 1) * 4


@given(st.integers(1, 6), st.integers(1, 9))
def test_stage_boundary_bytes(rows, count):
    """Each micro-batch crosses once forward and its gradient once backward."""
    pipeline = Pipeline(chain(2), (Stage((0, 1), ("device0",), (1,)), Stage((1, 2), ("device1",), (1,))))
    plan = Plan("test", 2, pipeline.tensors, (pipeline.phase((rows,) * count, [2, 1]),))
    trace = simulate(plan, pipeline.costs, cluster(2))
    assert trace.link_bytes == {
        ("device0", "device1"): count * rows * WIDTH * 4,
        ("device1", "device0"): count * rows * WIDTH * 4,
    }


@given(pipelines())
def test_never_faster_than_the_busiest_queue_or_the_critical_path(plan):
    costs = chain(plan.num_units, tied=bool(plan.phases[0].tied))
    count = len(plan.devices)
    trace = simulate(plan, costs, cluster(count, latency_s=1e-4, memory_bandwidth=1e8))
    assert trace.total_s >= max(t for queues in trace.busy_s.values() for t in queues.values()) - 1e-9
    # The longest chain of actions that need each other, by an independent library, for one iteration.
    once = dataclasses.replace(plan, phases=(dataclasses.replace(plan.phases[0], repeat=1),))
    single = simulate(once, costs, cluster(count, latency_s=1e-4, memory_bandwidth=1e8))
    graph = link(plan.phases[0], plan.tensors, plan.devices)
    ends = {
        (e.device, e.kind, e.label): e.end_s - e.start_s for e in single.events if e.kind in ("forward", "backward")
    }
    needs = networkx.DiGraph()
    needs.add_nodes_from(range(len(graph)))
    for node, followers in enumerate(graph.then):
        action = graph.actions[node]
        weight = 0.0
        if hasattr(action, "direction"):
            label = f"{action.direction[0].upper()}{action.micro_batch} {action.units[0]}:{action.units[1]}"
            weight = ends[graph.devices[graph.device[node]], action.direction, label]
        elif isinstance(action, Send):
            weight = graph.nbytes[node] / 1e6 + 1e-4
        needs.add_edges_from((node, follower, {"weight": weight}) for follower in followers)
    assert single.total_s >= networkx.dag_longest_path_length(needs) - 1e-9


@given(pipelines())
def test_the_ledger_ends_where_it_began(plan):
    costs = chain(plan.num_units, tied=bool(plan.phases[0].tied))
    trace = simulate(plan, costs, cluster(len(plan.devices), latency_s=1e-4))
    for device in trace.devices:
        live = sum(plan.bytes(v) for v in plan.phases[0].live[device])
        timeline = trace.memory_timeline[device]
        # At time 0 a device may already hold what its first action writes.
        assert timeline[-1][1] == live <= timeline[0][1]
        assert trace.peak_bytes[device] == max(nbytes for _, nbytes in timeline)


@given(pipelines(), st.integers(3, 9), st.sampled_from(["full", "half", "shared"]))
def test_multiplied_iterations_equal_the_unrolled_run(plan, repeat, duplex):
    costs = chain(plan.num_units, tied=bool(plan.phases[0].tied))
    testbed = cluster(len(plan.devices), bandwidth=3e5, latency_s=1e-4, duplex=duplex)
    phase = plan.phases[0]
    multiplied = dataclasses.replace(plan, phases=(dataclasses.replace(phase, repeat=repeat),))
    unrolled = dataclasses.replace(plan, phases=tuple(dataclasses.replace(phase, repeat=1) for _ in range(repeat)))
    one, many = simulate(multiplied, costs, testbed), simulate(unrolled, costs, testbed)
    assert one.total_s == many.total_s
    assert one.link_bytes == many.link_bytes
    assert one.peak_bytes == many.peak_bytes
    assert max(one.phases[0].iteration_s) <= max(phase.iteration_s[0] for phase in many.phases) + 1e-9
    assert one.busy_s == {d: pytest.approx(q) for d, q in many.busy_s.items()}


def test_a_run_repeats_to_the_bit():
    plan, costs = straight(4, 8, [4, 3, 2, 1])
    first, second = (simulate(plan, costs, cluster(4, latency_s=1e-4)) for _ in range(2))
    assert dataclasses.replace(first, events=tuple(first.events)) == dataclasses.replace(
        second, events=tuple(second.events)
    )


@pytest.mark.parametrize(("duplex", "expected"), [("full", 1.0), ("half", 2.0), ("shared", 4.0)])
def test_transfers_take_turns_on_what_they_share(duplex, expected):
    """Two pairs exchange a megabyte at 1 MB/s in both directions."""
    peers = {"device0": "device1", "device1": "device0", "device2": "device3", "device3": "device2"}
    own = {name: Value("x", version=rank) for rank, name in enumerate(peers)}
    actions = {
        name: (
            Combine("sum", (), own[name]),
            Send(own[name], peer),
            Recv(own[peer], peer),
            Free((own[name], own[peer])),
        )
        for name, peer in peers.items()
    }
    plan = Plan(
        "test", 0, {"x": Tensor("activations", 1, 10**6)}, (Phase("swap", (), {}, actions, {}, training=False),)
    )
    assert simulate(plan, chain(1), cluster(4, duplex=duplex)).total_s == pytest.approx(expected)


def test_storage_is_a_queue_of_its_own():
    """A load of 1 MB at 1 MB/s, then a store of it at 0.5 MB/s."""
    value = Value("cache")
    phase = Phase("cached", (), {}, {"device0": (Load(value), Store(value), Free((value,)))}, {}, training=False)
    plan = Plan("test", 0, {"cache": Tensor("cache", 1, 10**6)}, (phase,))
    trace = simulate(plan, chain(1), cluster(1))
    assert trace.total_s == pytest.approx(3.0)
    assert trace.busy_s["device0"]["storage"] == pytest.approx(3.0)
    assert trace.memory_bytes["device0"]["cache"] == 10**6


def test_a_smaller_last_batch_is_a_phase_of_its_own():
    pipeline = Pipeline(chain(1), (Stage((0, 1), ("device0",), (1,)),))
    full, rest = (pipeline.phase(micro_batches(rows, 4), [1]) for rows in (4, 3))
    plan = Plan("test", 1, pipeline.tensors, (dataclasses.replace(full, repeat=5), rest))
    trace = simulate(plan, pipeline.costs, cluster(1))
    assert trace.total_s == pytest.approx(3.0 * (5 * 4 + 3))
    assert [phase.computing_s for phase in trace.phases] == pytest.approx([3.0 * 5 * 4, 3.0 * 3])
    of_four, of_three = (phase.memory["device0"].kinds for phase in trace.phases)
    assert of_four["activations"] - of_three["activations"] == SAVED, "what a row keeps"
    assert of_four["weights"] == of_three["weights"] > 0


@given(pipelines(), st.integers(1, 4))
def test_phases_share_out_time_computing_and_peaks(plan, repeat):
    """What a run computes is the sum over its phases, and what it holds at most one of them holds."""
    costs = chain(plan.num_units, tied=bool(plan.phases[0].tied))
    phases = tuple(dataclasses.replace(plan.phases[0], repeat=repeat + extra) for extra in range(3))
    trace = simulate(dataclasses.replace(plan, phases=phases), costs, cluster(len(plan.devices), latency_s=1e-4))
    assert sum(phase.time_s for phase in trace.phases) == pytest.approx(trace.total_s)
    computing = sum(queues["compute"] for queues in trace.busy_s.values())
    assert sum(phase.computing_s for phase in trace.phases) == pytest.approx(computing)
    for device in trace.devices:
        assert max(phase.memory[device].nbytes for phase in trace.phases) == trace.peak_bytes[device]
        for kind, nbytes in trace.memory_bytes[device].items():
            assert max(phase.memory[device].kinds[kind] for phase in trace.phases) == nbytes


def inference(num_stages: int, count: int, repeat: int) -> tuple[Plan, Costs]:
    plan, costs = straight(num_stages, count, [1] * num_stages, training=False)
    return dataclasses.replace(plan, phases=(dataclasses.replace(plan.phases[0], repeat=repeat),)), costs


@pytest.mark.parametrize("duplex", ["full", "half", "shared"])
def test_a_request_begins_when_the_one_before_has_ended(duplex):
    """Four stages of a second each: four seconds a request and the transfers between, however many there are."""
    testbed = cluster(4, bandwidth=1e6, duplex=duplex)
    one, many = (simulate(*inference(4, 1, repeat), testbed) for repeat in (1, 50))
    assert one.total_s == pytest.approx(4 + 3 * 4 * WIDTH / 1e6)
    assert many.total_s == pytest.approx(50 * one.total_s)
    assert many.peak_bytes == one.peak_bytes


def test_an_input_is_not_taken_before_its_iteration():
    """A fast first stage does not fill the second one's memory with the inputs of later iterations."""
    plan, costs = straight(2, 2, [2, 1])
    testbed = cluster(2, bandwidth=math.inf, speeds=(8.0, 1.0))
    peaks = [
        simulate(
            dataclasses.replace(plan, phases=(dataclasses.replace(plan.phases[0], repeat=repeat),)), costs, testbed
        ).peak_bytes
        for repeat in (1, 40)
    ]
    assert peaks[0] == peaks[1]


def test_phases_may_list_their_devices_in_any_order():
    plan, costs = straight(2, 2, [2, 1])
    phase = plan.phases[0]
    backwards = dataclasses.replace(phase, actions=dict(reversed(phase.actions.items())))
    testbed = cluster(2, speeds=(1.0, 4.0))
    same, mixed = (
        simulate(dataclasses.replace(plan, phases=(phase, second)), costs, testbed)
        for second in (dataclasses.replace(phase), backwards)
    )
    assert mixed.busy_s == same.busy_s
    assert mixed.total_s == same.total_s
    assert mixed.peak_bytes == same.peak_bytes


@pytest.mark.parametrize("repeat", [1, 2, 5])
def test_a_live_value_that_is_freed_and_received_anew_does_not_add_up(repeat):
    """A worker pulls the newest weights from a server in every iteration."""
    old, new = Value("w"), Value("w", version=1)
    actions = {
        "device0": (Combine("slice", (old,), new, in_place=True), Send(new, "device1")),
        "device1": (Free((old,)), Recv(new, "device0")),
    }
    live = {"device0": (old,), "device1": (old,)}
    phase = Phase("pull", (), {}, actions, live, repeat=repeat, training=False)
    trace = simulate(Plan("test", 0, {"w": Tensor("weights", 1, 1000)}, (phase,)), chain(1), cluster(2))
    assert trace.peak_bytes == {"device0": 1000, "device1": 1000}
    assert trace.memory_timeline["device1"][-1][1] == 1000


def test_a_result_in_place_keeps_the_memory_of_what_it_replaces():
    a, b, c = Value("x", version=1), Value("x", version=2), Value("x", version=3)
    actions = (Load(a), Load(b), Combine("sum", (a, b), c, in_place=True), Free((b,)), Store(c), Free((c,)))
    phase = Phase("sum", (), {}, {"device0": actions}, {}, training=False)
    trace = simulate(Plan("test", 0, {"x": Tensor("cache", 1, 1000)}, (phase,)), chain(1), cluster(1))
    assert [nbytes for _, nbytes in trace.memory_timeline["device0"]] == [1000, 2000, 1000, 0]


def test_a_waiting_transfer_does_not_hold_a_medium_that_others_could_use():
    """device2 keeps device1's port busy for 10 s; meanwhile the pair 0-1 is free in the other direction."""
    long, short, back = Value("x", version=1, width=(0, 10**7)), Value("x", version=2), Value("x", version=3)
    actions = {
        "device0": (Combine("sum", (), short), Send(short, "device1"), Recv(back, "device1"), Free((short, back))),
        "device1": (
            Combine("sum", (), back),
            Recv(long, "device2"),
            Recv(short, "device0"),
            Send(back, "device0"),
            Free((long, short, back)),
        ),
        "device2": (Combine("sum", (), long), Send(long, "device1"), Free((long,))),
    }
    phase = Phase("swap", (), {}, actions, {}, training=False)
    plan = Plan("test", 0, {"x": Tensor("activations", 1, 10**6)}, (phase,))
    assert simulate(plan, chain(1), cluster(3, duplex="half")).total_s == pytest.approx(11.0)


def test_a_collective_does_not_wait_for_computation_listed_after_it():
    """A ring of 2 s beside 3 s of computation that does not need its result."""
    value, result = Value("g"), Value("g", version=1)
    names = ("device0", "device1")
    actions = {
        name: (
            Combine("sum", (), value),
            Collective("all-reduce", value, result, names),
            Compute((0, 1), "forward", 0, (rank, rank + 1), ()),
            Free((result,)),
        )
        for rank, name in enumerate(names)
    }
    phase = Phase("overlap", (2,), {}, actions, {}, training=False)
    plan = Plan("test", 1, {"g": Tensor("gradients", 1, 10**6, 2)}, (phase,))
    costs = chain(1, forward_flops=3e9, training=False)
    assert simulate(plan, costs, cluster(2, memory_bandwidth=1e12)).total_s == pytest.approx(3.0, abs=1e-4)


def test_memory_traffic_takes_time():
    """A sum reads two and writes one, a concatenation reads and writes."""
    values = [Value("x", version=i) for i in range(4)]
    actions = (
        *(Load(v) for v in values[:2]),
        Combine("sum", tuple(values[:2]), values[2]),
        Combine("concat", (values[2],), values[3]),
        Free(tuple(values)),
    )
    phase = Phase("traffic", (), {}, {"device0": actions}, {}, training=False)
    plan = Plan("test", 0, {"x": Tensor("cache", 1, 10**6)}, (phase,))
    trace = simulate(plan, chain(1), cluster(1, memory_bandwidth=1e6))
    assert trace.busy_s["device0"]["compute"] == pytest.approx(3 + 2)
