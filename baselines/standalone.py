"""One device trains the whole model alone, accumulating gradients over micro-batches when memory is short."""

from __future__ import annotations

from collections.abc import Mapping

from harness.cluster import Cluster
from harness.costs import Costs
from harness.plan import Plan
from harness.schedules import Stage
from harness.search import plan_pipeline
from harness.workload import Workload

OPTIONS: dict[str, object] = {"micro_batch_size": None}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """The cluster's first device does everything; the others stand idle and are no part of the plan."""
    stage = Stage((0, len(costs.units)), cluster.names[:1], (1,))
    return plan_pipeline("standalone", workload, costs, cluster, lambda size: ([stage], lambda count: [1]), options)
