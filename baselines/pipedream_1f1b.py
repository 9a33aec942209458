"""Straight pipeline with the synchronous 1F1B schedule (PipeDream-Flush): one stage per device."""

from __future__ import annotations

from collections.abc import Mapping

from harness.cluster import Cluster
from harness.costs import Costs
from harness.plan import Plan
from harness.search import Layout, plan_pipeline, straight_stages
from harness.workload import Workload

OPTIONS: dict[str, object] = {"micro_batch_size": None}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """Cuts balanced by profiled time; stage p of P holds at most P - p micro-batches in flight."""

    def warmup(count: int) -> list[int]:
        return [len(cluster.devices) - p for p in range(len(cluster.devices))]

    def layout(size: int) -> Layout:
        return straight_stages(workload, costs, cluster, size, warmup), warmup

    return plan_pipeline("pipedream-1f1b", workload, costs, cluster, layout, options)
