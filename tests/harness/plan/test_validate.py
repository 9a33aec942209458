"""Plans that methods make are valid; plans with one thing wrong are rejected, with the reason."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from harness.plan import Collective, Combine, Compute, Free, Phase, Plan, Recv, Send, Step, Tensor, Value
from harness.plan.actions import reads, writes
from harness.plan.flow import InvalidPlan
from harness.plan.validate import validate
from harness.schedules import Pipeline, Stage, micro_batches
from tests.harness.toys import chain


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


def with_actions(plan: Plan, device: str, actions: list) -> Plan:
    phase = plan.phases[0]
    return replace(plan, phases=(replace(phase, actions={**phase.actions, device: tuple(actions)}),))


@given(pipelines())
def test_pipelines_are_valid(plan):
    high = validate(plan)
    phase: Phase = plan.phases[0]
    assert all(high[d] >= sum(plan.bytes(v) for v in phase.live[d]) for d in plan.devices)


@given(pipelines(min_devices=2), st.data())
def test_without_one_of_its_actions_a_plan_is_rejected(plan, data):
    device = data.draw(st.sampled_from(plan.devices))
    actions = list(plan.phases[0].actions[device])
    candidates = [i for i, a in enumerate(actions) if isinstance(a, (Send, Recv, Collective, Compute, Free, Step))]
    index = data.draw(st.sampled_from(candidates))
    with pytest.raises(InvalidPlan, match=r"phase 'train'"):
        validate(with_actions(plan, device, actions[:index] + actions[index + 1 :]))


@given(pipelines(), st.data())
def test_an_action_before_the_one_it_needs_is_rejected(plan, data):
    device = data.draw(st.sampled_from(plan.devices))
    actions = list(plan.phases[0].actions[device])
    pairs = [(i, j) for j, b in enumerate(actions) for i, a in enumerate(actions[:j]) if set(writes(a)) & set(reads(b))]
    i, j = data.draw(st.sampled_from(pairs))
    actions[i], actions[j] = actions[j], actions[i]
    with pytest.raises(InvalidPlan):
        validate(with_actions(plan, device, actions))


@given(pipelines(), st.data())
def test_freeing_twice_is_rejected(plan, data):
    device = data.draw(st.sampled_from(plan.devices))
    actions = list(plan.phases[0].actions[device])
    frees = [i for i, a in enumerate(actions) if isinstance(a, Free)]
    index = data.draw(st.sampled_from(frees))
    with pytest.raises(InvalidPlan, match="freed twice"):
        validate(with_actions(plan, device, [*actions[: index + 1], actions[index], *actions[index + 1 :]]))


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
        validate(plan)


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

    plan = mutate(mutate(plan, "device0", alone), "device1", alone)
    with pytest.raises(InvalidPlan, match=r"gradients:w0 lacks \(\(2, 4\), 0, \(0, 2\)\)"):
        validate(plan)


def test_rows_computed_by_nobody_are_named():
    plan = two_stages(group=2)
    phase = plan.phases[0]
    shards = {d: replace(s, micro_batch_rows=((0, 1), (0, 1))) for d, s in phase.shards.items()}
    plan = replace(plan, phases=(replace(phase, shards=shards),))
    with pytest.raises(InvalidPlan, match="not what the device's shard declares"):
        validate(plan)


def test_a_peer_that_does_not_exist_is_named():
    def elsewhere(action):
        return [replace(action, peer="nobody")] if isinstance(action, Send) else [action]

    with pytest.raises(InvalidPlan, match="the peer nobody is no device of the phase"):
        validate(mutate(two_stages(), "device0", elsewhere))


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
    with pytest.raises(InvalidPlan, match="deadlock: 4 actions wait for each other"):
        validate(Plan("test", 0, {"x": Tensor("activations", 1, 4)}, (phase,)))
