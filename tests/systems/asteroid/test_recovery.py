"""What Asteroid does about lost devices: who has copies, who takes over, what travels."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import replace
from itertools import pairwise

import pytest

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import Broken, OrreryError
from harness.faults import faults_of
from harness.plan import Plan, Recv, Send
from harness.plan.validate import validate
from harness.recovery import Change, Membership, Resumed, left_over, stages_of
from harness.replication import original, replicated
from harness.schedules import Pipeline, Stage
from harness.simulator import simulate
from harness.workload import Workload
from systems import asteroid
from systems.asteroid.recovery import groups_left, restorers, shifted, topology
from testbeds.simulation.recovery import MESSAGES, run
from tests.harness.toys import chain, cluster

WORKLOAD = Workload("toy", "synthetic", num_samples=80, batch_size=8, steps=25, optimizer="sgd-momentum")
COSTS = chain(6)
#: Two stages of one device, and between them one of two.
STAGES = (
    Stage((0, 2), ("device0",), (2.0,)),
    Stage((2, 4), ("device1", "device2"), (1.0, 1.0)),
    Stage((4, 6), ("device3",), (2.0,)),
)
BOARDS = replace(cluster(4, memory_bandwidth=1e10), latency_s=1e-3)
OPTIONS = {**asteroid.OPTIONS, "micro_batch_size": 2, "replication_period": 4}


def by_hand(
    stages: tuple[Stage, ...] = STAGES, period: int = 4, costs: Costs = COSTS, workload: Workload = WORKLOAD
) -> Plan:
    """The stages with snapshots, without a planner."""
    pipeline = Pipeline(costs, stages, workload.optimizer)
    warmup = [2 * (len(stages) - p) - 1 for p in range(len(stages))]
    phases = tuple(pipeline.phase((2,) * (size // 2), warmup, repeat=count) for size, count in workload.batches())
    plain = Plan("asteroid", len(costs.units), pipeline.tensors, phases)
    return replicated(plain, topology(list(stages)), period)


def rounds(plan: Plan) -> int:
    return sum(phase.repeat for phase in plan.phases if phase.shards)


def without(boards: Cluster, *names: str) -> Cluster:
    return replace(boards, devices=tuple(device for device in boards.devices if device.name not in names))


def test_a_stage_of_one_device_has_its_copy_on_the_next_stage_and_the_last_on_the_first() -> None:
    assert topology(STAGES) == {"device0": "device1", "device3": "device0"}
    assert topology(STAGES[1:2]) == {}


def test_snapshots_are_taken_in_time_and_take_turns() -> None:
    plan = by_hand()
    validate(plan, COSTS)
    names = [phase.name for phase in plan.phases for _ in range(phase.repeat)]
    assert rounds(plan) == 25
    assert "".join({"replicate": "r", "commit": "c", "train": "t"}[name] for name in names) == "rctttt" * 6 + "rct"
    commits = [phase for phase in plan.phases if phase.commits]
    for before, after in pairwise(commits):
        kept = [
            {v.name for v in phase.leaves_of("device1") if v.name.startswith("snapshot")} for phase in (before, after)
        ]
        assert kept[0].isdisjoint(kept[1]) and {*map(original, kept[0])} == {*map(original, kept[1])}


def test_a_snapshot_costs_what_is_trained_and_travels_once_where_there_is_no_other_copy() -> None:
    plan = by_hand()
    trained = {stage.units: 2 * COSTS.weight_bytes(*stage.units)[1] for stage in STAGES}  # with momentum
    trace = simulate(plan, COSTS, BOARDS)
    sent = {phase.comm_bytes for phase in trace.phases if phase.name == "replicate"}
    assert sent == {trained[0, 2] + trained[4, 6]}
    held = {device: trace.memory_bytes[device]["snapshots"] for device in plan.devices}
    own = {"device0": trained[0, 2] + trained[4, 6], "device1": trained[2, 4] + trained[0, 2]}
    own |= {"device2": trained[2, 4], "device3": trained[4, 6]}
    assert held == {device: 2 * nbytes for device, nbytes in own.items()}, "two, while the next one is not whole"


@pytest.mark.parametrize("lost", [("device0",), ("device1",), ("device2",), ("device3",), ("device1", "device2")])
def test_restorers_have_what_nobody_else_has(lost: tuple[str, ...]) -> None:
    change = Change(lost, by_hand(), 4, 1, BOARDS)
    gone = {stage.units for stage in STAGES if set(stage.devices) <= set(lost)}
    if len(lost) == 2:
        with pytest.raises(Broken, match=r"every copy of what units 2 to 4.*of round 4"):
            restorers(STAGES, change)
        return
    found = restorers(STAGES, change)
    assert found.keys() == gone
    for units, backup in found.items():
        mine = {original(value.name) for value in change.standing[backup]}
        assert f"weights@{units[0]}:{units[1]}" in mine and f"optimizer@{units[0]}:{units[1]}" in mine


def test_without_the_only_copy_there_is_a_clear_end() -> None:
    with pytest.raises(Broken, match=r"device0 and device1 had the only copy of what units 0 to 2 .* of round 8"):
        restorers(STAGES, Change(("device0", "device1"), by_hand(), 8, 1, BOARDS))


def test_groups_that_are_left_keep_their_balance() -> None:
    speed = {"device0": 4.0, "device1": 1.0, "device2": 3.0, "device3": 2.0}
    work = [10.0, 8.0, 6.0]
    assert groups_left(STAGES, ("device2",), speed, speed, work) == [
        (("device0",), 10.0),
        (("device1",), 8.0 * 1 / 4),
        (("device3",), 6.0),
    ]
    taken_over = groups_left(STAGES, ("device0",), speed, speed, work)  # by the one of two that has its copy
    assert taken_over == [(("device1",), 10.0 * 1 / 4), (("device2",), 8.0 * 3 / 4), (("device3",), 6.0)]
    merged = groups_left(STAGES, ("device3",), speed, speed, work)  # its copy is on a stage of one device
    assert merged == [(("device0",), 10.0), (("device1", "device2"), (8.0 + 6.0) * 4 / 6)]
    slower = groups_left(STAGES, (), speed, {**speed, "device2": 1.0}, work)
    assert slower == [(("device0",), 10.0), (("device1", "device2"), 8.0 * 2 / 4), (("device3",), 6.0)]


def test_layers_are_shifted_as_near_to_the_proportions_as_they_allow() -> None:
    even = [float(layer) for layer in range(13)]
    assert shifted(even, [1, 1, 1]) == [(0, 4), (4, 8), (8, 12)]
    assert shifted(even, [4, 1, 1]) == [(0, 8), (8, 10), (10, 12)]
    assert shifted(even, [1000, 1, 1]) == [(0, 10), (10, 11), (11, 12)], "everybody has a layer"
    assert shifted([0, 0, 8, 9, 10], [1, 1]) == [(0, 2), (2, 4)]


def plans() -> Iterator[tuple[Plan, Costs, Cluster]]:
    """Random stages over random boards."""
    for seed in range(12):
        draw = random.Random(seed)
        count = draw.randint(2, 6)
        speeds = tuple(draw.choice((1.0, 2.0, 4.0)) for _ in range(count))
        boards = replace(cluster(count, speeds=speeds, memory_bandwidth=1e10), latency_s=1e-3)
        costs = chain(8, tied=draw.random() < 0.5)
        yield asteroid.plan(WORKLOAD, costs, boards, OPTIONS), costs, boards


def lacking(plan: Plan, phase_number: int, bytes_of: Mapping[str, int]) -> Counter[str]:
    """Bytes that the devices end the phase with and have not begun it with."""
    phase, found = plan.phases[phase_number], Counter[str]()
    for device in plan.devices:
        had = {value.name for value in phase.live[device]}
        found[device] = sum(bytes_of[v.name] for v in phase.leaves_of(device) if v.name not in had)
    return found


@pytest.mark.parametrize(
    ("recovery", "collector"), [("lightweight", "fullest"), ("heavy", "fullest"), ("heavy", "first")]
)
def test_after_any_loss_what_is_left_is_trained_and_only_what_is_lacking_travels(recovery: str, collector: str) -> None:
    options = {**OPTIONS, "recovery": recovery, "collector": collector}
    lost = 0
    for plan, costs, boards in plans():
        for device in boards.names:
            stages = stages_of(plan)
            change = Change((device,), plan, 8, 1, boards)
            try:
                restorers(stages, change)
            except Broken:
                assert len(stages) == 1 and len(boards.devices) == 1
                continue
            lost += 1
            left = without(boards, device)
            found = asteroid.replan(WORKLOAD, costs, left, options, change)
            assert found is not None
            validate(found.plan, costs)
            assert rounds(found.plan) == WORKLOAD.steps - 8
            assert set(found.plan.devices) == set(boards.names) - {device}
            trace = simulate(found.plan, costs, left)
            sizes = {
                name: tensor.width * tensor.itemsize + tensor.fixed_bytes for name, tensor in found.plan.tensors.items()
            }
            for number, phase in enumerate(found.plan.phases):
                if phase.shards:
                    break
                assert trace.phases[number].comm_bytes == sum(lacking(found.plan, number, sizes).values())
                senders = {d for d in plan.devices for a in phase.actions.get(d, ()) if isinstance(a, Send)}
                receivers = {d for d in plan.devices for a in phase.actions.get(d, ()) if isinstance(a, Recv)}
                if phase.name == "collect":
                    assert len(receivers) <= 1
                    assert collector == "fullest" or receivers <= {left.names[0]}
                if phase.name == "redistribute":
                    assert len(senders) <= 1
    assert lost > 20


def test_rounds_that_are_left() -> None:
    uneven = Workload("toy", "synthetic", num_samples=20, batch_size=8, epochs=2)
    assert uneven.batches() == [(8, 2), (4, 1), (8, 2), (4, 1)]
    assert left_over(uneven, 0) == uneven.batches()
    assert left_over(uneven, 1) == [(8, 1), (4, 1), (8, 2), (4, 1)]
    assert left_over(uneven, 4) == [(8, 1), (4, 1)]
    assert left_over(uneven, 6) == []


def replan(boards: Cluster, change: Change) -> Resumed | None:
    return asteroid.replan(WORKLOAD, COSTS, boards, OPTIONS, change)


def test_a_second_loss_goes_back_to_the_last_snapshot_whoever_took_it() -> None:
    members, first = Membership(BOARDS), by_hand()
    change = members.lost("device1", first, 0, 8)
    assert change == Change(("device1",), first, 8, 1, BOARDS)
    second = replan(members.cluster, change)
    assert second is not None
    before_any = copy(members).lost("device2", second.plan, 8, None)
    assert before_any == Change(("device1", "device2"), first, 8, 2, BOARDS)
    after_one = members.lost("device2", second.plan, 8, 12)
    assert after_one == Change(("device2",), second.plan, 12, 2, without(BOARDS, "device1"), 8)
    third = replan(members.cluster, after_one)
    assert third is not None
    validate(third.plan, COSTS)
    assert rounds(third.plan) == WORKLOAD.steps - 12


def test_virtual_time_of_a_recovery_is_the_sum_of_its_parts() -> None:
    plan = by_hand()
    whole = simulate(plan, COSTS, BOARDS)
    per_round = next(p for p in whole.phases if p.name == "train").iteration_s[-1]
    for kind, detect_s in (("crash", BOARDS.latency_s), ("hang", 2.0), ("cut", 2.0)):
        faults = faults_of(f"{kind} device0 at step 6 during backward", BOARDS.names)
        trace, (found,), total_s = run(plan, COSTS, BOARDS, faults, replan, heartbeat_timeout_s=2.0)
        assert (found["in_round"], found["back_to_round"]) == (6, 4)
        assert found["detect_s"] == pytest.approx(detect_s) and found["regroup_s"] == MESSAGES * BOARDS.latency_s
        struck_s = total_s - detect_s - found["regroup_s"] - trace.total_s
        assert 6 * per_round < struck_s < whole.total_s
        assert found["throughput_before_samples_per_s"] == pytest.approx(6 * 8 / struck_s)
        took = found["transfer_s"] + found["replay_s"] + found["first_step_s"]
        after = (25 - 4 - 3) * 8 / (trace.total_s - took)
        assert found["throughput_after_samples_per_s"] == pytest.approx(after)
        assert found["replay_s"] == pytest.approx(2 * found["first_step_s"], rel=0.2)


@pytest.mark.parametrize("text", ["leave device2 at step 5", "leave device0 at step 6"])
def test_one_that_leaves_stays_until_the_next_snapshot_and_no_round_is_done_again(text: str) -> None:
    trace, (found,), total_s = run(by_hand(), COSTS, BOARDS, faults_of(text, BOARDS.names), replan, 3.0)
    assert (found["in_round"], found["back_to_round"], found["detect_s"], found["replay_s"]) == (8, 8, 0, 0)
    assert text.split()[1] not in trace.devices
    assert sum(phase.repeat for phase in trace.phases if phase.name == "train") == 25 - 8
    assert total_s > trace.total_s


def test_one_that_joins_gets_its_part_at_the_next_snapshot() -> None:
    members = Membership(BOARDS, ["device3"])
    plan = asteroid.plan(WORKLOAD, COSTS, members.cluster, OPTIONS)
    assert "device3" not in plan.devices
    trace, (found,), _ = run(plan, COSTS, BOARDS, faults_of("join device3 at step 3", BOARDS.names), replan, 3.0)
    assert (found["in_round"], found["back_to_round"], found["replay_s"]) == (4, 4, 0)
    assert set(trace.devices) == set(BOARDS.names) and found["moved_bytes"] > 0
    assert found["throughput_after_samples_per_s"] > found["throughput_before_samples_per_s"]


def test_one_that_joined_is_lost_before_the_next_snapshot() -> None:
    members = Membership(BOARDS, ["device3"])
    plan = asteroid.plan(WORKLOAD, COSTS, members.cluster, OPTIONS)
    for lost in ("device1", "device3"):
        faults = faults_of(f"join device3 at step 3; crash {lost} at step 6", BOARDS.names)
        trace, (_, found), _ = run(plan, COSTS, BOARDS, faults, replan, 3.0)
        assert found["back_to_round"] == 4
        assert set(trace.devices) == set(BOARDS.names) - {lost}


def test_a_straggler_gets_less_to_do_at_the_next_snapshot_if_that_is_wanted() -> None:
    plan, faults = by_hand(), faults_of("slow 3x device2 at step 5", BOARDS.names)
    watching = {**OPTIONS, "straggler": 1.5}

    def watched(boards: Cluster, change: Change) -> Resumed | None:
        return asteroid.replan(WORKLOAD, COSTS, boards, watching, change)

    undisturbed = simulate(plan, COSTS, BOARDS).total_s
    _, left_alone, alone_s = run(plan, COSTS, BOARDS, faults, replan, 3.0)
    trace, (found,), total_s = run(plan, COSTS, BOARDS, faults, watched, 3.0)
    assert not left_alone and undisturbed < total_s < alone_s
    assert (found["in_round"], found["back_to_round"], found["device"]) == (5, 8, "device2")
    slow_round = (alone_s - undisturbed) / (25 - 5)
    assert found["detect_s"] > 3 * slow_round
    assert trace.busy_s["device2"]["compute"] < trace.busy_s["device1"]["compute"] * 3
    assert set(trace.devices) == set(BOARDS.names)
    barely = faults_of("slow 1.3x device2 at step 5", BOARDS.names)
    assert not run(plan, COSTS, BOARDS, barely, watched, 3.0)[1], "less than what was asked for"


def test_for_a_straggler_there_may_be_another_number_of_stages() -> None:
    faults = faults_of("slow 9x device3 at step 5", BOARDS.names)
    watching = {**OPTIONS, "straggler": 1.5, "recovery": "heavy", "stages": 2}

    def watched(boards: Cluster, change: Change) -> Resumed | None:
        return asteroid.replan(WORKLOAD, COSTS, boards, watching, change)

    trace, (found,), _ = run(by_hand(), COSTS, BOARDS, faults, watched, 3.0)  # it has three
    assert (found["in_round"], found["back_to_round"]) == (5, 8)
    assert set(trace.devices) == set(BOARDS.names)


def test_what_never_happens_is_refused() -> None:
    never = ("crash device0 at step 25", "crash device0 at step 3 during all-reduce", "leave device0 at step 25")
    for text in never:
        with pytest.raises(OrreryError, match="never strikes"):
            run(by_hand(), COSTS, BOARDS, faults_of(text, BOARDS.names), replan, 3.0)


def test_options_are_checked() -> None:
    for options, reason in (
        ({"replication_period": 0}, "replication_period is 0"),
        ({"recovery": "magic"}, "magic"),
        ({"straggler": 0.5}, "straggler is 0.5"),
        ({"collector": "last"}, "last"),
    ):
        with pytest.raises(OrreryError, match=reason):
            asteroid.plan(WORKLOAD, COSTS, BOARDS, {**OPTIONS, **options})
