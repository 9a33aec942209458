"""Asteroid's equations, its two algorithms, and what they leave behind, against closed forms and brute force."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, permutations
from statistics import fmean, median

import pytest

from baselines import eddl
from harness.cluster import Cluster
from harness.costs import BACKWARD, FORWARD, Affine, Costs
from harness.errors import OrreryError
from harness.layer_tables import LayerTables
from harness.plan import Compute, Plan
from harness.plan.validate import validate
from harness.schedules import Pipeline, Stage, one_f_one_b
from harness.simulator import simulate
from harness.workload import Workload
from systems import asteroid
from systems.asteroid.equations import Step, dominant, in_flight, latency, tail
from systems.asteroid.planner import Groups, Layout, Placed, Planner, by_memory, searched
from systems.asteroid.shares import balanced, offloaded
from tests.harness.toys import chain, cluster


def steps(seed: int, stages: int = 3) -> list[Step]:
    """Execution and communication steps in turn."""
    draw = random.Random(seed)
    found = []
    for s in range(2 * stages - 1):
        forward, backward = draw.uniform(0.5, 2), draw.uniform(0.5, 4)
        found.append(Step(forward, backward, draw.uniform(0, 20) if s % 2 == 0 else 0.0))
    return found


def unequal(seed: int, count: int = 4, memory: bool = False) -> Cluster:
    """Devices of very different speed, behind links of different rate."""
    draw = random.Random(seed)
    found = cluster(count, speeds=tuple(draw.choice((1.0, 2.0, 3.5, 5.0)) for _ in range(count)))
    devices = tuple(
        replace(device, memory_bytes=draw.choice((40_000, 60_000, 90_000)) if memory else 10**12 + draw.randrange(9))
        for device in found.devices
    )
    return replace(found, devices=devices, bandwidth={d.name: draw.choice((2e4, 1e5, 1e6)) for d in devices})


def uneven(layers: int, seed: int) -> Costs:
    """Layers of different work and size."""
    draw, costs = random.Random(seed), chain(layers)
    units = tuple(
        replace(
            unit,
            forward=scaled(unit.forward, draw.uniform(0.2, 2)),
            backward=scaled(unit.backward, draw.uniform(0.2, 2)),
        )
        for unit in costs.units
    )
    parameters = {name: replace(p, numel=draw.choice((100, 1000, 5000))) for name, p in costs.parameters.items()}
    return replace(costs, key=f"uneven {layers} {seed}", units=units, parameters=parameters)


def scaled(work, by: float):  # type: ignore[no-untyped-def]
    return work._replace(matmul=Affine(work.matmul.fixed * by, work.matmul.per_row * by))


def every(planner: Planner) -> Iterator[tuple[Placed, ...]]:
    """All ways to cut the layers, and the order of the devices, into stages that fit."""

    def behind(first: int, place: int) -> Iterator[tuple[Placed, ...]]:
        layers, devices = planner.tables.num_layers, len(planner.order)
        if (first, place) == (layers, devices):
            yield ()
        for last in range(first + 1, layers + 1):
            for end in range(place + 1, devices + 1):
                for rest in behind(last, end):
                    stage = planner.groups.stage((first, last), planner.order[place:end], len(rest))
                    if stage is not None:
                        yield (stage, *rest)

    return behind(0, 0)


def best_of_all(planner: Planner) -> float:
    return min((planner.latency(stages) for stages in every(planner)), default=float("inf"))


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


def test_shares_follow_speed_and_memory_and_stragglers_give_away() -> None:
    assert balanced(16, [3, 1], [16, 16]) == [12, 4]
    assert balanced(16, [3, 1, 1], [6, 16, 16]) == [6, 5, 5]
    assert balanced(16, [3, 1], [8, 7]) is None
    quick = [0.0, *(4.0 + 0.1 * y for y in range(1, 9))]  # a batch costs much, a row nothing
    slow = [1.0 * y for y in range(9)]
    assert offloaded([4, 4], [quick, slow], [8, 8]) == [4, 4]
    assert offloaded([2, 6], [quick, slow], [8, 8]) == [4, 4]
    assert offloaded([2, 6], [quick, slow], [3, 8]) == [3, 5]
    assert max(quick[4], slow[4]) == min(max(quick[y], slow[8 - y]) for y in range(9))


@pytest.mark.parametrize("seed", range(12))
def test_exact_is_the_best_of_its_order_and_search_of_all(seed: int) -> None:
    tables = LayerTables(uneven(5, seed), unequal(seed, memory=seed % 3 == 0))
    groups = Groups(tables, 8, 4)
    exact, paper = Planner(groups, exact=True), Planner(groups)
    best = best_of_all(exact)
    if best == float("inf"):
        assert exact.best() is None and paper.best() is None
        return
    found, heuristic = exact.best(), paper.best()
    assert found is not None and heuristic is not None
    assert found.latency == pytest.approx(best)
    assert heuristic.latency >= best * (1 - 1e-9)
    assert heuristic.latency == pytest.approx(paper.latency(heuristic.stages))
    overall = min(best_of_all(Planner(groups, order)) for order in permutations(range(4)))
    climbed = searched(groups)
    assert climbed is not None and overall * (1 - 1e-9) <= climbed.latency <= best * (1 + 1e-9)


def test_what_the_planners_leave_behind(capsys: pytest.CaptureFixture[str]) -> None:
    """By their own equations, against the best of all orders and cuts: small random unequal clusters."""
    behind: dict[str, list[float]] = {"paper": [], "exact": [], "search": []}
    for seed in range(30):
        tables = LayerTables(uneven(5, 100 + seed), unequal(100 + seed))
        groups = Groups(tables, 8, 4)
        best = min(best_of_all(Planner(groups, order)) for order in permutations(range(4)))
        found: dict[str, Layout | None] = {
            "paper": Planner(groups).best(),
            "exact": Planner(groups, exact=True).best(),
            "search": searched(groups),
        }
        for how, layout in found.items():
            assert layout is not None
            behind[how].append(layout.latency / best - 1)
    with capsys.disabled():
        for how, losses in behind.items():
            losses.sort()
            print(f"\n{how}: median {median(losses):.1%}, p90 {losses[26]:.1%}, most {losses[-1]:.1%}", end="")
        print()
    assert median(behind["search"]) <= median(behind["exact"]) <= median(behind["paper"])


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
    assert best.latency < found.latency == pytest.approx(best_of_all(Planner(equal)))


def test_even_cuts_deal_out_layers_and_devices() -> None:
    """In the order of memory, with rows by speed in each group."""
    boards = cluster(5, speeds=(3.0, 1.0, 1.0, 2.0, 2.0), bandwidth=1e9)
    plan = of(boards, chain(6), LOAD, cuts="even", stages=2, micro_batch_size=8)
    assert plan.summary["layer_cuts"] == [[0, 3], [3, 6]]
    assert plan.summary["devices"] == [["device0", "device3", "device4"], ["device1", "device2"]]
    assert plan.summary["rows"] == [[4, 2, 2], [4, 4]]


@pytest.mark.parametrize(
    "options",
    [
        {"planner": "best"},
        {"offload": 1},
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
