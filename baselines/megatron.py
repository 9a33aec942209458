"""Tensor parallelism (Megatron-LM, arXiv 1909.08053): heads and columns by device, two ring all-reduces per layer."""

from __future__ import annotations

from collections.abc import Mapping

from harness.cluster import Cluster
from harness.costs import Costs
from harness.plan import Plan
from harness.search import fastest
from harness.sharded import LEADER, TENSOR, known_embeddings, plan_sharded, shares_of, whole_tiles
from harness.workload import Workload

#: shares: of heads and columns, "equal" as in the original, or in proportion to "speed". tiles: pieces of each device's
#: chunk on its way round the ring. embeddings: with the "leader", who hands out what they make, or "everywhere".
OPTIONS: dict[str, object] = {"shares": "equal", "tiles": 1, "embeddings": LEADER}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """Every device has the whole of what enters a layer; what lies between the products is computed by each of them."""
    shares = shares_of(costs, cluster, workload.batch_size, str(options["shares"]), tokens=False)
    tiles, embeddings = whole_tiles("megatron", options), known_embeddings("megatron", options)

    def everybody() -> Plan:
        return plan_sharded("megatron", workload, costs, cluster.names, TENSOR, shares, False, tiles, embeddings)

    return fastest([everybody], costs, cluster)
