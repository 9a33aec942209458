"""Simulated mode: the plan in virtual time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.costs import Costs
from harness.plan import Plan
from harness.simulator import simulate
from harness.trace import Trace
from harness.workload import Workload
from testbeds.library import Testbed


@dataclass(frozen=True)
class Simulation:
    """The trace of a run that computed nothing, so that it has no losses."""

    trace: Trace
    losses: tuple[float, ...] = ()
    metric: None = None
    max_rel_error: None = None


def execute(plan: Plan, workload: Workload, costs: Costs, testbed: Testbed, data_dir: Path | None = None) -> Simulation:
    """Needs no data: a data set is its size and shape here."""
    return Simulation(simulate(plan, costs, testbed.cluster))
