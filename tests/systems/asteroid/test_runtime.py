"""Asteroid's rounds for real: groups of several sizes with uneven shares train what one device trains.

Batch norm's statistics are local, so that for images the oracle runs the same row pieces on one device, in float64: a
piece has few values per channel, and in float32 the oracle itself hangs on the order of its sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from harness import datasets, profile, reference
from harness.costs import BACKWARD, FORWARD, Costs
from harness.plan import Compute, Phase, Plan
from harness.plan.actions import NIC_OUT
from harness.plan.serial import from_json, to_json
from harness.plan.validate import validate
from harness.schedules import Pipeline, Stage
from harness.simulator import simulate
from harness.trace import Trace
from harness.workload import Workload
from systems import asteroid
from systems.asteroid.equations import in_flight
from tests.harness.engine.devices import by_hand, run_devices
from tests.harness.engine.equality import assert_buffers, assert_equal, assert_reported, layered_stages
from tests.harness.toys import chain, cluster

#: Batches of 20, 20 and 12 rows: with micro-batches of 8 rows the last of each has 4.
TEXT = Workload(
    "bert-tiny",
    "synthetic",
    num_samples=52,
    batch_size=20,
    steps=4,
    seq_len=16,
    dropout=0.1,
    optimizer="sgd-momentum",
    learning_rate=0.05,
)
#: Of so many pixels that a piece of one row, too, has several values per channel in the deepest layer.
IMAGES = Workload(
    "resnet-tiny",
    "synthetic",
    num_samples=52,
    batch_size=20,
    steps=3,
    seq_len=None,
    image_size=64,
    num_labels=10,
    dtype="float64",
    optimizer="sgd-momentum",
    learning_rate=0.02,
)
#: Shares in each group. Of 8 rows: 5, 2, 1 beside 3, 5; of 4 rows the slowest device has none.
THREE_ONE_TWO = ((5, 2, 1), (1,), (3, 5))
TWO_THREE = ((3, 5), (5, 2, 1))
ONE_FOUR = ((1,), (4, 2, 1, 1))
Shares = tuple[tuple[float, ...], ...]


def rule(stages: int, count: int) -> list[int]:
    """K_p = 2 (P - p) - 1, and no more than there are."""
    return [min(2 * (stages - p) - 1, count) for p in range(stages)]


def grouped(workload: Workload, shares: Shares, micro_batch_size: int = 8) -> tuple[Plan, Costs]:
    """The layers dealt out evenly, to a file and back."""
    costs = profile.count(workload)
    layers = len(costs.layers) // len(shares)
    stages = layered_stages(workload, [(layers, of) for of in shares])
    plan = by_hand(
        costs, workload, stages, micro_batch_size, [in_flight(len(shares) - 1 - p) for p in range(len(shares))]
    )
    validate(plan, costs)
    return from_json(to_json(plan)), costs


def assert_trains(plan: Plan, workload: Workload, folder: Path) -> None:
    """Losses, weights, momentum (after the first update that is the gradient), buffers and bytes."""
    ours = run_devices(plan, workload, folder)
    oracle = reference.train(plan, workload, datasets.load(workload))
    assert len(oracle.losses) == workload.steps
    assert_equal(ours, oracle, workload)
    assert_buffers(ours, oracle, plan)
    assert_reported(ours, plan, workload)


@pytest.mark.parametrize("model", ["bert-tiny", pytest.param("bert-small", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shares", [THREE_ONE_TWO, TWO_THREE, ONE_FOUR], ids=str)
def test_groups_of_other_sizes_hand_on_language(model: str, shares: Shares, tmp_path: Path) -> None:
    workload = replace(TEXT, model=model, learning_rate=0.05 if model == "bert-tiny" else 0.01)
    plan, _ = grouped(workload, shares)
    assert plan.phases[0].micro_batches == (8, 8, 4)
    idle = [low == high for shard in plan.phases[0].shards.values() for low, high in shard.micro_batch_rows]
    assert any(idle), "of four rows the slowest device has none"
    assert_trains(plan, workload, tmp_path)


@pytest.mark.parametrize("model", ["resnet-tiny", "mobilenet-v2-tiny", "efficientnet-tiny"])
@pytest.mark.parametrize("shares", [THREE_ONE_TWO, TWO_THREE], ids=str)
def test_groups_of_other_sizes_hand_on_images(model: str, shares: Shares, tmp_path: Path) -> None:
    plan, _ = grouped(replace(IMAGES, model=model), shares)
    assert_trains(plan, replace(IMAGES, model=model), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet-50", "mobilenet-v2", "efficientnet-b1"])
def test_the_whole_models_do(model: str, tmp_path: Path) -> None:
    workload = replace(IMAGES, model=model, num_samples=20, steps=2, learning_rate=0.01)
    plan, _ = grouped(workload, THREE_ONE_TWO)
    assert_trains(plan, workload, tmp_path)


def test_gradients_are_those_of_one_device(tmp_path: Path) -> None:
    """After a single update from nothing the momentum is the gradient: in float32, to 1e-5 of the largest."""
    workload = replace(TEXT, steps=1)
    plan, _ = grouped(workload, THREE_ONE_TWO)
    ours = run_devices(plan, workload, tmp_path)
    wanted = reference.train(plan, workload, datasets.load(workload)).state()
    assert sum("/" in name for name in wanted) == sum("/" not in name for name in wanted)
    for device, tensors in ours.state.items():
        assert reference.max_rel_error(tensors, wanted, adaptive=True) <= 1e-5, device


@pytest.mark.parametrize(
    ("workload", "stages", "planner"),
    [(TEXT, 2, "paper"), (TEXT, 3, "exact"), (IMAGES, 3, "paper"), (TEXT, None, "search")],
    ids=["bert-2", "bert-3-exact", "resnet-3", "bert-search"],
)
def test_planned_rounds_train_what_one_device_trains(
    workload: Workload, stages: int | None, planner: str, tmp_path: Path
) -> None:
    """As the planner makes them for five devices of which none are equal: groups, and shares by speed inside them."""
    costs = profile.count(workload)
    boards = cluster(5, speeds=(4.0, 2.0, 1.0, 3.0, 1.5), bandwidth=2e7, memory_bandwidth=1e10)
    options = {**asteroid.OPTIONS, "planner": planner, "stages": stages, "micro_batch_size": 8}
    plan = asteroid.plan(workload, costs, boards, options)
    validate(plan, costs)
    groups, rows = plan.summary["grouping"], plan.summary["rows"]
    assert sum(groups) == 5 and max(groups) > 1 and stages in (None, len(groups))
    assert any(len(set(of)) > 1 for of in rows)
    assert_trains(plan, workload, tmp_path)


def passes(phase: Phase, device: str) -> list[tuple[str, int]]:
    return [(a.direction, a.micro_batch) for a in phase.actions[device] if isinstance(a, Compute)]


@pytest.mark.parametrize("count", [1, 2, 4, 5, 9])
def test_rounds_begin_with_the_rule_s_forwards(count: int) -> None:
    """Then one backward and one forward in turn; a round of fewer micro-batches begins with all of them. What is kept
    for backward passes is that of so many micro-batches at once."""
    costs, stages = chain(3), 3
    boards = cluster(4, speeds=(1.0, 1.0, 2.0, 2.0), bandwidth=1e9)
    workload = Workload("toy", "toy", num_samples=4 * count, batch_size=4 * count)
    options = {**asteroid.OPTIONS, "stages": stages, "micro_batch_size": 4}
    plan = asteroid.plan(workload, costs, boards, options)
    peaks = simulate(plan, costs, boards).memory_bytes
    for p, devices in enumerate(plan.summary["devices"]):
        kept = rule(stages, count)[p]
        for device in devices:
            made = passes(plan.phases[0], device)
            ahead = [direction for direction, _ in made].index(BACKWARD)
            assert ahead == kept
            assert made[ahead:] == [
                each
                for m in range(count)
                for each in ((BACKWARD, m), *([(FORWARD, m + kept)] if m + kept < count else []))
            ]
            low, high = plan.phases[0].shards[device].micro_batch_rows[0]
            assert peaks[device]["activations"] >= kept * (high - low) * 1000


def reduced(trace: Trace, device: str) -> tuple[float, float]:
    """When the device's gradients go out to its group: first begin, last end."""
    sent = [e for e in trace.events if (e.device, e.queue) == (device, NIC_OUT) and e.label.startswith("gradients")]
    return min(e.start_s for e in sent), max(e.end_s for e in sent)


def last_backward(trace: Trace, device: str) -> float:
    return max(e.end_s for e in trace.events if e.device == device and e.kind == BACKWARD)


def by_groups(shares: Sequence[Sequence[float]], parameters: int, count: int, bandwidth: float) -> tuple[Plan, Costs]:
    """A layer per group of devices, `count` micro-batches of 8 rows."""
    costs = chain(len(shares), parameters=parameters)
    names = iter(f"device{n}" for n in range(sum(map(len, shares))))
    stages = tuple(Stage((p, p + 1), tuple(next(names) for _ in of), tuple(of)) for p, of in enumerate(shares))
    pipeline = Pipeline(costs, stages)
    phase = pipeline.phase([8] * count, rule(len(shares), count))
    return Plan("by-hand", len(shares), pipeline.tensors, (phase,)), costs


def test_later_stages_sum_their_gradients_while_earlier_ones_drain() -> None:
    """Each after its own last backward pass, and before those of all stages in front; the round ends with the slowest
    of them, as eq. 4 says: T_a behind the last backward pass of its group."""
    shares, parameters, bandwidth = ((5, 2, 1), (1, 1), (3, 5)), 840_000, 2e6
    plan, costs = by_groups(shares, parameters, count=6, bandwidth=bandwidth)
    boards = cluster(7, bandwidth=bandwidth)
    trace = simulate(plan, costs, boards)
    groups = [("device0", "device1", "device2"), ("device3", "device4"), ("device5", "device6")]
    ends = [max(last_backward(trace, device) for device in group) for group in groups]
    assert ends[0] > ends[1] > ends[2]
    for s, group in enumerate(groups):
        ring = 2 * (len(group) - 1) / len(group) * 4 * parameters / bandwidth
        for device in group:
            begun, ended = reduced(trace, device)
            assert begun >= last_backward(trace, device)
            assert all(begun < end for end in ends[:s])
            assert ended >= ends[s] + ring * (1 - 1e-9)
    last = max(reduced(trace, device)[1] for group in groups for device in group)
    assert trace.total_s == pytest.approx(last, rel=1e-9)
    serial = max(ends) + sum(2 * (len(g) - 1) / len(g) * 4 * parameters / bandwidth for g in groups)
    assert trace.total_s < serial


@pytest.mark.parametrize("shares", [((5, 2, 1), (1,), (3, 5)), ((3, 5), (5, 2, 1)), ((9, 3, 2, 1, 1), (7, 1))], ids=str)
@pytest.mark.parametrize("parameters", [840, 1001])
def test_a_ring_moves_two_times_n_minus_one_nths_of_the_weights(shares: Shares, parameters: int) -> None:
    """However unequal the rows, and the same for the bytes of activations: each row crosses once, and its gradient."""
    count, rows, width = 3, 8, 16
    plan, costs = by_groups(shares, parameters, count, 1e6)
    trace = simulate(plan, costs, cluster(sum(map(len, shares)), bandwidth=1e6))
    first = 0
    for of in shares:
        n = len(of)
        group = [f"device{first + i}" for i in range(n)]
        first += n
        sent = {
            device: sum(
                e.nbytes
                for e in trace.events
                if (e.device, e.queue) == (device, NIC_OUT) and e.label.startswith("gradients")
            )
            for device in group
        }
        assert sum(sent.values()) == 2 * (n - 1) * 4 * parameters
        for nbytes in sent.values():  # chunks differ by an element at most
            assert nbytes == pytest.approx(2 * (n - 1) / n * 4 * parameters, abs=2 * 4 * (n - 1) * (parameters % n > 0))
    crossing = 2 * (len(shares) - 1) * count * rows * width * 4
    rings = sum(2 * (len(of) - 1) * 4 * parameters for of in shares)
    assert trace.comm_bytes == crossing + rings
