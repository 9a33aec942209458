"""Plans that methods make are valid; plans with one thing wrong are rejected, with the reason."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from harness.plan import Collective, Combine, Compute, Free, Phase, Plan, Recv, Send, Step, Tensor, Value
from harness.plan.actions import reads, writes
from harness.plan.graph import InvalidPlan
from harness.plan.validate import validate
from harness.schedules import Pipeline, Stage, micro_batches
from harness.simulator import simulate
from tests.harness.toys import chain, cluster


@st.composite
def pipelines(draw: st.DrawFn, min_devices: int = 1) -> Plan:
    """Random cuts, group sizes, uneven shares, micro-batches, warm-ups and ties."""
    num_layers = draw(st.integers(1, 6))
    num_stages = draw(st.integers(1, num_layers))
    cuts = (
        sorted(draw(st.sets(st.integers(1, num_layers - 1), min_size=num_stages - 1, max_size=num_stages - 1)))
        if num_stages > 1
        else []
    )
    edges = [0, *cuts, num_layers]
    stages, count = [], 0
    for first, last in pairwise(edges):
        size = draw(st.integers(1, 3))
        shares = draw(st.lists(st.integers(1, 4), min_size=size, max_size=size))
        stages.append(Stage((first, last), tuple(f"device{count + i}" for i in range(size)), tuple(shares)))
        count += size
    assume(count >= min_devices)
    costs = chain(num_layers, tied=draw(st.booleans()))
    pipeline = Pipeline(costs, tuple(stages), draw(st.sampled_from(["sgd", "sgd-momentum", "adamw"])))
    batches = micro_batches(draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    warmup = [draw(st.integers(1, 2 * num_stages)) for _ in stages]
    warmup = [max(warmup[p:]) for p in range(num_stages)]  # an earlier stage is never behind a later one
    return Plan("test", num_layers, pipeline.tensors, (pipeline.phase(batches, warmup, repeat=2),))


def check(plan: Plan) -> dict[str, int]:
    return validate(plan, chain(plan.num_units, tied=bool(plan.phases[0].tied)))


def with_actions(plan: Plan, device: str, actions: list) -> Plan:
    phase = plan.phases[0]
    return replace(plan, phases=(replace(phase, actions={**phase.actions, device: tuple(actions)}),))


@given(pipelines())
def test_pipelines_are_valid(plan):
    high = check(plan)
    phase: Phase = plan.phases[0]
    assert all(high[d] >= sum(plan.bytes(v) for v in phase.live[d]) for d in plan.devices)


@given(pipelines(min_devices=2), st.data())
def test_without_one_of_its_actions_a_plan_is_rejected(plan, data):
    device = data.draw(st.sampled_from(plan.devices))
    actions = list(plan.phases[0].actions[device])
    candidates = [i for i, a in enumerate(actions) if isinstance(a, (Send, Recv, Collective, Compute, Free, Step))]
    index = data.draw(st.sampled_from(candidates))
    with pytest.raises(InvalidPlan, match=r"phase 'train'"):
        check(with_actions(plan, device, actions[:index] + actions[index + 1 :]))


@given(pipelines(), st.data())
def test_an_action_before_the_one_it_needs_is_rejected(plan, data):
    device = data.draw(st.sampled_from(plan.devices))
    actions = list(plan.phases[0].actions[device])
    pairs = [(i, j) for j, b in enumerate(actions) for i, a in enumerate(actions[:j]) if set(writes(a)) & set(reads(b))]
    i, j = data.draw(st.sampled_from(pairs))
    actions[i], actions[j] = actions[j], actions[i]
    with pytest.raises(InvalidPlan):
        check(with_actions(plan, device, actions))


@given(pipelines(), st.data())
def test_freeing_twice_is_rejected(plan, data):
    device = data.draw(st.sampled_from(plan.devices))
    actions = list(plan.phases[0].actions[device])
    frees = [i for i, a in enumerate(actions) if isinstance(a, Free)]
    index = data.draw(st.sampled_from(frees))
    with pytest.raises(InvalidPlan, match="freed twice"):
        check(with_actions(plan, device, [*actions[: index + 1], actions[index], *actions[index + 1 :]]))


def two_stages(tied: bool = False, group: int = 1) -> Plan:
    devices = tuple(f"device{i}" for i in range(2 * group))
    stages = (Stage((0, 2), devices[:group], (1,) * group), Stage((2, 4), devices[group:], (1,) * group))
    pipeline = Pipeline(chain(4, tied=tied), stages)
    return Plan("test", 4, pipeline.tensors, (pipeline.phase((2, 2), [2, 1]),))


def mutate(plan: Plan, device: str, change) -> Plan:
    return with_actions(plan, device, [b for a in plan.phases[0].actions[device] for b in change(a)])


def test_a_gradient_that_is_not_summed_over_its_replicas_is_named():
    plan = two_stages(group=2)
    for device in ("device0", "device1"):

        def alone(action):
            match action:
                case Collective():
                    return []
                case Step():
                    return [replace(action, gradients=tuple(g._replace(version=0) for g in action.gradients))]
                case Free(values=values) if any(v.name.startswith("gradients") for v in values):
                    return [Free(tuple(v._replace(version=0) for v in values))]
            return [action]

        plan = mutate(plan, device, alone)
    with pytest.raises(InvalidPlan, match=r"the gradient gradients@0:2 lacks \(\(0, 2\), 0, \(1, 2\)\)"):
        check(plan)


def test_a_tied_weight_needs_the_gradients_of_both_stages():
    plan = two_stages(tied=True)
    assert plan.phases[0].tied == {"gradients:w0": ("device0", "device1")}

    def alone(action):
        match action:
            case Collective(value=Value(name="gradients:w0")):
                return []
            case Step():
                return [replace(action, gradients=tuple(g._replace(version=0) for g in action.gradients))]
            case Free(values=values) if any(v.name.startswith("gradients") for v in values):
                return [Free(tuple(v._replace(version=0) for v in values))]
        return [action]

    with pytest.raises(InvalidPlan, match=r"gradients:w0 is tied over .*device0"):
        check(replaced(plan, tied={"gradients:w0": ("device0",)}))
    plan = mutate(mutate(plan, "device0", alone), "device1", alone)
    with pytest.raises(InvalidPlan, match=r"gradients:w0 lacks \(\(2, 4\), 0, \(0, 2\)\)"):
        check(plan)


def test_rows_computed_by_nobody_are_named():
    plan = two_stages(group=2)
    phase = plan.phases[0]
    shards = {d: replace(s, micro_batch_rows=((0, 1), (0, 1))) for d, s in phase.shards.items()}
    plan = replace(plan, phases=(replace(phase, shards=shards),))
    with pytest.raises(InvalidPlan, match="not what the device's shard declares"):
        check(plan)


def test_a_peer_that_does_not_exist_is_named():
    def elsewhere(action):
        return [replace(action, peer="nobody")] if isinstance(action, Send) else [action]

    with pytest.raises(InvalidPlan, match="the peer nobody is no device of the phase"):
        check(mutate(two_stages(), "device0", elsewhere))


def test_two_devices_that_wait_for_each_other_are_a_deadlock():
    """Each sends what it makes of the other's message."""
    mine, yours = Value("x", version=0), Value("x", version=1)

    def relay(peer: str, arrives: Value, leaves: Value) -> tuple:
        return (Recv(arrives, peer), Combine("concat", (arrives,), leaves), Send(leaves, peer), Free((arrives, leaves)))

    phase = Phase(
        name="relay",
        micro_batches=(),
        shards={},
        actions={"device0": relay("device1", yours, mine), "device1": relay("device0", mine, yours)},
        live={},
        training=False,
    )
    plan = Plan("test", 0, {"x": Tensor("activations", 1, 4)}, (phase,))
    for read in (check, lambda plan: simulate(plan, chain(1), cluster(2))):
        with pytest.raises(InvalidPlan, match="deadlock: 4 actions wait for each other"):
            read(plan)


def replaced(plan: Plan, **fields) -> Plan:
    return replace(plan, phases=(replace(plan.phases[0], **fields),))


def computes(plan: Plan, device: str, direction: str) -> list[int]:
    return [
        i
        for i, action in enumerate(plan.phases[0].actions[device])
        if isinstance(action, Compute) and action.direction == direction
    ]


def test_rows_that_nobody_takes_are_named():
    """Two replicas whose shards agree with what they do, and leave a row out."""
    pipeline = Pipeline(chain(2), (Stage((0, 2), ("device0", "device1"), (1, 1)),))
    phase = pipeline.phase((4,), [1])
    short = Pipeline(chain(2), (Stage((0, 2), ("device0", "device1"), (1, 1)),)).phase((3,), [1])
    plan = Plan("test", 2, pipeline.tensors, (replace(short, micro_batches=phase.micro_batches),))
    with pytest.raises(InvalidPlan, match=r"micro-batch 0: units \(0, 2\): rows 3:4 are missing"):
        check(plan)


def test_a_pass_computed_twice_is_named():
    """The copies write values of their own and add to the gradient again."""
    plan = two_stages()
    actions = list(plan.phases[0].actions["device0"])
    backward = actions[computes(plan, "device0", "backward")[0]]
    again = replace(backward, writes=())
    actions.insert(computes(plan, "device0", "backward")[0] + 1, again)
    with pytest.raises(InvalidPlan, match="computed backward twice"):
        check(with_actions(plan, "device0", actions))


def test_a_value_written_twice_is_named():
    plan = two_stages()
    actions = list(plan.phases[0].actions["device0"])
    first = computes(plan, "device0", "forward")[0]
    with pytest.raises(InvalidPlan, match="is written twice"):
        check(with_actions(plan, "device0", [*actions[: first + 1], actions[first], *actions[first + 1 :]]))


def test_a_gradient_summed_twice_is_named():
    """Added to itself before the step."""
    double = Value("gradients@0:2", version=7)

    def twice(action):
        match action:
            case Step(gradients=(gradient,)):
                return [Combine("sum", (gradient, gradient), double), replace(action, gradients=(double,))]
            case Free(values=values) if any(v.name.startswith("gradients") for v in values):
                return [Free((*values, double))]
        return [action]

    with pytest.raises(InvalidPlan, match=r"gradients@0:2.v7 adds \(\(0, 2\), 0, \(0, 2\)\) twice"):
        check(mutate(two_stages(), "device0", twice))


def test_a_pass_that_ignores_what_it_is_sent_is_named():
    def deaf(direction):
        return lambda a: [replace(a, reads=()) if isinstance(a, Compute) and a.direction == direction else a]

    with pytest.raises(InvalidPlan, match=r"forward of units \(2, 4\), micro-batch 0, does not read h1#0\[r0:2\]"):
        check(mutate(two_stages(), "device1", deaf("forward")))
    with pytest.raises(InvalidPlan, match=r"backward of units .* does not read grad:h1@2#0"):
        check(mutate(two_stages(), "device0", deaf("backward")))


def test_weights_that_are_never_stepped_are_named():
    def lazy(action):
        match action:
            case Step():
                return []
            case Free(values=values) if any(v.name.startswith("gradients") for v in values):
                return [Free(values)]
        return [action]

    with pytest.raises(InvalidPlan, match="0 steps use gradients@0:2, and 1 should"):
        check(mutate(two_stages(), "device0", lazy))


def test_a_step_that_writes_nothing_and_a_round_without_commit_are_named():
    def idle(action):
        return [replace(action, writes=())] if isinstance(action, Step) else [action]

    def endless(action):
        return [] if type(action).__name__ == "Commit" else [action]

    with pytest.raises(InvalidPlan, match="the step must write what it reads"):
        check(mutate(two_stages(), "device0", idle))
    with pytest.raises(InvalidPlan, match="a round of training has one commit"):
        check(mutate(two_stages(), "device1", endless))


def test_a_phase_begins_with_what_the_one_before_leaves():
    costs = chain(4)
    devices = ("device0", "device1")
    halves, thirds = (
        Pipeline(costs, (Stage((0, cut), devices[:1], (1,)), Stage((cut, 4), devices[1:], (1,)))) for cut in (2, 3)
    )
    phases = (halves.phase((2,), [2, 1], "a"), thirds.phase((2,), [2, 1], "b"))
    plan = Plan("test", 4, {**halves.tensors, **thirds.tensors}, phases)
    with pytest.raises(InvalidPlan, match=r"'b': device0 begins with weights@0:3, and phase 'a' leaves weights@0:2"):
        check(plan)


def test_unknown_kinds_and_strangers_are_named():
    def change(**fields):
        return lambda a: [replace(a, **fields)] if isinstance(a, Collective) else [a]

    plan = two_stages(group=2)
    with pytest.raises(InvalidPlan, match="'broadcast' is none of all-reduce"):
        check(mutate(plan, "device0", change(kind="broadcast")))
    with pytest.raises(InvalidPlan, match="ghost of the group is no device"):
        check(mutate(plan, "device0", change(group=("device0", "ghost"))))
    with pytest.raises(InvalidPlan, match="the device has no shard"):
        check(replaced(plan, shards={}))
    average = Phase(
        "p", (), {}, {"device0": (Combine("average", (), Value("x")), Free((Value("x"),)))}, {}, training=False
    )
    with pytest.raises(InvalidPlan, match="'average' is none of sum, concat, slice"):
        validate(Plan("test", 0, {"x": Tensor("activations", 1, 4)}, (average,)), chain(1))
