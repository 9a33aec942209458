"""Tensor parallelism (Megatron-LM, arXiv 1909.08053): heads and columns by device, two ring all-reduces per layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from harness.cluster import Cluster
from harness.costs import Costs
from harness.plan import Plan
from harness.search import fastest, first_fitting, micro_batch_sizes
from harness.sharded import LEADER, TENSOR, known_embeddings, plan_sharded, shares_of, whole_tiles
from harness.workload import Workload

#: shares: of heads and columns, "equal" as in the original, or in proportion to "speed". tiles: pieces of each device's
#: chunk on its way round the ring. embeddings: with the "leader", who hands out what they make, or "everywhere".
#: micro_batch_size: in training, the largest that fits unless it is given: cutting a batch only saves memory here.
OPTIONS: dict[str, object] = {"shares": "equal", "tiles": 1, "embeddings": LEADER, "micro_batch_size": None}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """Every device has the whole of what enters a layer; what lies between the products is computed by each of them."""
    shares = shares_of(costs, cluster, workload.batch_size, str(options["shares"]), tokens=False)
    tiles, embeddings = whole_tiles("megatron", options), known_embeddings("megatron", options)

    def everybody(size: int | None = None) -> Plan:
        return plan_sharded("megatron", workload, costs, cluster.names, TENSOR, shares, False, tiles, embeddings, size)

    if costs.training:
        sizes = micro_batch_sizes(workload.batch_size, options["micro_batch_size"])
        return first_fitting([partial(everybody, size) for size in sizes], costs, cluster).plan
    return fastest([everybody], costs, cluster)
