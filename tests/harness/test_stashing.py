"""Plans with an update per mini-batch: which weights a pass computes with, what is kept, how long a round takes."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines import pipedream, pipedream_async
from harness.errors import OrreryError, OutOfMemory, Unsupported
from harness.plan import Collective, Combine, Compute, Free, Plan, Step, Value
from harness.plan.graph import InvalidPlan
from harness.plan.serial import from_json, to_json
from harness.plan.validate import validate
from harness.schedules import Pipeline, Stage
from harness.simulator import simulate
from harness.stashing import StashingPipeline, rounds
from harness.workload import Workload
from tests.harness.plan.test_validate import mutate, with_actions
from tests.harness.toys import chain, cluster

#: Bytes of the weights of one unit of a chain.
WEIGHTS = 3360
#: Those of the only unit, and their gradient of the first mini-batch.
W, GRADIENT = Value("weights@0:1"), Value("gradients@0:1", 0)


def round_of(
    num_stages: int, batches: tuple[int, ...], tied: bool = False, optimizer: str = "sgd", repeat: int = 1
) -> Plan:
    """One device and one unit per stage, as many mini-batches in flight as there are stages from here to the last."""
    stages = tuple(Stage((p, p + 1), (f"device{p}",), (1,)) for p in range(num_stages))
    pipeline = StashingPipeline(chain(num_stages, tied=tied), stages, optimizer)
    phase = pipeline.phase(batches, [num_stages - p for p in range(num_stages)], repeat=repeat)
    return Plan("test", num_stages, pipeline.tensors, (phase,))


def check(plan: Plan) -> dict[str, int]:
    return validate(plan, chain(plan.num_units, tied=bool(plan.phases[0].tied)))


@st.composite
def stashing(draw: st.DrawFn) -> Plan:
    """Random cuts, groups, uneven shares, mini-batches, numbers in flight and ties."""
    num_layers = draw(st.integers(1, 5))
    cuts = sorted(draw(st.sets(st.integers(1, max(num_layers - 1, 1)), max_size=num_layers - 1)))
    edges = [0, *(cut for cut in cuts if cut < num_layers), num_layers]
    stages, count = [], 0
    for first, last in pairwise(edges):
        shares = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
        stages.append(Stage((first, last), tuple(f"device{count + i}" for i in range(len(shares))), shares))
        count += len(shares)
    tied = draw(st.booleans())
    pipeline = StashingPipeline(chain(num_layers, tied=tied), tuple(stages), draw(st.sampled_from(["sgd", "adamw"])))
    batches = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=7)))
    warmup = [draw(st.integers(1, len(stages) + 1)) for _ in stages]
    warmup = [max(warmup[p:]) for p in range(len(stages))]
    return Plan("test", num_layers, pipeline.tensors, (pipeline.phase(batches, warmup, repeat=2),))


@given(stashing())
def test_plans_are_valid_and_equal_after_a_file(plan: Plan) -> None:
    costs = chain(plan.num_units, tied=bool(plan.phases[0].tied))
    validate(plan, costs)
    assert from_json(to_json(plan)) == plan
    trace = simulate(plan, costs, cluster(len(plan.devices), memory_bandwidth=1e9))
    for device, points in trace.memory_timeline.items():  # all that is left is what was there
        assert points[-1][1] == sum(plan.bytes(value) for value in plan.phases[0].live[device])


@given(stashing(), st.data())
def test_without_one_of_its_actions_a_plan_is_rejected(plan: Plan, data: st.DataObject) -> None:
    device = data.draw(st.sampled_from(plan.devices))
    actions = list(plan.phases[0].actions[device])
    candidates = [i for i, a in enumerate(actions) if not isinstance(a, Combine)]
    index = data.draw(st.sampled_from(candidates))
    with pytest.raises(InvalidPlan, match=r"phase 'train'"):
        check(with_actions(plan, device, actions[:index] + actions[index + 1 :]))


@given(stashing(), st.data())
def test_another_version_of_some_weights_is_rejected(plan: Plan, data: st.DataObject) -> None:
    """In one pass alone: it was never there, is there no more, or its other pass had another one."""
    lists = plan.phases[0].actions
    passes = [(d, i) for d, actions in lists.items() for i, a in enumerate(actions) if isinstance(a, Compute)]
    device, index = data.draw(st.sampled_from(passes))
    actions = list(lists[device])
    action = actions[index]
    some = data.draw(st.sampled_from([v for v in action.weights if v.name.startswith("weights")]))
    other = some._replace(version=some.version + data.draw(st.sampled_from([-2, -1, 1, 2])))
    actions[index] = replace(action, weights=tuple(other if v == some else v for v in action.weights))
    with pytest.raises(InvalidPlan):
        check(with_actions(plan, device, actions))


@pytest.mark.parametrize(("num_stages", "count"), [(1, 4), (2, 6), (4, 9), (4, 3)])
@pytest.mark.parametrize("tied", [False, True])
def test_staleness_of_stage_p_of_P_is_P_1_p_updates(num_stages: int, count: int, tied: bool) -> None:
    """Mini-batch m lacks the updates of as many before it; tied weights are as stale as where they are held first."""
    plan = round_of(num_stages, (1,) * count, tied=tied)
    for p, actions in enumerate(plan.phases[0].actions.values()):
        passes = [a for a in actions if isinstance(a, Compute)]
        assert len(passes) == 2 * count
        for action in passes:
            for value in action.weights:
                held_first = 0 if value.name == "weights:w0" else p
                assert value.version == max(0, action.micro_batch - (num_stages - 1 - held_first)), (p, str(value))


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_stage_p_of_P_keeps_P_p_versions(num_stages: int) -> None:
    plan = round_of(num_stages, (1,) * 9, optimizer="adamw")
    trace = simulate(plan, chain(num_stages), cluster(num_stages, bandwidth=math.inf, memory_bandwidth=1e9))
    for p, device in enumerate(plan.devices):
        assert trace.memory_bytes[device]["weights"] == (num_stages - p) * WEIGHTS
        assert trace.memory_bytes[device]["gradients"] == WEIGHTS
        assert trace.memory_bytes[device]["optimizer"] == 2 * WEIGHTS


@pytest.mark.parametrize(("num_stages", "count", "repeat"), [(1, 3, 2), (2, 1, 1), (3, 8, 2), (4, 16, 3)])
def test_a_round_takes_R_and_P_1_turns(num_stages: int, count: int, repeat: int) -> None:
    """A turn is a pass forward and one backward, 1 s and 2 s. Nothing is lost but the drain between rounds."""
    plan = round_of(num_stages, (1,) * count, repeat=repeat)
    trace = simulate(plan, chain(num_stages), cluster(num_stages, bandwidth=math.inf))
    assert trace.total_s == pytest.approx(repeat * (count + num_stages - 1) * 3, abs=1e-9)


def test_an_update_takes_the_memory_traffic_of_its_copy() -> None:
    """Gradient, weights there and back; where the old ones are kept, a copy there and back on top."""
    rate = 1e9
    plan = round_of(2, (1,) * 4)
    trace = simulate(plan, chain(2), cluster(2, bandwidth=math.inf, memory_bandwidth=rate))
    updates, kept = 4, {"device0": 3, "device1": 0}  # the last one follows the last pass
    for device in plan.devices:
        moved = WEIGHTS * (3 * updates + 2 * kept[device])
        assert trace.busy_s[device]["compute"] == pytest.approx(4 * 3 + moved / rate, abs=1e-11)


def test_one_stage_keeps_nothing() -> None:
    (actions,) = round_of(1, (2, 2, 1)).phases[0].actions.values()
    assert [a.kept for a in actions if isinstance(a, Step)] == [()] * 3


# One thing wrong


def test_the_gradient_of_another_mini_batch_is_named() -> None:
    """Two mini-batches with the first weights, and their gradients added up for one update."""

    def together(action):
        match action:
            case Step(gradients=(Value(micro_batch=0),)) | Free(values=(Value(name="gradients@0:1", micro_batch=0),)):
                return []
            case Step():
                return [replace(action, gradients=(GRADIENT,), reads=(W,), writes=(W._replace(version=1),))]
            case Free(values=(Value(name="gradients@0:1"),)):
                return [Free((GRADIENT,))]
            case Compute(direction="backward"):
                return [replace(action, weights=(W,), accumulates=(GRADIENT,))]
            case Compute():
                return [replace(action, weights=(W,))]
        return [action]

    with pytest.raises(InvalidPlan, match="gradients@0:1#0 is not of mini-batch 0 alone, whose turn it is"):
        check(mutate(round_of(1, (1, 1)), "device0", together))


def test_a_gradient_without_the_rows_of_a_replica_is_named() -> None:
    stages = (Stage((0, 1), ("device0", "device1"), (1, 1)),)
    pipeline = StashingPipeline(chain(1), stages)
    plan = Plan("test", 1, pipeline.tensors, (pipeline.phase((2, 2), [1]),))

    def alone(action):
        match action:
            case Collective():
                return []
            case Step(gradients=(gradient,)):
                return [replace(action, gradients=(gradient._replace(version=0),))]
            case Free(values=(Value(name="gradients@0:1") as gradient,)):
                return [Free((gradient._replace(version=0),))]
        return [action]

    with pytest.raises(InvalidPlan, match=r"gradients@0:1#0 lacks \(\(0, 1\), 0, \(1, 2\)\)"):
        check(mutate(mutate(plan, "device0", alone), "device1", alone))


def test_fewer_updates_than_mini_batches_are_named() -> None:
    def lazy(action):
        return [] if isinstance(action, Step) and action.gradients[0].micro_batch == 1 else [action]

    with pytest.raises(InvalidPlan, match="in the end weights@0:1 lacks the update of mini-batch 1"):
        check(mutate(round_of(1, (1, 1)), "device0", lazy))


def test_an_update_of_other_weights_than_those_of_its_gradients_is_named() -> None:
    def idle(action):
        return [replace(action, gradients=())] if isinstance(action, Step) else [action]

    def keeps(action):
        return [replace(action, kept=(W._replace(version=9),))] if isinstance(action, Step) else [action]

    with pytest.raises(InvalidPlan, match="the step uses gradients@0:1 and does not write its weights, or the reverse"):
        check(mutate(round_of(1, (1,)), "device0", idle))
    with pytest.raises(InvalidPlan, match=r"weights@0:1\.v9 is kept, and is not read"):
        check(mutate(round_of(1, (1,)), "device0", keeps))


def test_weights_that_are_never_let_go_are_named() -> None:
    def hoards(action):
        return [] if isinstance(action, Free) and action.values[0].name == "weights@0:1" else [action]

    with pytest.raises(InvalidPlan, match="device0: weights@0:1 is never freed"):
        check(mutate(round_of(2, (1,) * 4), "device0", hoards))


def test_a_norm_of_gradients_is_refused() -> None:
    """It would be known only when the first stage has its gradients."""
    with pytest.raises(Unsupported, match="clip_norm"):
        StashingPipeline(chain(1), (Stage((0, 1), ("device0",), (1,)),), clip=True)
    plain = Pipeline(chain(1), (Stage((0, 1), ("device0",), (1,)),), clip=True)
    phase = replace(plain.phase((1, 1), [1]), mini_batches=True)
    with pytest.raises(InvalidPlan, match="updated one by one are not clipped by a norm"):
        validate(Plan("test", 1, plain.tensors, (phase,)), chain(1))
    with pytest.raises(Unsupported, match="inference"):
        StashingPipeline(chain(1, training=False), (Stage((0, 1), ("device0",), (1,)),))


# Rounds


@given(
    num_samples=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    epochs=st.integers(1, 3),
    steps=st.one_of(st.none(), st.integers(1, 40)),
    most=st.integers(1, 9),
    first=st.integers(1, 9),
)
def test_rounds_are_all_batches_in_order(num_samples, batch_size, epochs, steps, most, first) -> None:
    """And none has batches of two epochs, so that a run can be resumed after each."""
    workload = Workload("m", "d", num_samples, min(batch_size, num_samples), epochs=epochs, steps=steps)
    found = rounds(workload, most, first)
    each = [size for batches, repeat in found for _ in range(repeat) for size in batches]
    assert each == [size for size, repeat in workload.batches() for _ in range(repeat)]
    assert all(1 <= len(batches) <= most and repeat >= 1 for batches, repeat in found)
    ends, total = set(), 0
    for batches, repeat in found:
        for _ in range(repeat):
            total += sum(batches)
            ends.add(total)
    assert ends >= set(range(num_samples, total + 1, num_samples))
    assert len(found[0][0]) <= first + 1


# The method

WORKLOAD = Workload("toy", "synthetic", num_samples=100, batch_size=4, epochs=2)


def planned(memory_bytes: int = 10**12, **options: object) -> Plan:
    asked = {**pipedream_async.OPTIONS, "planner": False, **options}
    return pipedream_async.plan(WORKLOAD, chain(4), cluster(4, memory_bytes=memory_bytes), asked)


def test_pipedream_async_says_what_it_does() -> None:
    plan = planned(batches_per_flush=10)
    validate(plan, chain(4))
    assert [(phase.micro_batches, phase.repeat) for phase in plan.phases] == [
        ((4,) * 8, 1), ((4,) * 10, 1), ((4,) * 7, 1),
        ((4,) * 10, 2), ((4,) * 5, 1),
    ]  # fmt: skip
    assert plan.summary["staleness"] == [3, 2, 1, 0] and plan.summary["in_flight"] == [4, 3, 2, 1]
    assert plan.summary["layer_cuts"] == [[0, 1], [1, 2], [2, 3], [3, 4]]
    with pytest.raises(OrreryError, match="batches_per_flush is 0; it must be"):
        planned(batches_per_flush=0)


def test_pipedream_async_has_the_stages_of_pipedreams_planner() -> None:
    """Here data parallelism: links are fast."""
    found = planned(planner=True)
    validate(found, chain(4))
    stages = pipedream.stages(WORKLOAD, chain(4), cluster(4), WORKLOAD.batch_size)
    assert found.summary["devices"] == [list(stage.devices) for stage in stages]
    with pytest.raises(OrreryError, match="planner is 'no'"):
        planned(planner="no")


def test_where_memory_is_short_fewer_mini_batches_are_in_flight() -> None:
    """And fewer versions of the weights are kept; where one is too many, it is said what is missing."""
    needs = {}
    for depth in (4, 3, 2, 1):
        stages = [Stage((p, p + 1), (f"device{p}",), (1,)) for p in range(4)]
        pipeline = StashingPipeline(chain(4), tuple(stages))
        warmup = [min(4 - p, depth) for p in range(4)]
        phases = tuple(pipeline.phase(b, warmup, repeat=n) for b, n in rounds(WORKLOAD, most=128, first=8))
        trace = simulate(Plan("test", 4, pipeline.tensors, phases), chain(4), cluster(4))
        needs[depth] = max(trace.peak_bytes.values())
    assert needs[4] > needs[3] > needs[2] > needs[1]
    for depth, most in needs.items():
        assert planned(memory_bytes=most).summary["in_flight"] == [min(4 - p, depth) for p in range(4)]
    with pytest.raises(OutOfMemory):
        planned(memory_bytes=needs[1] - 1)
