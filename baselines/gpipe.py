"""GPipe: one stage per device, all forwards of a batch before the backwards, one update per batch."""

from __future__ import annotations

from collections.abc import Mapping

from harness.cluster import Cluster
from harness.costs import Costs
from harness.plan import Plan
from harness.search import TIME, Layout, plan_pipeline, straight_stages
from harness.workload import Workload

#: cuts: by "time" on the device of each stage, by "mean-time" as if all devices were equal (torchgpipe's balancer knows
#: one device only), or by number of "layers".
OPTIONS: dict[str, object] = {"micro_batch_size": None, "cuts": TIME}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """Cuts balanced by profiled time; all micro-batches are in flight, so memory grows with their number."""

    def warmup(count: int) -> list[int]:
        return [count] * len(cluster.devices)

    def layout(size: int) -> Layout:
        return straight_stages(workload, costs, cluster, size, warmup, cuts=options["cuts"]), warmup

    return plan_pipeline("gpipe", workload, costs, cluster, layout, options)
