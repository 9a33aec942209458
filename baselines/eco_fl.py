"""Eco-FL's pipeline inside a client, as PAC compares with it: 1F1B, one stage per device, memory first.

Source: Eco-FL (ICPP 2022) as described in PAC, section 6.1. A stage holds layers of the encoder or of the decoder, as
in PAC's released code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.cluster import Cluster
from harness.costs import Costs
from harness.plan import Plan
from harness.schedules import micro_batches
from harness.search import Layout, plan_pipeline, stage_bytes, straight_stages
from harness.workload import Workload

OPTIONS: dict[str, object] = {"micro_batch_size": None}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """Cuts balanced by profiled time. Where memory is short: smaller micro-batches, or fewer of them in flight."""
    count = len(cluster.devices)

    def layout(size: int) -> Layout:
        for most in range(count, 0, -1):

            def warmup(_: int, most: int = most) -> Sequence[int]:
                return [min(count - p, most) for p in range(count)]

            stages = straight_stages(workload, costs, cluster, size, warmup, whole_stacks=True)
            in_flight = [min(ahead, len(micro_batches(workload.batch_size, size))) for ahead in warmup(0)]
            needed = [
                stage_bytes(costs, workload.optimizer, *stage.units, size, ahead)
                for stage, ahead in zip(stages, in_flight, strict=True)
            ]
            if all(n <= device.memory_bytes for n, device in zip(needed, cluster.devices, strict=True)):
                break
        return stages, warmup

    return plan_pipeline("eco-fl", workload, costs, cluster, layout, options)
