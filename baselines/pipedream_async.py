"""PipeDream (SOSP 2019) with weight stashing: an update per mini-batch, no flush between them; stale by design."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from baselines import pipedream
from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import OrreryError
from harness.plan import Plan
from harness.schedules import Stage
from harness.search import straight_stages
from harness.stashing import plan_stashing
from harness.workload import Workload

#: batches_per_flush: mini-batches between which the pipeline does not drain. PipeDream's never does before an epoch
#: ends; with P stages, R of them take R + P - 1 turns. planner: PipeDream's own; without it one stage per device, cut
#: by profiled time.
OPTIONS: dict[str, object] = {"batches_per_flush": 128, "planner": True}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """A mini-batch is a batch of the workload, whole."""
    if not isinstance(options["planner"], bool):
        raise OrreryError(f"pipedream-async.planner is {options['planner']!r}; it must be true or false.")

    def stages(depth: int) -> Sequence[Stage]:
        if options["planner"]:
            return pipedream.stages(workload, costs, cluster, workload.batch_size)
        count = len(cluster.devices)
        warmup = [min(count - p, depth) for p in range(count)]
        return straight_stages(workload, costs, cluster, workload.batch_size, lambda _: warmup, copies=warmup)

    return plan_stashing("pipedream-async", workload, costs, cluster, stages, options["batches_per_flush"])
