"""The simulator against ratios that closed forms give under the same assumptions (`galaxy_derived.csv`).

Per layer, far from both ends of the model: 125 Mbit/s without overhead, no latency, a rate in proportion to the clock,
memory as fast as can be, connective blocks for nothing.
"""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest

from baselines import megatron, sequence_parallel
from harness import profile
from harness.cluster import Cluster, Device
from harness.costs import Costs
from harness.sharded import shared_block
from harness.simulator import simulate
from harness.workload import Workload
from systems import galaxy
from testbeds import library

CLOCKS = {"L": 1.47, "M": 0.921, "S": 0.403}
ENVIRONMENTS = {"A": "MM", "B": "MMM", "C": "MMMM", "D": "LM", "E": "LS", "F": "LMS"}
MODELS = {"Bert-L": "bert-large", "DistilBert": "distilbert", "GPT2-L": "gpt2-large"}
METHODS = {
    "M-LM (equal split)": (megatron, {}),
    "SP (equal split)": (sequence_parallel, {}),
    "Galaxy without overlap": (galaxy, {"overlap": False}),
}
LOCAL = "Local (fastest single device)"
#: The closed forms synchronise all devices at each all-gather; without that a slow device waits for nobody's keys.
ASYNCHRONOUS = {(env, "SP (equal split)") for env in "DEF"}
#: They round heads another way (8, 5, 3 and 11, 6, 3), or split Megatron's as if heads could be cut.
ROUNDED = {("F", baseline) for baseline in (*METHODS, LOCAL)} | {("B", "M-LM (equal split)")}
#: Of a Nano-M, as the library has it.
GFLOPS = 8
QUICK = {("Bert-L", "A"), ("Bert-L", "E"), ("DistilBert", "C")}

Row = dict[str, str]
with Path(str(files("results"))).joinpath("reference", "galaxy_derived.csv").open(encoding="utf-8") as file:
    ROWS: list[Row] = list(csv.DictReader(file))


@cache
def costs_of(model: str) -> Costs:
    return profile.count(Workload(MODELS[model], "qnli", 1, 1, technique="inference", seq_len=284))


def boards(environment: str, gflops: float) -> Cluster:
    devices = tuple(
        Device(f"device{i}", size, {"matmul": (gflops * 1e9 * CLOCKS[size] / CLOCKS["M"],) * 2}, 0.0, 10**12, math.inf)
        for i, size in enumerate(ENVIRONMENTS[environment])
    )
    return Cluster(environment, devices, {device.name: 125e6 / 8 for device in devices})


@cache
def layer_s(model: str, environment: str, gflops: float, baseline: str) -> float:
    """Seconds of a layer: from one attention core of the first device to another, some layers later."""
    costs, cluster = costs_of(model), boards(environment, gflops)
    if baseline == LOCAL:
        block = shared_block(costs)
        fastest = max(cluster.devices, key=lambda device: device.rates["matmul"])
        layers = sum(unit.kind == "attention" for unit in costs.units)
        return costs.seconds(fastest, block.first, block.last, "forward", 1) / layers
    method, options = METHODS.get(baseline, (galaxy, {}))
    load = Workload(MODELS[model], "qnli", 1, 1, technique="inference", seq_len=284)
    trace = simulate(method.plan(load, costs, cluster, {**method.OPTIONS, **options}), costs, cluster)
    starts = {}
    for event in trace.events:
        if (event.device, event.kind) == ("device0", "forward"):
            unit = costs.units[int(event.label.split(" ")[1].split(":")[0])]
            if unit.kind == "attention":
                starts.setdefault(unit.layer, event.start_s)
    first, last = sorted(starts)[2], sorted(starts)[-2]
    return (starts[last] - starts[first]) / (last - first)


def error(row: Row) -> float:
    where = row["model"], row["environment"], float(row["gemm_rate_gflops"])
    return layer_s(*where, row["baseline"]) / layer_s(*where, "galaxy") / float(row["speedup"]) - 1


@pytest.mark.parametrize("row", [row for row in ROWS if (row["model"], row["environment"]) in QUICK], ids=str)
def test_ratios_of_closed_forms_come_out(row: Row) -> None:
    tolerance = 0.1 if (row["environment"], row["baseline"]) in ASYNCHRONOUS else 0.03
    assert abs(error(row)) <= tolerance


@pytest.mark.slow
def test_all_of_them_but_those_with_a_reason() -> None:
    """How many are within 3 %, and what the others are off by."""
    far = {(row["environment"], row["baseline"], row["model"]): error(row) for row in ROWS if abs(error(row)) > 0.03}
    print(f"\n{sum(abs(error(row)) <= 0.03 for row in ROWS)} of {len(ROWS)} within 3 %; else {far}")
    assert {(environment, baseline) for environment, baseline, _ in far} <= ASYNCHRONOUS | ROUNDED
    assert max(map(abs, far.values())) < 0.16


#: What separates the closed forms from full profiles, added one after the other.
TERMS = ("one layer", "+ ends of the model", "+ headers", "+ latency", "+ memory traffic")


def terms(model: str, environment: str, baseline: str) -> tuple[list[float], float]:
    """The ratio after each term, and that of the library's testbed."""
    bed = library.load(f"galaxy-{environment.lower()}").cluster
    ideal = boards(environment, GFLOPS)
    shaped = replace(ideal, bandwidth=bed.bandwidth)
    late = replace(shaped, latency_s=bed.latency_s)
    full = replace(
        late,
        devices=tuple(
            replace(device, memory_bandwidth=board.memory_bandwidth)
            for device, board in zip(late.devices, bed.devices, strict=True)
        ),
    )
    roomy = replace(bed, devices=tuple(replace(device, memory_bytes=10**12) for device in bed.devices))
    layer = layer_s(model, environment, GFLOPS, baseline) / layer_s(model, environment, GFLOPS, "galaxy")
    steps = [layer, *(ratio(model, cluster, baseline) for cluster in (ideal, shaped, late, full))]
    return steps, ratio(model, roomy, baseline)


def ratio(model: str, cluster: Cluster, baseline: str) -> float:
    """How many times as long as Galaxy a whole request takes."""
    load, costs = Workload(MODELS[model], "qnli", 1, 1, technique="inference", seq_len=284), costs_of(model)
    found = []
    for method, options in (METHODS[baseline], (galaxy, {})):
        found.append(simulate(method.plan(load, costs, cluster, {**method.OPTIONS, **options}), costs, cluster).total_s)
    return found[0] / found[1]


@pytest.mark.slow
def test_from_closed_forms_to_full_profiles() -> None:
    """The difference of the library's cells from the closed forms, term by term; what is left are the rates' digits."""
    rows = [row for row in ROWS if float(row["gemm_rate_gflops"]) == GFLOPS]
    closed = {(row["model"], row["environment"], row["baseline"]): row["speedup"] for row in rows}
    print(f"\n| model | environment | baseline | closed form | {' | '.join(TERMS)} |\n|{'---|' * (4 + len(TERMS))}")
    for (model, environment, baseline), speedup in closed.items():
        if baseline == LOCAL:
            continue
        steps, of_library = terms(model, environment, baseline)
        print(f"| {model} | {environment} | {baseline} | {speedup} | {' | '.join(f'{step:.2f}' for step in steps)} |")
        assert steps[-1] == pytest.approx(of_library, rel=1e-3)
        assert max(abs(after / before - 1) for before, after in pairwise(steps)) < 0.03, "no term matters much"
