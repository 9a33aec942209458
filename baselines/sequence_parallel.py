"""Sequence parallelism: tokens by device, whole weights on each, keys and values all-gathered in every layer."""

from __future__ import annotations

from collections.abc import Mapping

from harness.cluster import Cluster
from harness.costs import Costs
from harness.plan import Plan
from harness.search import fastest
from harness.sharded import LEADER, SEQUENCE, known_embeddings, plan_sharded, shares_of, whole_tiles
from harness.workload import Workload

#: shares: of tokens, "equal" or in proportion to "speed". tiles: pieces of each share on its way round the ring.
#: embeddings: with the "leader", who hands out what they make, or "everywhere".
OPTIONS: dict[str, object] = {"shares": "equal", "tiles": 1, "embeddings": LEADER}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """The first device leads: it has the head, and collects the tokens in the end."""
    shares = shares_of(costs, cluster, workload.batch_size, str(options["shares"]), tokens=True)
    name = "sequence-parallel"
    tiles, embeddings = whole_tiles(name, options), known_embeddings(name, options)

    def everybody() -> Plan:
        return plan_sharded(name, workload, costs, cluster.names, SEQUENCE, shares, False, tiles, embeddings)

    return fastest([everybody], costs, cluster)
