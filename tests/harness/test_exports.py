"""What the baselines plan goes into files and comes back, and means the same there."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from harness.cluster import Cluster
from harness.costs import Affine, Costs, ParameterCost, TensorCost, UnitCost, Work
from harness.errors import OrreryError
from harness.picture import gantt
from harness.plan import Plan
from harness.plan.serial import from_json, to_json
from harness.plan.text import describe
from harness.plan.validate import validate
from harness.simulator import simulate
from harness.trace import Event
from harness.trace_export import chrome_trace, read_chrome_trace, write_chrome_trace
from harness.workload import Workload
from testbeds import library

METHODS = ("standalone", "eddl", "gpipe", "pipedream_1f1b")
TESTBEDS = ("pac-nano-4", "demo-hetero-3")


def chain(num_units: int = 6) -> Costs:
    """Equal layers of a small transformer, in round numbers."""
    tensors = {f"hidden@{i}": TensorCost(128, 256, 4) for i in range(1, num_units + 1)}
    tensors["input_ids"] = TensorCost(128, 1, 8, needs_grad=False)
    parameters = {f"layer.{i}.weight": ParameterCost(10**6, 4, True) for i in range(num_units)}
    units = tuple(
        UnitCost(
            name=f"layer.{i}",
            layer=i,
            kind="layer",
            reads=(f"hidden@{i}",) if i else ("input_ids",),
            writes=(f"hidden@{i + 1}",),
            forward=Work(matmul=Affine(0, 2e8), kernels=Affine(10)),
            backward=Work(matmul=Affine(0, 4e8), kernels=Affine(20)),
            saved=Affine(0, 10**6),
            saves=(f"hidden@{i}",) if i else (),
            forward_workspace=Affine(0, 10**5),
            backward_workspace=Affine(0, 10**5),
            parameters=(f"layer.{i}.weight",),
        )
        for i in range(num_units)
    )
    return Costs("chain", units, (), tensors, parameters, ("input_ids",), training=True)


@pytest.fixture(params=[(method, testbed) for method in METHODS for testbed in TESTBEDS], ids="-".join)
def planned(request: pytest.FixtureRequest) -> tuple[Plan, Costs, Cluster]:
    """A plan of two epochs with a smaller last batch each."""
    method, testbed = request.param
    module = importlib.import_module(f"baselines.{method}")
    costs, cluster = chain(), library.load(testbed).cluster
    workload = Workload("chain", "synthetic", num_samples=37, batch_size=16, epochs=2, optimizer="adamw")
    return module.plan(workload, costs, cluster, {**module.OPTIONS, "micro_batch_size": 4}), costs, cluster


def test_a_plan_read_back_is_equal_valid_and_runs_the_same(planned: tuple[Plan, Costs, Cluster]) -> None:
    plan, costs, cluster = planned
    again = from_json(to_json(plan))
    assert again == plan
    assert len({id(phase) for phase in again.phases}) == len({id(phase) for phase in plan.phases}) == 2
    assert validate(again, costs) == validate(plan, costs)
    before, after = simulate(plan, costs, cluster), simulate(again, costs, cluster)
    assert (after.total_s, after.phases, after.peak_bytes) == (before.total_s, before.phases, before.peak_bytes)
    assert tuple(after.events) == tuple(before.events)


def test_the_text_names_every_action(planned: tuple[Plan, Costs, Cluster]) -> None:
    plan, _, _ = planned
    text = describe(plan, max_actions=1000)
    assert "left out" not in text
    distinct = {id(phase): phase for phase in plan.phases}.values()
    actions = [action for phase in distinct for actions in phase.actions.values() for action in actions]
    queues = ("    compute ", "    nic-", "    several ", "    - ", "    storage ")
    assert sum(line.startswith(queues) for line in text.splitlines()) == len(actions)
    assert text.count("phase ") == 2 + len(plan.phases)  # two of the four refer to the phase whose actions they share


def test_a_trace_in_chrome_is_the_trace(planned: tuple[Plan, Costs, Cluster]) -> None:
    trace = simulate(*planned)
    entries = json.loads(json.dumps(chrome_trace(trace)))["traceEvents"]
    slices = [entry for entry in entries if entry["ph"] == "X"]
    assert Counter((e["name"], e["cat"]) for e in slices) == Counter((e.label, e.kind) for e in trace.events)
    sent = sum(entry["args"]["bytes"] for entry in slices if entry["cat"] == "send")
    received = sum(entry["args"]["bytes"] for entry in slices if entry["cat"] == "recv")
    assert sent == received == sum(event.nbytes for event in trace.events if event.kind == "send")
    for pid, device in enumerate(trace.devices, start=1):
        counters = [entry["args"]["bytes"] for entry in entries if entry["ph"] == "C" and entry["pid"] == pid]
        assert max(counters) == trace.peak_bytes[device]


def rounded(event: Event) -> Event:
    return replace(event, start_s=round(event.start_s * 1e9) / 1e9, end_s=round(event.end_s * 1e9) / 1e9)


def test_a_trace_read_back_is_what_was_written(planned: tuple[Plan, Costs, Cluster], tmp_path: Path) -> None:
    trace = simulate(*planned)
    write_chrome_trace(trace, tmp_path / "trace.json")
    devices, events = read_chrome_trace(tmp_path / "trace.json")
    assert devices == trace.devices
    assert events == tuple(map(rounded, trace.events)), "times are whole nanoseconds, and all else is equal"
    write_chrome_trace(replace(trace, events=events), tmp_path / "again.json")
    assert read_chrome_trace(tmp_path / "again.json") == (devices, events)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"traceEvents": [{"ph": "X", "name": "F0", "pid": 1}]}', "\xff"])
def test_what_is_no_trace_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(OrreryError, match=rf"{path} is no trace of Orrery .*--force"):
        read_chrome_trace(path)
    with pytest.raises(OrreryError, match=r"nowhere\.json can't be read: No such file"):
        read_chrome_trace(tmp_path / "nowhere.json")


def test_slices_of_a_queue_do_not_overlap(planned: tuple[Plan, Costs, Cluster]) -> None:
    slices = [entry for entry in chrome_trace(simulate(*planned))["traceEvents"] if entry["ph"] == "X"]
    ends: dict[tuple[int, int], int] = {}
    for entry in slices:
        queue, start = (entry["pid"], entry["tid"]), round(entry["ts"] * 1e3)
        assert start >= ends.get(queue, 0)
        ends[queue] = start + round(entry["dur"] * 1e3)


def test_a_trace_is_drawn(planned: tuple[Plan, Costs, Cluster], tmp_path: Path) -> None:
    plan, costs, cluster = planned
    trace = simulate(plan, costs, cluster)
    budget = {device.name: device.memory_bytes for device in cluster.devices}
    gantt(trace, tmp_path / "picture.svg", memory_budget_bytes=budget)
    first = [
        event for event in trace.events if (event.phase, event.iteration) == (0, 0) and event.end_s > event.start_s
    ]
    svg = (tmp_path / "picture.svg").read_text()
    boxes = svg.split('id="PolyCollection_1"')[1].split("</g>")[0].count("<path")
    assert boxes == len(first)
