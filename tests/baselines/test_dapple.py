"""DAPPLE's two planners against brute force under their own estimates, closed forms, and its warm-up policies."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from statistics import median

import numpy as np
import pytest

from baselines import dapple
from baselines.dapple import PA, PB, Profile
from harness.costs import BACKWARD, FORWARD
from harness.errors import OrreryError, OutOfMemory, Unsupported
from harness.layer_tables import LayerTables
from harness.plan.validate import validate
from harness.schedules import Stage
from harness.search import Group, balanced_groups, overflow
from harness.simulator import simulate
from harness.workload import Workload
from systems.asteroid.equations import Step, dominant, latency
from tests.harness.toys import SAVED, chain, cluster
from tests.systems.asteroid.test_planner import unequal, uneven
from tests.systems.pac.every import every_split

LOAD = Workload("toy", "toy", num_samples=32, batch_size=32)


def drawn(seed: int, layers: int = 6, rows: int = 16, count: int = 8) -> Profile:
    """Times of every size, all-reduces from none to longer than the passes."""
    draw = random.Random(seed)
    forward, backward = ([0.0, *(draw.uniform(0.2, 3) for _ in range(layers))] for _ in range(2))
    ahead, back = ([0.0, *(draw.uniform(0, 2) for _ in range(layers - 1)), 0.0] for _ in range(2))
    weights = np.cumsum([0.0, *(draw.uniform(0, 20) ** 2 / 20 for _ in range(layers))]) * draw.choice((0, 0.1, 1, 5))
    return Profile(
        rows,
        count,
        np.cumsum(forward),
        np.cumsum(backward),
        np.array(ahead),
        np.array(back),
        weights[None, :] - weights[:, None],
    )


def all_groups(layers: int, devices: int) -> list[list[Group]]:
    return [list(zip(split.layers, split.groups, strict=True)) for split in every_split(layers, devices)]


def block(profile: Profile, groups: list[Group]) -> float:
    """The slowest pass of a stage, or boundary, of a micro-batch."""
    stages = [(profile.both[y] - profile.both[x]) / size for (x, y), size in groups]
    return max(*stages, *(profile.ahead[x] + profile.back[x] for (x, _), _ in groups))


def steps(profile: Profile, groups: list[Group]) -> list[Step]:
    """Stages, and the boundaries between them, as Asteroid has them."""
    found = []
    for (x, y), size in groups:
        if x:
            found.append(Step(profile.ahead[x], profile.back[x]))
        forward, backward = ((t[y] - t[x]) / size for t in (profile.forward, profile.backward))
        found.append(Step(forward, backward, 2 * (size - 1) / size * profile.copy[x, y]))
    return found


def around(found: list[Step], count: int, pivot: int) -> float:
    """Tw + Ts + Te, written down phase by phase."""
    warming = sum(step.forward for step in found[: pivot + 1])
    steady = (count - 1) * found[pivot].both
    ending = max(
        step.all_reduce
        + (
            sum(b.backward for b in found[s : pivot + 1])
            if s <= pivot
            else -sum(b.backward for b in found[pivot + 1 : s])
        )
        for s, step in enumerate(found)
    )
    return warming + steady + ending


@pytest.mark.parametrize("seed", range(20))
def test_the_slowest_block_is_least_in_one_stage(seed: int) -> None:
    """Why the released dynamic program finds no other: by brute force, and by a program over all groups."""
    profile, devices = drawn(seed), 5
    alone = block(profile, [((0, 6), devices)])
    assert min(block(profile, groups) for groups in all_groups(6, devices)) == pytest.approx(alone)
    blocks = np.maximum(profile.both[None, :] - profile.both[:, None], 0)
    blocks[np.tril_indices(7)] = np.inf
    boundaries = (profile.ahead + profile.back)[:, None]
    found = balanced_groups(lambda size, _: np.maximum(blocks / size, boundaries), 6, devices)
    assert found is not None and block(profile, found) == pytest.approx(alone)


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("seed", range(6))
def test_straight_stages_have_the_least_slowest_block(seed: int, stages: int) -> None:
    profile, copies = drawn(seed, layers=8), 1 + seed % 3
    found = [(units, copies) for units in dapple.straight(profile, stages, copies)]
    cuts = {tuple(units for units, _ in groups) for groups in all_groups(8, stages) if len(groups) == stages}
    best = min(block(profile, [(units, copies) for units in layers]) for layers in cuts)
    assert len(found) == stages and block(profile, found) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(20))
def test_the_released_planner_takes_what_it_estimates_to_be_fastest(seed: int) -> None:
    """Nothing that it ranks is better: two stages of any kind, one stage on a multiple, or straight ones."""
    devices = (4, 5, 6)[seed % 3]
    profile = drawn(seed)
    found = {len(groups): groups for groups, _ in dapple.candidates(profile, devices)}
    assert set(found) == {1, 2, devices}
    ranked = [(groups, 1) for groups in all_groups(6, devices) if len(groups) == 2]
    ranked += [([((0, 6), used * (devices // used))], devices // used) for used in range(2, devices + 1)]
    ranked += [([(units, 1) for units in dapple.straight(profile, devices, 1)], 1)]
    if devices % 2 == 0:
        ranked += [([(units, devices // 2) for units in dapple.straight(profile, 2, devices // 2)], devices // 2)]
    best = min(by_hand(profile, groups, copies) for groups, copies in ranked)
    chosen = dapple.released(profile, devices)
    assert min(by_hand(profile, groups, copies) for groups, copies in ranked if groups == chosen) == pytest.approx(best)


def by_hand(profile: Profile, groups: list[Group], copies: int) -> float:
    """(M-1) block + one pass + boundaries + max_i (AR_i - i block)+"""
    slowest = block(profile, groups)
    boundaries = sum(profile.ahead[x] for (x, _), _ in groups)
    late = [2 * (m - 1) / m * profile.copy[units] - i * slowest for i, (units, m) in enumerate(groups)]
    return (profile.count - 1) * slowest + (profile.both[-1] + boundaries) / copies + max(0.0, *late)


@pytest.mark.parametrize("seed", range(20))
def test_the_pivot_makes_the_latency_longest_and_is_the_dominant_step(seed: int) -> None:
    """Tw + Ts + Te around any step, and by a round's four numbers. Asteroid's equations 4 to 6 come to the same."""
    profile = drawn(seed)
    for groups in all_groups(6, 4):
        found = steps(profile, groups)
        round_ = np.zeros(4)
        for (x, y), size in groups:
            round_ = dapple._with_stage(profile, round_, x, y, size)
        seconds = round_[0] + round_[1]
        assert seconds == pytest.approx(max(around(found, profile.count, pivot) for pivot in range(len(found))))
        assert seconds == pytest.approx(around(found, profile.count, dominant(found, profile.count)))
        assert seconds == pytest.approx(latency(found, profile.count))


def test_what_the_pivots_program_leaves_behind(capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps the best of each state by the latency with one more stage: exact for two stages, a heuristic beyond."""
    behind = []
    for seed in range(60):
        profile = drawn(seed)
        every = [(latency(steps(profile, groups), profile.count), len(groups)) for groups in all_groups(6, 5)]
        reached = latency(steps(profile, dapple.pivoted(profile, 5)), profile.count)
        best, of_two = min(every)[0], min(seconds for seconds, stages in every if stages <= 2)
        assert best * (1 - 1e-9) <= reached <= of_two * (1 + 1e-9)
        behind.append(reached / best - 1)
    with capsys.disabled():
        print(f"\npivot: median {median(behind):.1%}, p90 {sorted(behind)[53]:.1%}, most {max(behind):.1%}")
    assert median(behind) < 0.01


@pytest.mark.parametrize("estimate", dapple.ESTIMATES)
def test_uniform_layers_are_replicated_over_fast_links_and_cut_over_slow_ones(estimate: str) -> None:
    def grouping(parameters: int, bandwidth: float) -> object:
        costs, boards = chain(8, parameters=parameters), cluster(4, bandwidth=bandwidth)
        return dapple.plan(LOAD, costs, boards, {**dapple.OPTIONS, "estimate": estimate}).summary["grouping"]

    assert grouping(10, 1e15) == [4]
    assert grouping(10**6, 1e4) == [1, 1, 1, 1]


@pytest.mark.parametrize("estimate", dapple.ESTIMATES)
def test_no_device_is_without_a_row(estimate: str) -> None:
    planner = dapple.released if estimate == dapple.RELEASED else dapple.pivoted
    for seed in range(10):
        for rows in (1, 2, 3):
            groups = planner(drawn(seed, rows=rows), 5)
            assert all(size <= rows for _, size in groups)
            assert [x for (x, _), _ in groups] == [0, *(y for (_, y), _ in groups[:-1])] and groups[-1][0][1] == 6
    with pytest.raises(Unsupported, match="each device needs a row"):
        planner(drawn(0, layers=2, rows=1), 5)
    assert planner(drawn(0), 1) == [((0, 6), 1)]


def test_warm_up_policies() -> None:
    """PA is min(S - i, D) and PB min(2 (S - i) - 1, D), where a stage has memory for D."""
    costs, boards = chain(4), cluster(4)
    stages = [Stage((p, p + 1), (boards.names[p],), (1.0,)) for p in range(4)]

    def kept(boards, warmup):  # type: ignore[no-untyped-def]
        return dapple.in_flight(LOAD, costs, boards, stages, 4, warmup)

    assert kept(boards, PA) == [4, 3, 2, 1]
    assert kept(boards, PB) == [7, 5, 3, 1]
    standing, each = 2 * 4 * 840, 4 * (SAVED + 4 * 16)  # weights and gradients; what the second stage keeps of each
    passing = max(costs.workspace(1, 2, direction, 4) for direction in (FORWARD, BACKWARD))
    sizes = [10**9, standing + 2 * each + passing, 10**9, 10**9]
    tight = replace(
        boards, devices=tuple(replace(d, memory_bytes=b) for d, b in zip(boards.devices, sizes, strict=True))
    )
    assert kept(tight, PA) == [4, 2, 2, 1]
    assert kept(tight, PB) == [7, 2, 2, 1]  # the third never has more than come from the second


@pytest.mark.parametrize("estimate", dapple.ESTIMATES)
@pytest.mark.parametrize("warmup", dapple.WARMUPS)
@pytest.mark.parametrize("seed", range(4))
def test_plans_are_valid_and_run_where_memory_is_short_too(seed: int, warmup: str, estimate: str) -> None:
    costs, options = uneven(5, seed), {**dapple.OPTIONS, "warmup": warmup, "estimate": estimate}
    for memory in (False, True):
        boards = unequal(seed, 4, memory)
        try:
            plan = dapple.plan(LOAD, costs, boards, options)
        except OutOfMemory:
            assert memory
            continue
        validate(plan, costs)
        assert overflow(simulate(plan, costs, boards), boards) is None


def test_profile_is_that_of_the_average_device_behind_the_slowest_link() -> None:
    boards = replace(cluster(2, speeds=(1.0, 4.0)), bandwidth={"device0": 100.0, "device1": 1e9})
    profile = Profile.of(LayerTables(chain(3), boards), 8, 4)
    assert list(profile.forward) == pytest.approx([8 * i * (1 + 1 / 4) / 2 for i in range(4)])
    assert list(profile.backward) == pytest.approx([16 * i * (1 + 1 / 4) / 2 for i in range(4)])
    assert list(profile.ahead) == list(profile.back) == pytest.approx([0, 8 * 64 / 100, 8 * 64 / 100, 0])
    assert all(profile.copy[x, y] == pytest.approx((y - x) * 3360 / 100) for x, y in pairwise(range(4)))


@pytest.mark.parametrize("option", ["estimate", "warmup"])
def test_wrong_options_are_refused_by_name(option: str) -> None:
    with pytest.raises(OrreryError, match=rf"dapple\.{option}"):
        dapple.plan(LOAD, chain(4), cluster(2), {**dapple.OPTIONS, option: "best"})
    with pytest.raises(OutOfMemory, match=r"device\d needs"):
        dapple.plan(LOAD, chain(4), cluster(2, memory_bytes=100), dapple.OPTIONS)
