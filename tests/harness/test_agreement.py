"""The simulator, fed with this machine's measured unit times, against real training on this machine."""

from __future__ import annotations

import dataclasses
import statistics

import pytest

from baselines import standalone
from harness import datasets, engine, models, profile
from harness.optimizers import optimizer_for
from harness.profile.measure import LOCAL, measure_units
from harness.simulator import simulate
from testbeds.library import load
from tests.harness.test_engine import GLUE, IMAGES, TEXT, needs_glue

pytestmark = pytest.mark.benchmark  # two timings are compared, so nothing else should run beside it
ROUNDS = 15


@pytest.mark.parametrize("workload", [pytest.param(TEXT, marks=needs_glue), IMAGES], ids=["bert-tiny", "resnet-tiny"])
def test_simulated_time_is_that_of_the_real_run(workload):
    """Median of rounds in which profile and real run follow each other: a machine's speed changes meanwhile."""
    cluster = load("local-1").cluster
    dataset = datasets.load(workload, GLUE if workload.dataset == "mrpc" else None)
    counted = profile.count(workload)
    ratios = []
    for _ in range(ROUNDS):
        layered = models.build(workload)
        optimizer = optimizer_for(workload, list(layered.root.parameters()))
        timed = measure_units(layered, optimizer, lambda rows: dataset.batch(range(rows)), [16], repeats=5)
        costs = dataclasses.replace(counted, measured={LOCAL: timed.seconds})
        plan = standalone.plan(workload, costs, cluster, {"micro_batch_size": 16})
        real = engine.execute(plan, workload, models.build(workload), dataset).trace
        simulated = simulate(plan, costs, cluster)
        ratios.append(simulated.phases[0].iteration_s[-1] / statistics.median(real.phases[0].iteration_s))
    print(f"{workload.model}: simulated / real {statistics.median(ratios):.3f}, rounds {sorted(ratios)}")
    assert statistics.median(ratios) == pytest.approx(1, abs=0.15), ratios
