"""Straight pipeline with the synchronous 1F1B schedule (PipeDream-Flush): one stage per device."""

from __future__ import annotations

from collections.abc import Mapping

from harness.cluster import Cluster
from harness.costs import Costs
from harness.plan import Plan
from harness.schedules import Stage
from harness.search import balanced_cuts, plan_pipeline
from harness.workload import Workload

OPTIONS: dict[str, object] = {"micro_batch_size": None}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """Cuts balanced by profiled time; stage p of P holds at most P - p micro-batches in flight."""

    def layout(size: int) -> tuple[list[Stage], object]:
        cuts = balanced_cuts(costs, cluster, cluster.names, size)
        stages = [Stage(units, (device,), (1,)) for units, device in zip(cuts, cluster.names, strict=True)]
        return stages, lambda count: [len(stages) - p for p in range(len(stages))]

    return plan_pipeline("pipedream-1f1b", workload, costs, cluster, layout, options)
