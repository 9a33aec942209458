"""How long Asteroid's planners take for one micro-batch size. Run by `nox -s bench`."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from harness.layer_tables import LayerTables
from harness.workload import Workload
from systems import asteroid
from systems.asteroid.groups import Groups
from systems.asteroid.planner import Layout, Planner, searched
from tests.harness.toys import cluster
from tests.systems.asteroid.oracle import uneven

pytestmark = pytest.mark.benchmark

HOW = {
    "paper": lambda groups: Planner(groups).best(),
    "exact": lambda groups: Planner(groups, exact=True).best(),
    "search": searched,
}
#: Rows of a micro-batch, and micro-batches.
ROWS, COUNT = 16, 16


def tables(num_layers: int, num_devices: int, short: bool) -> LayerTables:
    """Devices that are all different, behind links on which a micro-batch takes about as long as a layer."""
    draw = random.Random(2)
    boards = cluster(num_devices, speeds=tuple(draw.uniform(1, 5) for _ in range(num_devices)))
    room = 1e6 * num_layers / num_devices if short else 1e15
    devices = tuple(replace(board, memory_bytes=int(room * draw.choice((0.4, 0.6, 0.9)))) for board in boards.devices)
    bandwidth = {device.name: draw.choice((2e2, 5e2, 1e3)) for device in devices}
    return LayerTables(uneven(num_layers, 1), replace(boards, devices=devices, bandwidth=bandwidth))


@pytest.mark.parametrize("memory", ["long", "short"])
@pytest.mark.parametrize("how", HOW)
def test_50_layers_on_8_devices(benchmark, how, memory):
    """Aim: under 1 s; the search, which looks at all orders, up to twice that."""

    def work() -> Layout | None:
        return HOW[how](Groups(tables(50, 8, memory == "short"), ROWS, COUNT))

    assert benchmark.pedantic(work, rounds=3) is not None


@pytest.mark.parametrize("memory", ["long", "short"])
@pytest.mark.parametrize("how", ["paper", "exact"])
def test_100_layers_on_32_devices(benchmark, how, memory):
    """Aim: under 60 s."""

    def work() -> Layout | None:
        return HOW[how](Groups(tables(100, 32, memory == "short"), ROWS, COUNT))

    assert benchmark.pedantic(work, rounds=1) is not None


@pytest.mark.parametrize("how", HOW)
def test_a_plan_of_50_layers_on_8_devices(benchmark, how):
    """All sizes of micro-batches, and the simulation of each."""
    load = Workload("toy", "toy", num_samples=64, batch_size=64)
    found = tables(50, 8, short=False)
    options = {**asteroid.OPTIONS, "planner": how}
    plan = benchmark.pedantic(lambda: asteroid.plan(load, found.costs, found.cluster, options), rounds=1)
    assert plan.summary["num_micro_batches"] >= 1
