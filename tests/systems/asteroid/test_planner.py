"""Asteroid's equations, its two algorithms, and what they leave behind, against closed forms and brute force."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from math import inf
from statistics import fmean

import numpy as np
import pytest

from baselines import eddl
from harness.cluster import Cluster
from harness.costs import BACKWARD, FORWARD, Costs
from harness.errors import OrreryError
from harness.layer_tables import LayerTables
from harness.plan import Compute, Plan
from harness.plan.validate import validate
from harness.schedules import Pipeline, Stage, one_f_one_b, split_within
from harness.simulator import simulate
from harness.workload import Workload
from systems import asteroid
from systems.asteroid import planner
from systems.asteroid.equations import Step, dominant, in_flight, latency, tail
from systems.asteroid.families import ends, everything, windows
from systems.asteroid.groups import Groups, Placed, by_memory
from systems.asteroid.layouts import PLANNERS
from systems.asteroid.planner import Layout, Planner, searched
from systems.asteroid.shares import balanced, offloaded
from tests.harness.toys import chain, cluster
from tests.systems.asteroid import oracle
from tests.systems.asteroid.oracle import Plain, Seconds, algorithm_2, every, every_order, unequal, uneven, with_trips


def steps(seed: int, stages: int = 3) -> list[Step]:
    """Execution and communication steps in turn."""
    draw = random.Random(seed)
    found = []
    for s in range(2 * stages - 1):
        forward, backward = draw.uniform(0.5, 2), draw.uniform(0.5, 4)
        found.append(Step(forward, backward, draw.uniform(0, 20) if s % 2 == 0 else 0.0))
    return found


def toy(seed: int) -> Groups:
    """Five layers on four devices; with every third seed memory is short, with others links are slow."""
    draw = random.Random(seed)
    boards = unequal(seed, memory=seed % 3 == 0)
    slower = draw.choice((1.0, 0.01, 0.003))
    boards = replace(boards, bandwidth={name: rate * slower for name, rate in boards.bandwidth.items()})
    return Groups(LayerTables(uneven(5, seed), boards), 8, draw.choice((1, 2, 4, 16)), offload=seed % 5 > 0)


def least(groups: Groups, found: Iterable[Sequence[Placed]]) -> float:
    return min(map(groups.latency, found), default=inf)


def reached(layout: Layout | None) -> float:
    return inf if layout is None else layout.latency


@pytest.mark.parametrize("seed", range(30))
def test_latency_is_a_sum_of_two_maxima(seed: int) -> None:
    """What eqs. 4 to 6 and 11 come to, written down apart from them; and the same kept step by step."""
    found, count = steps(seed, 2 + seed % 4), 1 + seed
    pipe = max(count * s.both + sum(b.both for b in found[:c]) for c, s in enumerate(found))
    reduce = max(s.all_reduce - sum(b.backward for b in found[:c]) for c, s in enumerate(found))
    assert latency(found, count) == pytest.approx(pipe + reduce)
    assert tail(found, count).latency == pytest.approx(pipe + reduce)


def test_with_the_last_stage_dominant_it_is_pacs_three_phases() -> None:
    found, count = steps(3), 7
    beginning = sum(step.forward for step in found[:-1])
    execution = count * found[-1].both
    ending = max(step.all_reduce + sum(s.backward for s in found[i:-1]) for i, step in enumerate(found))
    assert latency(found, count, dm=len(found) - 1) == pytest.approx(beginning + execution + ending)
    alone = [Step(1, 2, 5)]
    assert (dominant(alone, 4), latency(alone, 4)) == (0, 17)


def test_the_first_stage_keeps_the_most_in_flight() -> None:
    assert [in_flight(3 - p) for p in range(4)] == [7, 5, 3, 1]


def shared(total: int, seconds: Seconds, most: Sequence[int]) -> list[int]:
    """The rows of one stage, by capacity alone and then with offloading."""
    times = np.array(seconds)
    capacities, room = 1 / times[:, total, None], np.array(most)[:, None]
    start = balanced(total, capacities, room).rows
    return offloaded(start, lambda devices, stages, rows: times[devices, rows], room).rows[:, 0].tolist()


def test_shares_follow_speed_and_memory_and_stragglers_give_away() -> None:
    def rows(capacities: list[float], most: list[int]) -> list[int]:
        return balanced(16, np.array(capacities)[:, None], np.array(most)[:, None]).rows[:, 0].tolist()

    assert rows([3.0, 1.0], [16, 16]) == [12, 4]
    assert rows([3.0, 1.0, 1.0], [6, 16, 16]) == [6, 5, 5]
    quick = [0.0, *(4.0 + 0.1 * y for y in range(1, 9))]  # a batch costs much, a row nothing
    slow = [1.0 * y for y in range(9)]
    assert shared(8, [quick, slow], [8, 8]) == [4, 4]
    assert shared(8, [quick, slow], [3, 8]) == [3, 5]
    assert max(quick[4], slow[4]) == min(max(quick[y], slow[8 - y]) for y in range(9))


@pytest.mark.parametrize("seed", range(8))
def test_shares_of_many_stages_are_those_of_each(seed: int) -> None:
    """Both parts of algorithm 1; and with less memory, but enough for all that was given on the way, the same again."""
    draw = np.random.default_rng(seed)
    total, devices, stages = 12, 2 + seed % 8, 200
    steps = draw.choice([0.0, 0.5, 1.0, 3.0], (devices, stages, total + 1)) + draw.choice([0.0, 2.0], (devices, 1, 1))
    seconds = np.cumsum(steps, axis=2) + 1.0
    seconds[:, :, 0] = 0.0
    capacities = 1 / seconds[:, :, total]
    most = draw.integers(0, total + 1, (devices, stages))
    most[0] = np.maximum(most[0], total - most[1:].sum(axis=0))
    start = balanced(total, capacities, most)
    found = offloaded(start.rows, lambda device, stage, rows: seconds[device, stage, rows], most)
    for stage in range(stages):
        rows = split_within(total, capacities[:, stage].tolist(), most[:, stage].tolist())
        assert rows == start.rows[:, stage].tolist()
        assert oracle.offloaded(rows, seconds[:, stage], most[:, stage]) == found.rows[:, stage].tolist()
    given = np.maximum(start.given, found.given)
    less = np.where(most > 0, np.maximum(np.minimum(most, given + seed % 2), 1), 0)
    again = balanced(total, capacities, less)
    assert (again.rows == start.rows).all()
    moved = offloaded(again.rows, lambda device, stage, rows: seconds[device, stage, rows], less)
    assert (moved.rows == found.rows).all()


@pytest.mark.parametrize("seed", range(8))
def test_stages_of_all_layers_are_those_of_each(seed: int) -> None:
    """With as many micro-batches in flight as memory allows, tried from the most to one."""
    groups = toy(seed)
    plain, layers = Plain(groups), groups.tables.num_layers
    for size in range(1, 5):
        for group in combinations(range(4), size):
            for behind in range(4):
                stages = groups.stages(group, behind)
                forward, backward = groups.table(stages.forward), groups.table(stages.backward)
                for x, y in combinations(range(layers + 1), 2):
                    stage = plain.stage((x, y), group, behind)
                    assert groups.stage((x, y), group, behind) == stage
                    seconds = (stage.step.forward, stage.step.backward) if stage else (inf, inf)
                    assert (forward[x, y], backward[x, y]) == seconds
                    assert stage is None or groups.all_reduce(group)[x, y] == stage.step.all_reduce


@pytest.mark.parametrize("seed", range(8))
def test_a_limit_leaves_away_what_is_in_no_plan_within_it(seed: int) -> None:
    groups, limited = toy(seed), toy(seed)
    found = list(every_order(Plain(groups), idle=True))
    limit = float(np.quantile([groups.latency(stages) for stages in found], 0.1)) if found else 1.0
    for stages in found:
        if groups.latency(stages) <= limit:
            for behind, stage in enumerate(reversed(stages)):
                seconds = limited.table(limited.stages(stage.devices, behind, limit).forward)
                assert seconds[stage.layers] == stage.step.forward
    left = [limited.stages((device,), 0, limit) for device in range(4)]
    assert any((np.isinf(of.forward) & np.isfinite(groups.stages((d,), 0).forward)).any() for d, of in enumerate(left))


@pytest.mark.parametrize("seed", range(16))
def test_planners_of_an_order(seed: int) -> None:
    """The paper's finds what its algorithm finds state by state, the exact one the best of all cuts and groups."""
    groups = toy(seed)
    plain, order = Plain(groups), by_memory(groups.tables)
    for num_stages in (None, 1, 2, 3, 4):
        paper, wanted = Planner(groups).best(num_stages), algorithm_2(plain, order, num_stages)
        assert (None if paper is None else paper.stages) == wanted
        for idle in (False, True):
            exact = reached(Planner(groups, exact=True, idle=idle).best(num_stages))
            best = least(groups, (found for found in every(plain, order, idle) if num_stages in (None, len(found))))
            assert exact == pytest.approx(best, rel=1e-12)
            assert exact <= reached(Planner(groups, idle=idle).best(num_stages)) <= reached(paper)


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_search_is_the_best_of_all_orders(seed: int, idle: bool) -> None:
    groups = toy(seed)
    found = searched(groups, idle)
    best = min((with_trips(groups, stages) for stages in every_order(Plain(groups), idle)), default=inf)
    assert reached(found) == pytest.approx(best, rel=1e-12)
    if found is not None:
        busy = sorted(device for stage in found.stages for device in stage.devices)
        assert busy == sorted(set(busy)) and (idle or busy == list(range(4)))


@pytest.mark.parametrize("seed", range(6))
def test_search_among_many_devices_stays_near(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the exact planner's best order and the best of all."""
    groups = Groups(LayerTables(uneven(6, seed), unequal(seed, 6, memory=seed % 2 == 0)), 8, 8)
    best = reached(searched(groups))
    monkeypatch.setattr(planner, "MOST_NEAR", 200 * 6)
    near = searched(groups, most_pairs=0)
    exact = Planner(groups, exact=True).best()
    assert exact is not None and best * (1 - 1e-12) <= reached(near) <= groups.latency(exact.stages, trips=True)
    assert near == searched(groups, most_pairs=0)


def test_families_of_sets() -> None:
    """Pairs of sets: each device is in both, in the larger one, or in neither."""
    order, different = (3, 1, 0, 2, 4), range(5)
    every_set = everything(order, different, 3**5)
    assert every_set is not None and (len(every_set.sets), every_set.num_pairs) == (2**5, 3**5 - 2**5)
    assert everything(order, different, 3**5 - 1) is None
    assert windows(order, different, 1) == ends(order) and windows(order, different, 5) == every_set
    assert len(windows(order, different, 2).sets) == 1 + 2 * 5 - 1
    one = ends(order)
    behind_three = one.pairs.group[one.pairs.begin[3] : one.pairs.begin[4]]
    assert [one.groups[group] for group in behind_three] == [(0, 2, 4), (0, 2), (0,)]
    assert one.by_size == [1, 2, 3, 4, 5, 6] and every_set.by_size == [1, 6, 16, 26, 31, 32]
    alike = everything(order, [0] * 5, 3**5)
    assert alike is not None and alike == windows(order, [0] * 5, 5) == ends(order)


def played(found: Sequence[Step], count: int, kept: Sequence[int]) -> float:
    """The round, event by event: stages keep their order of passes; every link serves both directions as they come."""
    stages = len(kept)
    orders = [list(one_f_one_b(k, count)) for k in kept]
    ended: dict[tuple[str, int, int], float] = {}
    stage_free, link_free = [0.0] * stages, [0.0] * (stages - 1)
    position, waiting = [0] * stages, list[tuple[float, str, int, int]]()
    while any(position[s] < len(orders[s]) for s in range(stages)) or waiting:
        able = []
        for s in range(stages):
            if position[s] < len(orders[s]):
                direction, m = orders[s][position[s]]
                if direction == FORWARD:
                    source = ("to", s - 1, m) if s else None
                else:
                    source = ("from", s, m) if s < stages - 1 else (FORWARD, s, m)
                if source is None or source in ended:
                    able.append((max(stage_free[s], ended[source] if source else 0.0), s, direction, m))
        begun = [(max(link_free[c], ready), ready, way, c, m) for ready, way, c, m in waiting]
        if begun and (not able or min(begun)[0] <= min(able)[0]):
            start, ready, way, c, m = min(begun)
            waiting.remove((ready, way, c, m))
            step = found[2 * c + 1]
            ended[way, c, m] = link_free[c] = start + (step.forward if way == "to" else step.backward)
            continue
        start, s, direction, m = min(able)
        step = found[2 * s]
        ended[direction, s, m] = stage_free[s] = start + (step.forward if direction == FORWARD else step.backward)
        position[s] += 1
        if direction == FORWARD and s < stages - 1:
            waiting.append((stage_free[s], "to", s, m))
        if direction == BACKWARD and s > 0:
            waiting.append((stage_free[s], "from", s - 1, m))
    return max(free + found[2 * s].all_reduce for s, free in enumerate(stage_free))


#: Micro-batches in flight: by the rule, as in plain 1F1B, and all of them.
RULES = ("K_p", "P - p", "M")


@pytest.mark.parametrize("count", [8, 32])
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("share", [0.2, 1.0, 2.0])
def test_equations_foretell_the_schedule(count: int, stages: int, share: float) -> None:
    """Predicted over played, where a link's directions share it: to a few percent with K_p micro-batches in flight, and
    further off with others."""
    ratios: dict[str, list[float]] = {rule: [] for rule in RULES}
    for seed in range(40):
        draw = random.Random(f"{stages} {count} {share} {seed}")
        found = []
        for s in range(2 * stages - 1):
            forward = draw.uniform(0.5, 1.5) * (share if s % 2 else 1.0)
            found.append(Step(forward, forward if s % 2 else 2 * forward))
        rules = {
            "K_p": [min(in_flight(stages - 1 - p), count) for p in range(stages)],
            "P - p": [stages - p for p in range(stages)],
            "M": [count] * stages,
        }
        for name, kept in rules.items():
            ratios[name].append(latency(found, count) / played(found, count, kept))
    means = {rule: fmean(found) for rule, found in ratios.items()}
    print(f"\n{stages} stages, {count} micro-batches, communication {share}: {means}")
    assert 0.955 <= means["K_p"] <= 1.005
    assert means["P - p"] < means["K_p"] and means["M"] < means["K_p"] + 0.005
    assert 0.84 <= min(ratios["K_p"]) and max(ratios["K_p"]) <= 1.10


@pytest.mark.parametrize("seed", range(60))
def test_round_trips_are_a_bound(seed: int) -> None:
    """The schedule is never faster than they are, whatever is in flight; and as much as by the rule they are none."""
    draw = random.Random(seed)
    stages, count = draw.randint(1, 5), draw.randint(1, 20)
    found = [replace(step, all_reduce=0.0) for step in steps(seed, stages)]
    kept = sorted((draw.randint(1, count) for _ in range(stages)), reverse=True)
    both = [step.both for step in found]
    trips = [count / kept[p] * sum(both[2 * p :]) + sum(both[: 2 * p]) for p in range(stages)]
    assert played(found, count, kept) >= max(trips) * (1 - 1e-12)
    assert tail(found, count, kept).latency == pytest.approx(max(latency(found, count), *trips))
    by_rule = [min(in_flight(behind), count) for behind in reversed(range(stages))]
    assert tail(found, count, by_rule).latency == pytest.approx(latency(found, count), rel=1e-12)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_equations_and_the_simulator(stages: int) -> None:
    """The simulator knows ports, too: a middle stage sends and receives one thing at a time, and is never faster."""
    ratios = []
    for seed in range(20):
        costs = uneven(stages, seed)
        boards = cluster(stages, bandwidth=2e2, duplex="half")
        layout = Planner(Groups(LayerTables(costs, boards), 1, 32), range(stages)).best(stages)
        assert layout is not None
        made = tuple(Stage((p, p + 1), (boards.names[p],), (1,)) for p in range(stages))
        pipeline = Pipeline(costs, made, "sgd")
        phase = pipeline.phase([1] * 32, [stage.in_flight for stage in layout.stages])
        plan = Plan("by-hand", stages, pipeline.tensors, (phase,))
        ratios.append(layout.latency / simulate(plan, costs, boards).phases[0].time_s)
    assert 0.9 <= fmean(ratios) <= 1.005, fmean(ratios)


def of(boards: Cluster, costs: Costs, load: Workload, **options: object) -> Plan:
    plan = asteroid.plan(load, costs, boards, {**asteroid.OPTIONS, **options})
    validate(plan, costs)
    return plan


LOAD = Workload("toy", "toy", num_samples=32, batch_size=32)


def test_one_stage_is_data_parallelism_by_speed() -> None:
    boards = cluster(3, speeds=(4.0, 2.0, 2.0), bandwidth=1e9)
    costs = chain(4)
    plan = of(boards, costs, LOAD, stages=1, micro_batch_size=32)
    replicas = eddl.plan(LOAD, costs, boards, {**eddl.OPTIONS, "shares": "speed", "micro_batch_size": 32})
    assert plan.phases[0].shards == replicas.phases[0].shards
    assert simulate(plan, costs, boards).total_s == simulate(replicas, costs, boards).total_s


def test_as_many_stages_as_devices_are_a_pipeline_in_order_of_memory() -> None:
    boards = unequal(5)
    plan = of(boards, chain(6), LOAD, stages=4, micro_batch_size=4)
    order = by_memory(LayerTables(chain(6), boards))
    shards = plan.phases[0].shards
    assert [plan.devices.index(boards.names[d]) for d in order] == [0, 1, 2, 3]
    assert all(after.units[0] == before.units[1] for before, after in pairwise(shards[d] for d in plan.devices))


def test_short_memory_keeps_fewer_in_flight_and_still_runs() -> None:
    costs = chain(4)
    boards = cluster(2, bandwidth=1e9, memory_bytes=1)
    roomy = LayerTables(costs, cluster(2, bandwidth=1e9))
    stays, fixed, per_row = (part[0, 2] for part in roomy.memory)
    tight = replace(
        boards, devices=tuple(replace(d, memory_bytes=int(stays + 2 * (fixed + 4 * per_row))) for d in boards.devices)
    )
    layout = Planner(Groups(LayerTables(costs, tight), 4, 8)).best(2)
    assert layout is not None and [stage.in_flight for stage in layout.stages] == [2, 1]
    of(replace(tight, devices=tuple(replace(d, memory_bytes=2 * d.memory_bytes) for d in tight.devices)), costs, LOAD)


@pytest.mark.parametrize(
    ("warmup", "begins"), [("asteroid", [5, 3, 1]), ("1f1b", [3, 2, 1]), ("gpipe", [8, 8, 8])], ids=str
)
def test_stages_begin_as_the_rule_says(warmup: str, begins: list[int]) -> None:
    """The layout is the planner's, whatever the rule."""
    boards, costs = cluster(3, bandwidth=1e9), chain(6)
    plan = of(boards, costs, LOAD, stages=3, micro_batch_size=4, warmup=warmup)
    usual = of(boards, costs, LOAD, stages=3, micro_batch_size=4)
    assert plan.phases[0].shards == usual.phases[0].shards
    for device, begin in zip(plan.devices, begins, strict=True):
        directions = [a.direction for a in plan.phases[0].actions[device] if isinstance(a, Compute)]
        assert directions.index(BACKWARD) == begin


def test_equal_shares_are_equal_and_planned_for() -> None:
    """Where devices are unequal the equations foretell more time, and the best cuts may be others."""
    boards, costs = cluster(4, speeds=(5.0, 1.0, 1.0, 1.0), bandwidth=1e9), chain(4)
    plan = of(boards, costs, LOAD, stages=1, micro_batch_size=32, shares="equal")
    assert plan.summary["rows"] == [[8, 8, 8, 8]]
    assert of(boards, costs, LOAD, stages=1, micro_batch_size=32).summary["rows"] == [[20, 4, 4, 4]]
    tables = LayerTables(uneven(5, 1), unequal(1))
    ours, equal = Groups(tables, 8, 4), Groups(tables, 8, 4, offload=False, by_speed=False)
    found, best = Planner(equal, exact=True).best(), Planner(ours, exact=True).best()
    assert found is not None and best is not None
    assert all(max(stage.rows) - min(stage.rows) <= 1 for stage in found.stages)
    assert best.latency < found.latency == pytest.approx(least(equal, every(Plain(equal), by_memory(tables))))


def test_even_cuts_deal_out_layers_and_devices() -> None:
    """In the order of memory, with rows by speed in each group."""
    boards = cluster(5, speeds=(3.0, 1.0, 1.0, 2.0, 2.0), bandwidth=1e9)
    plan = of(boards, chain(6), LOAD, cuts="even", stages=2, micro_batch_size=8)
    assert plan.summary["layer_cuts"] == [[0, 3], [3, 6]]
    assert plan.summary["devices"] == [["device0", "device3", "device4"], ["device1", "device2"]]
    assert plan.summary["rows"] == [[4, 2, 2], [4, 4]]


def test_a_device_that_does_not_help_may_be_left_away() -> None:
    """The last of three has a link so slow that all are faster without it: two work, as if there were no third one."""
    costs, boards = chain(4, parameters=20_000), cluster(3, speeds=(2.0, 2.0, 1.0), bandwidth=1e6)
    boards = replace(boards, bandwidth={**boards.bandwidth, "device2": 1e2})
    pair = replace(boards, devices=boards.devices[:2])
    for how in PLANNERS:
        kept, left = (of(boards, costs, LOAD, planner=how, idle=idle) for idle in (False, True))
        assert len(kept.devices) == 3 and left.devices == ("device0", "device1")
        alone = of(pair, costs, LOAD, planner=how)
        trace = simulate(left, costs, boards)
        assert trace.devices == left.devices
        assert trace.total_s == simulate(alone, costs, pair).total_s < simulate(kept, costs, boards).total_s


@pytest.mark.parametrize(
    "options",
    [
        {"planner": "best"},
        {"offload": 1},
        {"idle": "no"},
        {"stages": 0},
        {"stages": 3},
        {"shares": "speed"},
        {"cuts": "layers"},
        {"cuts": "even"},
        {"warmup": "PB"},
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, object]) -> None:
    (name,) = options
    with pytest.raises(OrreryError, match=f"asteroid.{name}"):
        of(cluster(2), chain(4), LOAD, **options)
    with pytest.raises(OrreryError, match="chooses the number of stages"):
        of(cluster(2), chain(4), LOAD, planner="search", stages=2)
