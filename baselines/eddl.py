"""Data parallelism (EDDL, SEC'21): the whole model on every device, one ring all-reduce of the gradients per batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.cluster import Cluster
from harness.costs import BACKWARD, FORWARD, Costs
from harness.errors import unknown_name
from harness.plan import Plan
from harness.schedules import Stage
from harness.search import Layout, plan_pipeline
from harness.workload import Workload

#: shares: rows of a micro-batch per device, "equal" or in proportion to "speed".
OPTIONS: dict[str, object] = {"micro_batch_size": None, "shares": "equal"}
VARIANTS = {"shares": ["equal", "speed"]}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """One stage on all devices. Equal shares unless `shares=speed` (doi 10.1145/3453142.3491286 for the original)."""
    if options["shares"] not in ("equal", "speed"):
        raise unknown_name("way to share rows", str(options["shares"]), ("equal", "speed"))
    units = (0, len(costs.units))

    def layout(size: int) -> Layout:
        even = -(-size // len(cluster.devices))
        shares = _speeds(costs, cluster, even) if options["shares"] == "speed" else [1.0] * len(cluster.devices)
        return [Stage(units, cluster.names, tuple(shares))], lambda count: [1]

    return plan_pipeline("eddl", workload, costs, cluster, layout, options)


def _speeds(costs: Costs, cluster: Cluster, rows: int) -> Sequence[float]:
    """Rows per second of each device over the whole model."""
    directions = (FORWARD, BACKWARD) if costs.training else (FORWARD,)
    return [
        rows / sum(costs.seconds(device, 0, len(costs.units), direction, rows) for direction in directions)
        for device in cluster.devices
    ]
