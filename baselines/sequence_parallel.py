"""Sequence parallelism: tokens by device, whole weights on each, keys and values all-gathered in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from harness.cluster import Cluster
from harness.costs import Costs
from harness.plan import Plan
from harness.search import fastest, first_fitting, micro_batch_sizes
from harness.sharded import LEADER, SEQUENCE, known_embeddings, plan_sharded, shares_of, whole_tiles
from harness.workload import Workload

#: shares: of tokens, "equal" or in proportion to "speed". tiles: pieces of each share on its way round the ring.
#: embeddings: with the "leader", who hands out what they make, or "everywhere".
#: micro_batch_size: in training, the largest that fits unless it is given: cutting a batch only saves memory here.
OPTIONS: dict[str, object] = {"shares": "equal", "tiles": 1, "embeddings": LEADER, "micro_batch_size": None}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """The first device leads: it has the head, and collects the tokens in the end."""
    shares = shares_of(costs, cluster, workload.batch_size, str(options["shares"]), tokens=True)
    name = "sequence-parallel"
    tiles, embeddings = whole_tiles(name, options), known_embeddings(name, options)

    def everybody(size: int | None = None) -> Plan:
        return plan_sharded(name, workload, costs, cluster.names, SEQUENCE, shares, False, tiles, embeddings, size)

    if costs.training:
        sizes = micro_batch_sizes(workload.batch_size, options["micro_batch_size"])
        return first_fitting([partial(everybody, size) for size in sizes], costs, cluster).plan
    return fastest([everybody], costs, cluster)
