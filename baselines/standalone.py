"""One device trains the whole model alone, accumulating gradients over micro-batches when memory is short."""

from __future__ import annotations

from collections.abc import Mapping

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import Unsupported, unknown_name
from harness.layer_tables import LayerTables
from harness.plan import Plan
from harness.schedules import Stage
from harness.search import fastest, plan_pipeline
from harness.sharded import SEQUENCE, even_shares, plan_sharded
from harness.workload import Workload

FASTEST = "fastest"
#: device: which one, by name, or the "fastest"; the cluster's first unless said otherwise.
OPTIONS: dict[str, object] = {"micro_batch_size": None, "device": None}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """One of the cluster's devices does everything; the others stand idle and are no part of the plan."""
    device = str(options.get("device") or cluster.names[0])
    if device == FASTEST:
        speeds = LayerTables(costs, cluster, workload.optimizer).speeds
        device = cluster.names[speeds.index(max(speeds))]
    if device not in cluster.names:
        raise unknown_name("device of the testbed", device, (FASTEST, *cluster.names))
    if workload.new_tokens is not None:
        if options.get("micro_batch_size") is not None:
            raise Unsupported("tokens are generated for a whole request: leave standalone.micro_batch_size away")
        shares = even_shares(costs, 1)
        return fastest(
            [lambda: plan_sharded("standalone", workload, costs, [device], SEQUENCE, shares)], costs, cluster
        )
    stage = Stage((0, len(costs.units)), (device,), (1,))
    return plan_pipeline("standalone", workload, costs, cluster, lambda size: ([stage], lambda count: [1]), options)
