"""Emulated mode: the plan for real, on this machine. So far one device, unshaped, in this process (`local-1`)."""

from __future__ import annotations

from pathlib import Path

from harness import datasets, engine, models
from harness.costs import Costs
from harness.engine import Execution
from harness.plan import Plan
from harness.threads import one_thread
from harness.workload import Workload
from testbeds.library import Testbed


def execute(plan: Plan, workload: Workload, costs: Costs, testbed: Testbed, data_dir: Path | None = None) -> Execution:
    """Real model, real data, real optimizer, for the plan of one device."""
    dataset = datasets.load(workload, data_dir)
    with one_thread():
        return engine.execute(plan, workload, models.build(workload), dataset)
