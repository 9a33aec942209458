"""Simulated mode: the plan in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import Unsupported
from harness.faults import Fault
from harness.plan import Plan
from harness.recovery import Change, Resumed
from harness.registry import Finding
from harness.simulator import simulate
from harness.trace import Trace
from harness.workload import Workload
from testbeds.library import Testbed
from testbeds.simulation.recovery import run


@dataclass(frozen=True)
class Simulation:
    """The trace of a run that computed nothing, so that it has no losses. Of one whose devices changed it is
    the trace of what came after the last change; all took `whole_s`."""

    trace: Trace
    losses: tuple[float, ...] = ()
    metric: None = None
    max_rel_error: None = None
    dilation: float = 1.0
    emulation: None = None
    resumed_after_epoch: None = None
    recoveries: Sequence[Mapping[str, Any]] = ()
    whole_s: float | None = None


@contextmanager
def opened(testbed: Testbed) -> Iterator[Callable[..., Simulation]]:
    """The testbed, for as many runs as wanted. It needs no data: a data set is its size and shape here."""
    if testbed.events:
        raise Unsupported(f"{testbed.name} has events on its links, which happen in mode emulated only")

    def execute(
        plan: Plan,
        workload: Workload,
        costs: Costs,
        faults: Sequence[Fault] = (),
        replan: Callable[[Cluster, Change], Resumed | None] | None = None,
        **how_for_real: object,
    ) -> Simulation:
        if not faults or replan is None:
            return Simulation(simulate(plan, costs, testbed.cluster))
        trace, recoveries, whole_s = run(plan, costs, testbed.cluster, faults, replan, testbed.heartbeat_timeout_s)
        return Simulation(trace, recoveries=recoveries, whole_s=whole_s)

    yield execute


def examine(testbed: Testbed) -> list[Finding]:
    """Virtual time needs nothing."""
    return []
