"""What runs on several devices are held against: one device, the simulator's bytes, and its own copies."""

from __future__ import annotations

import pytest
import torch

from harness import profile, reference
from harness.plan import Plan
from harness.schedules import Stage
from harness.simulator import simulate
from harness.trace import Trace
from harness.workload import Workload
from tests.harness.engine.devices import Trained
from tests.harness.toys import cluster


def simulated(plan: Plan, workload: Workload) -> Trace:
    return simulate(plan, profile.count(workload), cluster(len(plan.devices), memory_bandwidth=1e10))


def assert_equal(ours: Trained, oracle: reference.Reference, workload: Workload) -> None:
    """Losses to 1e-5, weights (with AdamW: moments) to 1e-5 of the largest; in float64 all; copies exactly."""
    exact = workload.dtype == "float64"
    limit = 1e-5 if not exact else 1e-8 if workload.clip_norm is None else 1e-6  # the norm is float32
    assert ours.execution.losses == pytest.approx(oracle.losses, abs=limit)
    wanted, found = oracle.state(), ours.state
    adaptive = workload.optimizer == "adamw"
    for device, tensors in found.items():
        assert any("/" in name for name in tensors) == (workload.optimizer != "sgd" and len(tensors) > 0)
        for kind in (False, True) if exact else (adaptive,):
            assert reference.max_rel_error(tensors, wanted, kind) <= limit, device
    assert {name for tensors in found.values() for name in tensors} == wanted.keys()
    for name in wanted:
        first, *others = (tensors[name] for tensors in found.values() if name in tensors)
        assert all(torch.equal(first, other) for other in others), name


def assert_reported(ours: Trained, plan: Plan, workload: Workload) -> None:
    """The bytes on every link are the simulator's, and only the last stage has a loss to tell."""
    assert dict(ours.execution.trace.link_bytes) == dict(simulated(plan, workload).link_bytes)
    num_units = len(profile.count(workload).units)
    for device, report in ours.reports.items():
        assert len(report.losses) == sum(phase.repeat for phase in plan.phases)
        if plan.phases[0].shards[device].units[1] < num_units:
            assert not any(report.losses)


def assert_buffers(ours: Trained, oracle: reference.Reference, plan: Plan) -> None:
    """Batch norm's statistics are local: those of a stage's first device are the oracle's."""
    wanted, seen = dict(oracle.layered.root.named_buffers()), set()
    for device in first_devices(plan):
        for name, buffer in ours.shards[device].layered.root.named_buffers():
            if not buffer.is_meta:
                torch.testing.assert_close(buffer, wanted[name], rtol=1e-6, atol=1e-7, msg=name)
                seen.add(name)
    assert seen == wanted.keys()


def first_devices(plan: Plan) -> list[str]:
    """Of each stage."""
    first: dict[tuple[int, int], str] = {}
    for device, shard in plan.phases[0].shards.items():
        first.setdefault(shard.units, device)
    return list(first.values())


def layered_stages(workload: Workload, groups: list[tuple[int, tuple[float, ...]]]) -> list[Stage]:
    """Stages of (number of layers, shares of the devices), on device0, device1 and so on; the rest are the last's."""
    costs = profile.count(workload)
    stages, first_layer, first_device = [], 0, 0
    for number, (layers, shares) in enumerate(groups):
        last_layer = first_layer + layers if number + 1 < len(groups) else len(costs.layers)
        units = (costs.layers[first_layer][0], costs.layers[last_layer - 1][1])
        devices = tuple(f"device{first_device + i}" for i in range(len(shares)))
        stages.append(Stage(units, devices, shares))
        first_layer, first_device = last_layer, first_device + len(shares)
    return stages
