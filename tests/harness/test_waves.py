"""Plans of virtual workers: which updates a mini-batch is computed with, and what is pushed and pulled."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines import hetpipe
from harness.errors import OrreryError, OutOfMemory, Unsupported
from harness.plan import Combine, Plan
from harness.plan.graph import InvalidPlan
from harness.plan.serial import from_json, to_json
from harness.plan.updates import follow_updates
from harness.plan.validate import validate
from harness.schedules import Stage
from harness.simulator import simulate
from harness.stashing import rounds
from harness.waves import Waves
from harness.workload import Workload
from tests.harness.plan.test_validate import mutate, with_actions
from tests.harness.toys import chain, cluster

#: Bytes of the weights of one unit of a chain.
WEIGHTS = 3360


def waves(cuts: list[list[int]], num_units: int, wave: int, distance: int, tied: bool = False) -> Waves:
    """A virtual worker for each list of cuts, on device0, device1 and so on."""
    workers, count = [], 0
    for inner in cuts:
        stages = []
        for units in pairwise([0, *inner, num_units]):
            stages.append(Stage(units, (f"device{count}",), (1,)))
            count += 1
        workers.append(tuple(stages))
    return Waves(chain(num_units, tied=tied), tuple(workers), wave, distance)


def round_of(made: Waves, count: int, repeat: int = 1) -> Plan:
    phase = made.phase((2,) * count, repeat=repeat)
    return Plan("test", len(made.costs.units), made.tensors, (phase,))


def updates_before(m: int, count: int, workers: int, wave: int, distance: int) -> set[int]:
    """The mini-batches whose updates are in the weights of mini-batch m of a round of `count`, dealt to the workers.

    Of one's own all up to a wave before; of all workers the waves up to `distance` before the last of one's own that is
    over, as far as another one follows.
    """
    own, number = divmod(m, workers)
    found = {j * workers + number for j in range(own - wave + 1)}
    num_waves = math.ceil(len(range(0, count, workers)) / wave)
    over = min((own + 1) // wave - 2, num_waves - 2)  # the last wave that was over when m began
    pulled = over - distance
    return found | set(range(min((pulled + 1) * wave * workers, count) if pulled >= 0 else 0))


@st.composite
def virtual_workers(draw: st.DrawFn) -> tuple[Waves, int]:
    """Random workers, cuts, waves, distances and ties, and a number of mini-batches."""
    num_units = draw(st.integers(1, 4))
    inner = st.sets(st.integers(1, max(num_units - 1, 1)), max_size=num_units - 1).map(
        lambda cuts: sorted(cut for cut in cuts if cut < num_units)
    )
    cuts = draw(st.lists(inner, min_size=1, max_size=3))
    made = waves(cuts, num_units, draw(st.integers(1, 4)), draw(st.integers(0, 3)), draw(st.booleans()))
    return made, draw(st.integers(1, 25))


@settings(max_examples=60)
@given(virtual_workers())
def test_every_mini_batch_has_the_updates_that_are_due(case: tuple[Waves, int]) -> None:
    made, count = case
    plan = round_of(made, count, repeat=2)
    validate(plan, made.costs)
    assert from_json(to_json(plan)) == plan
    computed = follow_updates(plan.phases[0], plan)
    workers, wave, distance = len(made.workers), made.wave, made.distance
    stages = {m: len(made.workers[m % workers]) for m in range(count)}
    assert len(computed) == sum(stages.values())
    for (device, m), weights in computed.items():
        assert any(device == stage.devices[0] for stage in made.workers[m % workers])
        due = updates_before(m, count, workers, wave, distance)
        assert set(weights.values()) == {sum(1 << j for j in due)}, (device, m)
        # The bound of the paper: s_global = (D + 1)(s_local + 1) + s_local - 1 of one's own turns.
        bound = (distance + 1) * wave + wave - 2
        assert {j for j in range(count) if j // workers < m // workers - bound} <= due
    trace = simulate(plan, made.costs, cluster(len(plan.devices), memory_bandwidth=1e9))
    for device, points in trace.memory_timeline.items():  # all that is left is what was there
        assert points[-1][1] == sum(plan.bytes(value) for value in plan.phases[0].live[device])


@settings(max_examples=60)
@given(virtual_workers(), st.data())
def test_without_one_of_its_actions_a_plan_is_rejected(case: tuple[Waves, int], data: st.DataObject) -> None:
    made, count = case
    plan = round_of(made, count)
    device = data.draw(st.sampled_from(plan.devices))
    actions = list(plan.phases[0].actions[device])
    index = data.draw(st.integers(0, len(actions) - 1))
    with pytest.raises(InvalidPlan, match=r"phase 'train'"):
        validate(with_actions(plan, device, actions[:index] + actions[index + 1 :]), made.costs)


@pytest.mark.parametrize(("workers", "wave", "distance", "num_waves"), [(2, 1, 0, 3), (3, 2, 0, 4), (3, 2, 2, 5)])
def test_a_wave_costs_a_push_and_a_pull_of_the_model(workers: int, wave: int, distance: int, num_waves: int) -> None:
    """Of each worker but the one that serves the weights. In the end everybody pulls; some pulls before are saved."""
    made = waves([[]] * workers, 3, wave, distance)
    plan = round_of(made, workers * wave * num_waves)
    trace = simulate(plan, made.costs, cluster(workers))
    pulls = num_waves - distance if num_waves > distance else 1
    assert trace.comm_bytes == (workers - 1) * 3 * WEIGHTS * (num_waves + pulls)


def test_servers_take_turns_where_no_worker_cuts() -> None:
    """Cuts at 1 and 2 of four units: three ranges, served by the first, the second and the first worker's device."""
    made = waves([[1], [2]], 4, 2, 0)
    assert made.servers == {"weights@0:1": "device0", "weights@1:2": "device2", "weights@2:4": "device1"}
    tied = waves([[1], [2]], 4, 2, 0, tied=True)
    assert tied.holders["weights:w0"] == (("device0", "device1"), ("device2", "device3"))
    assert tied.phase((1,) * 4).tied == {"gradients:w0": ("device0", "device1", "device2", "device3")}


def test_other_weights_than_the_server_s_are_refused() -> None:
    made = waves([[], []], 1, 1, 0)
    plan = round_of(made, 4)

    def mixed(action):
        if isinstance(action, Combine) and action.write.name == "weights@0:1":
            return [Combine("sum", action.reads * 2, action.write, action.in_place)]
        return [action]

    with pytest.raises(InvalidPlan, match=r"weights@0:1.v1 is made of something else than one copy"):
        validate(mutate(plan, "device0", mixed), made.costs)

    def twice(action):
        """The server adds its own push once more."""
        if isinstance(action, Combine) and action.write.name == "gradients@0:1":
            return [replace(action, reads=(*action.reads, action.reads[-1]))]
        return [action]

    with pytest.raises(InvalidPlan, match=r"gradients@0:1#1.v2 adds \(\(0, 1\), 0, \(0, 2\)\) twice"):
        validate(mutate(plan, "device0", twice), made.costs)


def test_only_plain_sgd_adds_up() -> None:
    costs = chain(1)
    with pytest.raises(Unsupported, match="Set optimizer sgd"):
        Waves(costs, ((Stage((0, 1), ("device0",), (1,)),),), 1, 0, "sgd-momentum")


# The method

WORKLOAD = Workload("toy", "synthetic", num_samples=100, batch_size=4, epochs=2)


def planned(**options: object) -> Plan:
    memory = options.pop("memory_bytes", 10**12)
    speeds = (1.0, 4.0, 1.0, 4.0)
    asked = {**hetpipe.OPTIONS, **options}
    return hetpipe.plan(WORKLOAD, chain(4), cluster(4, bandwidth=1e9, speeds=speeds, memory_bytes=memory), asked)


def test_virtual_workers_are_alike_or_of_a_kind() -> None:
    ranked, order = ["fast1", "fast2", "slow1", "slow2"], ["slow1", "fast1", "slow2", "fast2"]
    equal = hetpipe.virtual_workers(ranked, order, 2, "ED")
    assert [sorted(name[:4] for name in group) for group in equal] == [["fast", "slow"]] * 2
    assert hetpipe.virtual_workers(ranked, order, 2, "NP") == [["fast1", "fast2"], ["slow1", "slow2"]]
    assert hetpipe.virtual_workers(ranked, order, 1, "ED") == [order]
    sizes = [len(group) for group in hetpipe.virtual_workers(ranked, order, 3, "ED")]
    assert sorted(sizes) == [1, 1, 2]


def test_hetpipe_says_what_it_does() -> None:
    plan = planned(virtual_workers=2, clock_distance=1, batches_per_flush=16)
    validate(plan, chain(4))
    first, second = plan.phases[:2]
    assert len(first.micro_batches) == 12 and len(second.micro_batches) == 13  # three waves of two workers, the rest
    assert plan.summary["virtual_workers"] == [["device1", "device2"], ["device0", "device3"]]
    # A slow device has one layer, a fast one three: 12 s against 9 s for a batch.
    assert plan.summary["layer_cuts"] == [[[0, 3], [3, 4]], [[0, 1], [1, 4]]]
    assert (plan.summary["wave"], plan.summary["local_staleness"], plan.summary["clock_distance"]) == (2, 1, 1)
    with pytest.raises(OrreryError, match=r"hetpipe\.clock_distance is -1"):
        planned(clock_distance=-1)
    with pytest.raises(OrreryError, match="policy"):
        planned(policy="HD")


def test_where_memory_is_short_a_wave_is_shorter() -> None:
    """Down to one mini-batch at a time; where that does not fit, it is said what is missing."""
    needs = {wave: _needed(wave) for wave in (2, 1)}
    assert needs[2] > needs[1]
    for wave, most in needs.items():
        assert planned(virtual_workers=2, memory_bytes=most).summary["wave"] == wave
    with pytest.raises(OutOfMemory):
        planned(virtual_workers=2, memory_bytes=4 * WEIGHTS)


def _needed(wave: int) -> int:
    """Bytes of the fullest device with two workers of a slow and a fast device."""
    made = waves([[3], [1]], 4, wave, 0)
    phases = tuple(made.phase(b, repeat=n) for b, n in rounds(WORKLOAD, most=128, first=4 * wave))
    speeds = (4.0, 1.0, 1.0, 4.0)
    trace = simulate(Plan("test", 4, made.tensors, phases), chain(4), cluster(4, bandwidth=1e9, speeds=speeds))
    return max(trace.peak_bytes.values())
