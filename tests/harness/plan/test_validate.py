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
    """Random cuts, group sizes, uneven shares, micro-batches, warm-ups and ties, with clipping or without."""
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
    optimizer = draw(st.sampled_from(["sgd", "sgd-momentum", "adamw"]))
    pipeline = Pipeline(costs, tuple(stages), optimizer, clip=draw(st.booleans()))
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


def two_stages(tied: bool = False, group: int = 1, clip: bool = False) -> Plan:
    devices = tuple(f"device{i}" for i in range(2 * group))
    stages = (Stage((0, 2), devices[:group], (1,) * group), Stage((2, 4), devices[group:], (1,) * group))
    pipeline = Pipeline(chain(4, tied=tied), stages, clip=clip)
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


WIDTH, GROUP = 10, ("device0", "device1", "device2")
H = Value("h")


def ring(kind: str, before: tuple, after: tuple, **fields) -> Plan:
    """Three devices, each with zeros in the width range before[rank], and the collective that leaves after[rank]."""
    actions = {}
    for rank, name in enumerate(GROUP):
        value, result = H._replace(width=before[rank]), H._replace(width=after[rank], version=1)
        stays = (value,) if kind == "all-gather" else ()
        collective = replace(Collective(kind, value, result, GROUP), **fields)
        actions[name] = (Combine("sum", (), value), collective, Free((*stays, result)))
    phase = Phase("ring", (), {}, actions, {}, training=False)
    return Plan("test", 0, {"h": Tensor("activations", 1, WIDTH, 4), "x": Tensor("activations", 1, WIDTH)}, (phase,))


ALL = (None, None, None)
UNEVEN = ((0, 6), (6, 6), (6, 10))


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize(
    ("kind", "before", "after", "peak"),
    [
        # The whole and what arrives; the whole and the share; the whole and the share it is copied from.
        ("all-reduce", ALL, ALL, {1: 40 + 24, 3: 40 + 8}),
        ("reduce-scatter", ALL, UNEVEN, {1: 40 + 24, 3: 40 + 24}),
        ("all-gather", UNEVEN, ALL, {1: 24 + 40, 3: 24 + 40}),
    ],
)
def test_memory_of_collectives_with_uneven_shares(kind, before, after, peak, tiles):
    high = validate(ring(kind, before, after, shares=(6, 0, 4), tiles=tiles), chain(1))
    assert max(high.values()) == peak[tiles]


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("all-reduce", {"shares": (6, 0, 5)}, r"shares are \(6, 0, 5\); allowed is .* 3 members, 10 elements together"),
        ("all-reduce", {"shares": (6, 4)}, r"shares are \(6, 4\); allowed is .* each of the 3 members"),
        ("all-reduce", {"shares": (11, 0, -1)}, r"shares are \(11, 0, -1\); allowed is one of 0 or more"),
        ("all-reduce", {"tiles": 0}, "tiles is 0; allowed is 1 or more"),
        ("all-reduce", {"group": (*GROUP, "device1")}, "device1 is in the group twice"),
        ("all-reduce", {"result": H}, "h is written twice"),
        ("all-reduce", {"result": Value("x", version=1)}, "makes x.v1 of h, and should make h.v1 of h"),
        ("all-reduce", {"result": H._replace(width=(0, 4))}, r"makes h\[w0:4\] of h, and should make h of h"),
        ("reduce-scatter", {"shares": (6, 0, 4)}, r"makes h\[w0:4\].v1 of h, and should make h\[w0:6\].v1 of h"),
        ("all-gather", {"shares": (6, 0, 4)}, r"makes h.v1 of h\[w0:4\], and should make h.v1 of h\[w0:6\]"),
    ],
)
def test_a_collective_that_breaks_a_rule_is_named(kind, fields, message):
    even = ((0, 4), (4, 7), (7, 10))
    before, after = (even if kind == "all-gather" else ALL), (even if kind == "reduce-scatter" else ALL)
    validate(ring(kind, before, after), chain(1))
    with pytest.raises(InvalidPlan, match=f"'ring': device0: collective: .*{message}"):
        validate(ring(kind, before, after, **fields), chain(1))


def test_members_that_cut_differently_are_refused():
    plan = ring("all-reduce", ALL, ALL)
    actions = [replace(a, tiles=2) if isinstance(a, Collective) else a for a in plan.phases[0].actions["device1"]]
    with pytest.raises(InvalidPlan, match=r"receives h\[w.*\].v-1 from .* never sends it|sends .* never receives it"):
        validate(with_actions(plan, "device1", actions), chain(1))


def test_what_a_collective_leaves_must_not_be_there():
    plan = ring("all-gather", ((0, 4), (4, 7), (7, 10)), ALL)
    mine = plan.phases[0].actions["device1"]
    with pytest.raises(InvalidPlan, match=r"device1: collective: h.v1 is written twice"):
        validate(with_actions(plan, "device1", [Combine("sum", (), H._replace(version=1)), *mine]), chain(1))
    scatter = ring("reduce-scatter", ALL, ((0, 4), (4, 7), (7, 10)))
    mine = scatter.phases[0].actions["device1"]
    with pytest.raises(InvalidPlan, match=r"device1: free: h is freed twice"):
        validate(with_actions(scatter, "device1", [*mine, Free((H,))]), chain(1))


def test_gradients_are_followed_through_uneven_all_reduces_and_nothing_else():
    def change(**fields):
        return lambda a: [replace(a, **fields)] if isinstance(a, Collective) else [a]

    plan = two_stages(group=2)
    width = plan.tensors["gradients@0:2"].width
    for device in ("device0", "device1"):
        plan = mutate(plan, device, change(shares=(width, 0), tiles=3))
    check(plan)
    one = Pipeline(chain(1), (Stage((0, 1), ("device0",), (1,)),))
    plan = Plan("test", 1, one.tensors, (one.phase((1,), [1]),))
    scattered = Value("gradients@0:1", width=(0, 840), version=1)

    def scatter(action):
        match action:
            case Step(gradients=(gradient,)):
                collective = Collective("reduce-scatter", gradient, scattered, ("device0",))
                return [collective, replace(action, gradients=(scattered,))]
            case Free(values=values) if any(v.name.startswith("gradients") for v in values):
                return [Free((scattered,))]
        return [action]

    with pytest.raises(InvalidPlan, match=r"reduce-scatter of gradients@0:1: .* followed through an all-reduce only"):
        check(mutate(plan, "device0", scatter))


def test_collectives_of_activations_take_part_in_training():
    """Beside its step, each device scatters and gathers a tensor of its own."""
    plan = two_stages()
    for rank, device in enumerate(plan.devices):
        share = H._replace(width=(5 * rank, 5 * rank + 5), version=1)
        beside = [
            Combine("sum", (), H),
            Collective("reduce-scatter", H, share, plan.devices),
            Collective("all-gather", share, H._replace(version=2), plan.devices),
            Free((share, H._replace(version=2))),
        ]
        plan = with_actions(plan, device, [*beside, *plan.phases[0].actions[device]])
    check(replace(plan, tensors={**plan.tensors, "h": Tensor("activations", 1, WIDTH, 4)}))


NORM, SUMMED = Value("norm"), Value("norm", version=1)


def test_a_step_reads_the_norm_of_every_gradient_once():
    """Replicas and tied copies count on the first device that holds them."""
    plan = two_stages(tied=True, group=2, clip=True)
    check(plan)
    made = {d: a for d in plan.devices for a in plan.phases[0].actions[d] if isinstance(a, Combine) and a.write == NORM}
    counted = {device: (action.op, [str(value) for value in action.reads]) for device, action in made.items()}
    assert counted == {
        "device0": ("square-sum", ["gradients@0:2.v1", "gradients:w0.v1"]),
        "device1": ("sum", []),
        "device2": ("square-sum", ["gradients@2:4.v1"]),
        "device3": ("sum", []),
    }
    assert all(a.norm == SUMMED for d in plan.devices for a in plan.phases[0].actions[d] if isinstance(a, Step))


def counts(*gradients: str):
    """Make the norm of these gradients instead."""
    reads_ = tuple(Value(name, version=1) for name in gradients)
    return lambda a: [replace(a, op="square-sum" if reads_ else "sum", reads=reads_)] if is_norm(a) else [a]


def is_norm(action: object) -> bool:
    return isinstance(action, Combine) and action.write == NORM


def without_norm(action):
    return [replace(action, norm=None)] if isinstance(action, Step) else [action]


@pytest.mark.parametrize(
    ("device", "change", "message"),
    [
        ("device1", counts("gradients@0:2"), r"the norm norm.v1 counts gradients@0:2 2 times, and should 1"),
        ("device2", counts(), r"the norm norm.v1 counts gradients@2:4 0 times, and should 1"),
        ("device2", counts("gradients@2:4", "gradients@2:4"), r"norm.v1 counts gradients@2:4 2 times, and should 1"),
        ("device3", without_norm, r"device3: the step of \(2, 4\) reads no norm, and others do"),
    ],
)
def test_a_norm_that_is_not_that_of_all_gradients_is_refused(device, change, message):
    with pytest.raises(InvalidPlan, match=message):
        check(mutate(two_stages(group=2, clip=True), device, change))


def test_a_norm_that_is_not_summed_over_the_devices_is_refused():
    plan = two_stages(clip=True)

    def alone(action):
        match action:
            case Collective(value=Value(name="norm")):
                return []
            case Step():
                return [replace(action, norm=NORM)]
            case Free(values=(Value(name="norm"),)):
                return [Free((NORM,))]
        return [action]

    for device in plan.devices:
        plan = mutate(plan, device, alone)
    with pytest.raises(InvalidPlan, match=r"device0: the norm norm counts gradients@2:4 0 times, and should 1"):
        check(plan)


def test_a_norm_of_a_part_of_a_gradient_is_refused():
    """Squares of one replica's part, before the sum over the replicas."""
    plan = two_stages(group=2, clip=True)

    def before_the_sum(action):
        if is_norm(action):
            return []
        if isinstance(action, Collective) and action.value.name == "gradients@0:2":
            return [Combine("square-sum", (action.value,), NORM), action]
        return [action]

    with pytest.raises(InvalidPlan, match=r"device0: the gradient gradients@0:2 lacks \(\(0, 2\), 0, \(1, 2\)\)"):
        check(mutate(plan, "device0", before_the_sum))


def test_a_square_sum_is_one_number():
    tensors = {"x": Tensor("buffers", 1, 4), "norm": Tensor("buffers", 1, 1)}
    x = Value("x")

    def squares(write: Value, in_place: bool = False) -> Plan:
        made = Combine("square-sum", (x,), write, in_place)
        free = Free((write,) if in_place else (x, write))
        phase = Phase("p", (), {}, {"device0": (Combine("sum", (), x), made, free)}, {}, training=False)
        return Plan("test", 0, tensors, (phase,))

    assert validate(squares(NORM), chain(1)) == {"device0": 5}
    with pytest.raises(InvalidPlan, match=r"a square-sum writes one number of its own, and x\.v1 has 4 elements"):
        validate(squares(x._replace(version=1)), chain(1))
    with pytest.raises(InvalidPlan, match="and norm has the place of what it reads"):
        validate(squares(NORM, in_place=True), chain(1))
