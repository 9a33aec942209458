"""Simulated mode: the plan in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from harness.costs import Costs
from harness.errors import Unsupported
from harness.plan import Plan
from harness.registry import Finding
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
    dilation: float = 1.0
    emulation: None = None
    resumed_after_epoch: None = None
    recoveries: tuple[()] = ()
    whole_s: None = None


@contextmanager
def opened(testbed: Testbed) -> Iterator[Callable[..., Simulation]]:
    """The testbed, for as many runs as wanted. It needs no data: a data set is its size and shape here."""
    if testbed.events:
        raise Unsupported(f"{testbed.name} has events on its links, which happen in mode emulated only")

    def execute(plan: Plan, workload: Workload, costs: Costs, **how_for_real: object) -> Simulation:
        return Simulation(simulate(plan, costs, testbed.cluster))

    yield execute


def examine(testbed: Testbed) -> list[Finding]:
    """Virtual time needs nothing."""
    return []
