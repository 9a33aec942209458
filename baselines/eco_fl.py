"""Eco-FL's pipeline inside a client, as PAC compares with it: 1F1B, one stage per device, memory first.

Source: Eco-FL (ICPP 2022) as described in PAC, section 6.1. A stage holds layers of the encoder or of the decoder, as
in PAC's released code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import OutOfMemory
from harness.plan import Plan
from harness.search import TIME, Layout, plan_pipeline, straight_stages
from harness.workload import Workload

OPTIONS: dict[str, object] = {"micro_batch_size": None, "cuts": TIME}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """Cuts balanced by profiled time. Where memory is short: smaller micro-batches, then fewer of them in flight."""
    count = len(cluster.devices)
    misses: list[OutOfMemory] = []
    for most in range(count, 0, -1):

        def warmup(_: int, most: int = most) -> Sequence[int]:
            return [min(count - p, most) for p in range(count)]

        def layout(size: int, warmup: Callable[[int], Sequence[int]] = warmup) -> Layout:
            return straight_stages(
                workload, costs, cluster, size, warmup, whole_stacks=True, cuts=options["cuts"]
            ), warmup

        try:
            return plan_pipeline("eco-fl", workload, costs, cluster, layout, options)
        except OutOfMemory as miss:
            misses.append(miss)
    raise min(misses, key=lambda miss: miss.needed_bytes - miss.available_bytes)
