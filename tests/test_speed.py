"""How fast planning, simulating and profiling are. Run by `nox -s bench`."""

from __future__ import annotations

import resource

import pytest

from baselines import gpipe
from harness import profile
from harness.models import build
from harness.plan import Collective, Plan
from harness.plan.collectives import expand
from harness.profile.counting import count_units
from harness.schedules import Pipeline, Stage, micro_batches
from harness.simulator import simulate
from harness.workload import Workload
from tests.harness.toys import chain, cluster

pytestmark = pytest.mark.benchmark


def test_plan_and_simulate_4_stages_of_64_micro_batches(benchmark):
    costs, testbed = chain(24), cluster(4, latency_s=1e-4)
    workload = Workload("toy", "toy", num_samples=64, batch_size=64)

    def work():
        return simulate(gpipe.plan(workload, costs, testbed, {**gpipe.OPTIONS, "micro_batch_size": 1}), costs, testbed)

    assert benchmark(work).total_s > 0


def test_a_thousand_devices_and_a_million_actions(benchmark):
    """16 stages of at most 64 devices; aim: under 10 s and 2 GB."""
    costs, testbed = chain(16, parameters=6400), cluster(1000)
    groups = [testbed.names[first : first + 64] for first in range(0, 1000, 64)]
    stages = tuple(Stage((p, p + 1), group, (1,) * len(group)) for p, group in enumerate(groups))

    def work():
        pipeline = Pipeline(costs, stages)
        phase = pipeline.phase(micro_batches(80 * 64, 64), [len(stages) - p for p in range(len(stages))])
        return phase, simulate(Plan("bench", 16, pipeline.tensors, (phase,)), costs, testbed)

    phase, trace = benchmark.pedantic(work, rounds=3)
    actions = sum(
        sum(1 for _ in expand(action, device, 6400)) if isinstance(action, Collective) else 1
        for device, listed in phase.actions.items()
        for action in listed
    )
    assert actions >= 10**6
    assert trace.total_s > 0
    benchmark.extra_info["expanded_actions"] = actions
    benchmark.extra_info["peak_rss_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


T5_LARGE = Workload("t5-large", "mrpc", num_samples=3668, batch_size=16)


def test_profile_of_t5_large_cold(benchmark):
    assert benchmark.pedantic(lambda: count_units(build(T5_LARGE, "meta"), T5_LARGE), rounds=3).units


def test_profile_of_t5_large_warm(benchmark):
    profile.count(T5_LARGE)
    assert benchmark(lambda: profile.count(T5_LARGE)).units
