"""Cuts against brute force, shares, and the search under a memory budget."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines import dapple, eco_fl, eddl, gpipe, pipedream, pipedream_1f1b, standalone
from harness import profile
from harness.costs import BACKWARD, FORWARD
from harness.errors import OrreryError, OutOfMemory, Unsupported
from harness.plan import Collective, Combine, Free, Step, Tensor, Value
from harness.plan.serial import to_json
from harness.plan.validate import validate
from harness.schedules import Pipeline, Stage, micro_batches, one_f_one_b, split
from harness.search import (
    LAYERS,
    MEAN_TIME,
    balanced_cuts,
    fastest,
    least_seconds,
    micro_batch_sizes,
    overflow,
    plan_pipeline,
    weighted_seconds,
)
from harness.simulator import estimate, simulate
from harness.workload import Workload
from testbeds import library
from tests.harness.toys import chain, cluster

WORKLOAD = Workload("toy", "toy", num_samples=32, batch_size=16)


def weighing(work):
    """Layers whose forward passes take `work` seconds per row."""
    costs = chain(len(work))
    units = [
        dataclasses.replace(unit, forward=unit.forward._replace(matmul=unit.forward.matmul._replace(per_row=w * 1e9)))
        for unit, w in zip(costs.units, work, strict=True)
    ]
    return dataclasses.replace(costs, units=tuple(units))


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=7),
    st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=1, max_size=4),
)
def test_balanced_cuts_equal_brute_force(work, speeds):
    costs = weighing(work)
    testbed = cluster(len(speeds), speeds=tuple(speeds))

    def slowest(edges):
        return max(
            sum(costs.seconds(device, a, b, d, 1) for d in (FORWARD, BACKWARD))
            for device, a, b in zip(testbed.devices, edges, edges[1:], strict=False)
        )

    if len(work) < len(speeds):
        with pytest.raises(Unsupported, match="need as many layers"):
            balanced_cuts(costs, testbed, testbed.names, 1)
        return
    cuts = balanced_cuts(costs, testbed, testbed.names, 1)
    inner = itertools.combinations(range(1, len(work)), len(speeds) - 1)
    best = min(slowest([0, *middle, len(work)]) for middle in inner)
    assert slowest([0, *(b for _, b in cuts)]) == pytest.approx(best)


@given(st.integers(2, 9), st.integers(1, 4), st.booleans(), st.booleans())
def test_cuts_by_layers_count_neither_embedding_nor_head(layers, devices, embedded, headed):
    """The stage of most layers has as few as can be; the embedding goes with the first of them, the head with the last.

    By time the slow embedding would be a stage of its own.
    """
    costs = chain(layers + embedded + headed)
    kinds = ["embedding"] * embedded + ["mlp"] * layers + ["head"] * headed
    units = [dataclasses.replace(unit, kind=kind) for unit, kind in zip(costs.units, kinds, strict=True)]
    if embedded:
        slow = units[0].forward._replace(matmul=units[0].forward.matmul._replace(per_row=1e12))
        units[0] = dataclasses.replace(units[0], forward=slow)
    costs, testbed = dataclasses.replace(costs, units=tuple(units)), cluster(devices)
    if layers < devices:
        with pytest.raises(Unsupported, match=f"the model has {layers}"):
            balanced_cuts(costs, testbed, testbed.names, 1, by=LAYERS)
        return
    cuts = balanced_cuts(costs, testbed, testbed.names, 1, by=LAYERS)
    assert [first for first, _ in cuts] == [0, *(last for _, last in cuts[:-1])] and cuts[-1][1] == len(units)
    counts = [kinds[first:last].count("mlp") for first, last in cuts]
    assert min(counts) >= 1 and max(counts) == -(-layers // devices)


@given(st.lists(st.integers(1, 9), min_size=3, max_size=7), st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=3))
def test_cuts_by_mean_time_take_devices_to_be_equal(work, speeds):
    """The slowest of equal devices is as fast with them as with its own, whatever the speeds that they are made for."""
    costs = weighing(work)
    equal, unequal = cluster(3), cluster(3, speeds=tuple(speeds[:3]))
    blind, own = (
        balanced_cuts(costs, unequal, unequal.names, 1, by=MEAN_TIME),
        balanced_cuts(costs, equal, equal.names, 1),
    )
    slowest = [max(sum(work[a:b]) + 2 * (b - a) for a, b in cuts) for cuts in (blind, own)]
    assert slowest[0] == slowest[1]


@pytest.mark.parametrize("method", [gpipe, eco_fl])
def test_equally_many_layers_of_an_encoder_and_a_decoder(method):
    """T5-Base on eight devices: three layers each, an embedding with the first of either stack, the head at the end."""
    workload = Workload("t5-base", "mrpc", num_samples=32, batch_size=16, technique="parallel-adapters")
    costs, nanos = profile.count(workload, "gpu"), library.load("pac-nano-8").cluster
    plan = method.plan(workload, costs, nanos, {**method.OPTIONS, "cuts": "layers", "micro_batch_size": 16})
    starts = [first for first, _ in plan.summary["layer_cuts"]]
    assert starts == [0, 4, 7, 10, 13, 17, 20, 23] and plan.summary["layer_cuts"][-1][1] == len(costs.layers)
    with pytest.raises(OrreryError, match="no way to cut the model called 'layer'"):
        method.plan(workload, costs, nanos, {**method.OPTIONS, "cuts": "layer"})


@given(st.integers(0, 100), st.lists(st.floats(0.01, 10), min_size=1, max_size=9))
def test_shares_sum_and_are_within_one_of_the_proportion(total, shares):
    counts = split(total, shares)
    assert sum(counts) == total
    assert all(abs(c - total * s / sum(shares)) < 1 + 1e-9 for c, s in zip(counts, shares, strict=True))


@given(st.integers(1, 12), st.integers(1, 12))
def test_one_f_one_b_runs_each_pass_once_and_keeps_the_warm_up_count_in_flight(warmup, count):
    order = list(one_f_one_b(warmup, count))
    assert [m for d, m in order if d == FORWARD] == [m for d, m in order if d == BACKWARD] == list(range(count))
    flight = list(itertools.accumulate(1 if d == FORWARD else -1 for d, _ in order))
    assert max(flight) == min(warmup, count) and flight[-1] == 0


def test_micro_batches_take_what_is_left():
    assert micro_batches(16, 4) == (4, 4, 4, 4)
    assert micro_batches(10, 4) == (4, 4, 2)
    with pytest.raises(OrreryError, match="at least 1"):
        micro_batches(4, 0)


@pytest.mark.parametrize("method", [standalone, eddl, gpipe, pipedream_1f1b, pipedream, dapple])
def test_a_tight_budget_gives_smaller_micro_batches_and_then_out_of_memory(method):
    costs = chain(8, parameters=10)
    roomy = cluster(4)
    plan = method.plan(WORKLOAD, costs, roomy, {**method.OPTIONS, "micro_batch_size": 16})
    need = max(simulate(plan, costs, roomy).peak_bytes.values())
    tight = cluster(4, memory_bytes=need - 1)
    smaller = method.plan(WORKLOAD, costs, tight, method.OPTIONS)
    assert overflow(simulate(smaller, costs, tight), tight) is None
    assert smaller.summary["micro_batch_size"] < 16
    with pytest.raises(OutOfMemory, match=r"device\d needs .* MiB missing"):
        method.plan(WORKLOAD, costs, cluster(4, memory_bytes=100), method.OPTIONS)


@pytest.mark.parametrize("method", [standalone, eddl, gpipe, pipedream_1f1b, pipedream, dapple])
def test_every_method_clips_where_the_workload_says_so(method):
    """And is otherwise the same plan: the norm, its ring, and what reads and frees it are all that is added."""
    costs, testbed = chain(8), cluster(4)
    options = {**method.OPTIONS, "micro_batch_size": 4}
    plain = method.plan(WORKLOAD, costs, testbed, options)
    clipped = method.plan(dataclasses.replace(WORKLOAD, clip_norm=1.0), costs, testbed, options)
    validate(clipped, costs)
    assert "norm" not in to_json(plain)
    assert clipped.tensors == {**plain.tensors, "norm": Tensor("buffers", 1, 1, 4)}

    def of_the_norm(action):
        match action:
            case Combine(write=Value(name="norm")) | Collective(value=Value(name="norm")):
                return True
            case Free(values=(Value(name="norm"),)):
                return True
        return False

    for before, after in zip(plain.phases, clipped.phases, strict=True):
        for device, actions in after.actions.items():
            assert all(action.norm is not None for action in actions if isinstance(action, Step))
            rest = [a for a in actions if not of_the_norm(a)]
            rest = [dataclasses.replace(a, norm=None) if isinstance(a, Step) else a for a in rest]
            assert tuple(rest) == before.actions[device]
    serving = chain(8, training=False)
    asked = dataclasses.replace(WORKLOAD, technique="inference", clip_norm=1.0)
    assert "norm" not in to_json(method.plan(asked, serving, testbed, options))


def test_eddl_shares_rows_by_speed_on_request():
    costs, testbed = chain(4), cluster(2, speeds=(1.0, 3.0))
    equal = eddl.plan(WORKLOAD, costs, testbed, eddl.OPTIONS)
    fast = eddl.plan(WORKLOAD, costs, testbed, {**eddl.OPTIONS, "shares": "speed"})
    assert equal.summary["rows"] == [[8, 8]]
    assert fast.summary["rows"] == [[4, 12]]
    assert simulate(fast, costs, testbed).total_s < simulate(equal, costs, testbed).total_s
    with pytest.raises(OrreryError, match="speed"):
        eddl.plan(WORKLOAD, costs, testbed, {**eddl.OPTIONS, "shares": "sped"})


def test_a_micro_batch_larger_than_the_batch_is_refused():
    with pytest.raises(OrreryError, match="from 1 to 16"):
        standalone.plan(WORKLOAD, chain(2), cluster(1), {"micro_batch_size": 17})


@given(
    st.lists(st.integers(1, 9), min_size=3, max_size=7),
    st.lists(st.integers(1, 12), min_size=2, max_size=3),
)
def test_cuts_under_a_memory_budget_equal_brute_force(work, budgets):
    """Each layer weighs as much as it computes; a device holds `budget` of that."""
    costs = weighing(work)
    testbed = cluster(len(budgets))
    boards = tuple(dataclasses.replace(d, memory_bytes=b) for d, b in zip(testbed.devices, budgets, strict=True))
    testbed = dataclasses.replace(testbed, devices=boards)

    def slowest(edges):
        stages = list(itertools.pairwise(edges))
        if any(sum(work[a:b]) > budget for (a, b), budget in zip(stages, budgets, strict=True)):
            return float("inf")
        return max(
            costs.seconds(boards[0], a, b, FORWARD, 1) + costs.seconds(boards[0], a, b, BACKWARD, 1) for a, b in stages
        )

    cuts = balanced_cuts(costs, testbed, testbed.names, 1, lambda stage, first, last: sum(work[first:last]))
    inner = itertools.combinations(range(1, len(work)), len(budgets) - 1)
    best = min(slowest([0, *middle, len(work)]) for middle in inner)
    if best == float("inf"):
        assert cuts is None
    else:
        assert slowest([0, *(b for _, b in cuts)]) == pytest.approx(best)


@st.composite
def searches(draw: st.DrawFn):
    """What `plan_pipeline` is given: any stages, shares and warm-ups, on any devices and links."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    shares = [tuple(draw(st.lists(st.integers(1, 4), min_size=size, max_size=size))) for size in sizes]
    testbed = cluster(
        sum(sizes),
        bandwidth=draw(st.sampled_from([1e2, 1e4, 1e9])),
        latency_s=draw(st.sampled_from([0.0, 1e-3, 3.0])),
        duplex=draw(st.sampled_from(["full", "half", "shared"])),
        memory_bandwidth=draw(st.sampled_from([1e3, 1e6])),
        speeds=tuple(draw(st.lists(st.sampled_from([0.3, 1.0, 5.0]), min_size=sum(sizes), max_size=sum(sizes)))),
    )
    overhead = draw(st.sampled_from([0.0, 0.7]))
    testbed = dataclasses.replace(
        testbed, devices=tuple(dataclasses.replace(d, kernel_overhead_s=overhead) for d in testbed.devices)
    )
    costs = chain(len(sizes), parameters=draw(st.sampled_from([0, 84, 840])) + 6, tied=draw(st.booleans()))
    one = costs.units[0].forward._replace(kernels=costs.units[0].forward.matmul._replace(fixed=1.0, per_row=0.0))
    costs = dataclasses.replace(
        costs, units=tuple(dataclasses.replace(unit, forward=one, backward=one) for unit in costs.units)
    )
    edges = [0, *itertools.accumulate(sizes)]
    stages = [
        Stage((p, p + 1), testbed.names[edges[p] : edges[p + 1]], tuple(map(float, share)))
        for p, share in enumerate(shares)
    ]
    warmup = sorted(draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes))), reverse=True)
    batch = draw(st.integers(1, 12))
    samples = batch * draw(st.integers(1, 4)) + draw(st.integers(0, batch - 1))
    clip = draw(st.sampled_from([None, 1.0]))
    epochs = draw(st.integers(1, 2))
    load = Workload("toy", "toy", num_samples=samples, batch_size=batch, epochs=epochs, clip_norm=clip)
    return load, costs, testbed, stages, lambda count: warmup


@given(searches())
def test_no_plan_is_faster_than_its_bound_and_the_search_finds_the_fastest(asked):
    load, costs, testbed, stages, warmup = asked
    pipeline = Pipeline(costs, tuple(stages), clip=load.clip_norm is not None)

    def made(option):
        return plan_pipeline("toy", load, costs, testbed, lambda _: (stages, warmup), {"micro_batch_size": option})

    def seconds(plan):
        return weighted_seconds(plan, estimate(plan, costs, testbed))

    found = [made(size) for size in micro_batch_sizes(load.batch_size)]
    for plan in found:
        size = plan.summary["micro_batch_size"]
        assert least_seconds(pipeline, load, size, warmup, testbed) <= seconds(plan)
    best = fastest([lambda plan=plan: plan for plan in found], costs, testbed)
    assert made(None).summary["micro_batch_size"] == best.summary["micro_batch_size"]


def test_a_bound_is_the_time_of_a_device_alone_but_for_its_update():
    costs, testbed = chain(1), cluster(1)
    pipeline = Pipeline(costs, (Stage((0, 1), testbed.names, (1.0,)),))
    assert least_seconds(pipeline, WORKLOAD, 4, lambda _: [1], testbed) == pytest.approx(2 * 16 * 3)
