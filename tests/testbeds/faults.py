"""Stages of one, two and one device, a snapshot every third round, and the faults that may strike them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest

from harness import runner
from harness.cluster import Cluster
from harness.costs import Costs
from harness.engine import Execution
from harness.experiment import one
from harness.faults import CRASH, HEARTBEAT_TIMEOUT_S, faults_of
from harness.plan import Plan
from harness.recovery import Change, Resumed, stages_of
from harness.replication import replicated
from harness.schedules import Pipeline, Stage
from harness.workload import Workload
from systems import asteroid
from systems.asteroid.recovery import topology

DEVICES = tuple(f"device{number}" for number in range(4))
ROUNDS, PERIOD, MICRO_BATCHES = 10, 3, 4
ASKED = {
    "model": "bert-tiny",
    "dataset": "synthetic",
    "num_samples": 80,
    "batch_size": 8,
    "steps": ROUNDS,
    "seq_len": 16,
    "dropout": 0.1,
    "optimizer": "sgd-momentum",
    "learning_rate": 0.05,
    "method": "asteroid",
    "mode": "emulated",
}
OPTIONS = {**asteroid.OPTIONS, "replication_period": PERIOD}
#: Warm-up, steady state, drain, update; and while a snapshot is taken, of which the second half is sent.
PASSES = ["forward", "forward 1", "forward 3", "backward", "backward 2", "backward 3"]
EVERYWHERE = ["", *(f" during {moment}" for moment in (*PASSES, "update", "replication"))]
POINTS = {
    "device0": [*EVERYWHERE, " during replication 3"],
    "device1": [*EVERYWHERE, " during all-reduce"],
    "device2": [*EVERYWHERE, " during all-reduce 1"],
    "device3": [*EVERYWHERE, " during replication 3"],
}


def grid(kinds: tuple[str, ...]) -> list[str]:
    """Every kind on every device at every point, in a round that the seed draws."""
    draw, found = random.Random(7), []
    for kind in kinds:
        for device, points in POINTS.items():
            for point in points:
                step = draw.choice((3, 6, 9)) if "replication" in point else draw.randrange(ROUNDS)
                found.append(f"{kind} {device} at step {step}{point}")
    return found


def marked(faults: list[str], always: int) -> list[Any]:
    """Some of them, by the seed, always; the rest are slow."""
    chosen = set(random.Random(3).sample(faults, always))
    return [fault if fault in chosen else pytest.param(fault, marks=pytest.mark.slow) for fault in faults]


@dataclass(frozen=True)
class Bed:
    """An open testbed, and what is run on it."""

    execute: Callable[..., Execution]
    cluster: Cluster
    workload: Workload
    costs: Costs
    plan: Plan

    def run(self, faults: str = "", recovery: str = asteroid.LIGHTWEIGHT, straggler: float | None = None) -> Execution:
        options = {**OPTIONS, "recovery": recovery, "straggler": straggler}

        def replan(cluster: Cluster, change: Change) -> Resumed | None:
            return asteroid.replan(self.workload, self.costs, cluster, options, change)

        asked = faults_of(faults, DEVICES) if faults else ()
        return self.execute(self.plan, self.workload, self.costs, verify=True, faults=asked, replan=replan)


def opened(testbed: str, execute: Callable[..., Execution], rounds: int = ROUNDS) -> Bed:
    request = one({**ASKED, "testbed": testbed, "steps": rounds}, {})
    costs, _ = runner.make_plan(request)
    plan = plan_of(("device0",), ("device1", "device2"), ("device3",), costs=costs, rounds=rounds)
    return Bed(execute, request.testbed.cluster, request.workload, costs, plan)


def plan_of(*groups: tuple[str, ...], costs: Costs, rounds: int = ROUNDS) -> Plan:
    """Stages of these devices, each of about as many layers, with snapshots."""
    cuts = [0, *(costs.layers[round(len(costs.layers) * n / len(groups))][0] for n in range(1, len(groups)))]
    ranges = pairwise((*cuts, len(costs.units)))
    stages = tuple(Stage(units, group, (1.0,) * len(group)) for units, group in zip(ranges, groups, strict=True))
    pipeline = Pipeline(costs, stages, ASKED["optimizer"])
    warmup = [min(MICRO_BATCHES, 2 * behind - 1) for behind in range(len(groups), 0, -1)]
    phase = pipeline.phase((2,) * MICRO_BATCHES, warmup, repeat=rounds)
    plan = Plan("asteroid", len(costs.units), pipeline.tensors, (phase,))
    return replicated(plan, topology(stages_of(plan)), PERIOD)


def check(found: Execution, undisturbed: Execution, fault: str) -> None:
    """No round is lost or counted twice, and all that was trained is as it would be; it was known in time."""
    (recovery,) = found.recoveries
    assert recovery["fault"] == fault
    assert found.max_rel_error is not None and found.max_rel_error < 1e-5
    assert found.losses == pytest.approx(undisturbed.losses, rel=1e-5)
    kind, _, _, _, step, *during = fault.split()
    assert recovery["in_round"] == int(step)
    back = int(step) - (PERIOD if "replication" in during else int(step) % PERIOD)
    assert recovery["back_to_round"] == max(back, 0)
    limit = 0.5 if kind == CRASH else HEARTBEAT_TIMEOUT_S + 0.5
    assert isinstance(recovery["detect_s"], float) and recovery["detect_s"] < limit
