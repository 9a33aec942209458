"""Asteroid: hybrid pipeline parallelism for unequal devices, planned by their speed, memory and links.

Ye et al., Asteroid: Resource-Efficient Hybrid Pipeline Parallelism for Collaborative DNN Training on Heterogeneous Edge
Devices, MobiCom 2024. Its equations are known from independent re-implementations that agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import OrreryError, unknown_name
from harness.plan import Plan
from harness.recovery import Loss, Resumed, resumed, stages_of
from harness.replication import replicated
from harness.schedules import micro_batches
from harness.search import plan_pipeline
from harness.workload import Workload
from systems.asteroid.layouts import ASTEROID, BALANCED, PAPER, PLANNED, layouts
from systems.asteroid.recovery import lightweight, restorers, topology

LIGHTWEIGHT, HEAVY = RECOVERIES = ("lightweight", "heavy")
#: `planner`: the "paper"'s dynamic program over devices in the order of their memory; the "exact" one, which finds the
#: best for that order; or a "search" for the order, too, which minds what few micro-batches in flight cost. `offload`:
#: stragglers give rows to faster devices (the second part of algorithm 1). `stages`: their number, instead of the best
#: one. `idle`: devices may be left away; no source speaks of that, so all are used.
#: What is left of it without a part: `shares` within a group by algorithm 1, or "equal"; `cuts` as planned, or "even",
#: as many layers and devices for each of so many stages; `warmup`: stage p of P begins with 2 (P - p) - 1
#: micro-batches, with P - p as in plain "1f1b", or with all as "gpipe" does.
#: `replication_period`: rounds between two snapshots, which a run that goes on without a lost device needs; None: there
#: are none. `recovery`: "lightweight" as in the paper, or "heavy": all is collected on one device, planned anew by the
#: planner, and handed out.
OPTIONS: dict[str, object] = {
    "micro_batch_size": None,
    "planner": PAPER,
    "offload": True,
    "stages": None,
    "idle": False,
    "shares": BALANCED,
    "cuts": PLANNED,
    "warmup": ASTEROID,
    "replication_period": None,
    "recovery": LIGHTWEIGHT,
}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """The plan of least latency by equations 4 to 6, for the micro-batch size with which it simulates fastest; that of
    `planner="search"` bounded by round trips, too."""
    period = _period(options)
    layout = layouts(workload, costs, cluster, options)
    found = plan_pipeline("asteroid", workload, costs, cluster, layout, options)
    return found if period is None else replicated(found, topology(stages_of(found)), period)


def replan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object], loss: Loss) -> Resumed:
    """The plan for what is left, on the devices that are left. Raises Broken where a part of the model is lost, and
    OutOfMemory where it does not fit any more."""
    used = cluster.names if loss.plan is None else loss.plan.devices
    names = tuple(device for device in cluster.names if device in used and device not in loss.devices)
    rest = replace(cluster, devices=tuple(map(cluster.device, names)))
    stages = options["stages"]
    anew = {**options, "stages": min(stages, len(names)) if isinstance(stages, int) else None}
    if loss.plan is None:
        return Resumed(plan(workload, costs, rest, anew), {})
    before = stages_of(loss.plan)
    backups = restorers(before, loss)
    size = max(phase.micro_batches[0] for phase in loss.plan.phases if phase.shards)
    found = None if options["recovery"] == HEAVY else lightweight(workload, costs, cluster, rest, before, loss, size)
    after, warmup = layouts(workload, costs, rest, anew)(size) if found is None else found
    period = _period(options)
    assert period is not None, "a plan with snapshots has a period"
    return resumed(
        "asteroid",
        workload,
        costs,
        loss,
        after,
        size,
        warmup(len(micro_batches(workload.batch_size, size))),
        backups,
        topology(after),
        period,
        collect=options["recovery"] == HEAVY,
    )


def _period(options: Mapping[str, object]) -> int | None:
    period = options["replication_period"]
    if period is not None and (type(period) is not int or period < 1):
        raise OrreryError(f"asteroid.replication_period is {period!r}; it must be a whole number of rounds, from 1 on.")
    if options["recovery"] not in RECOVERIES:
        raise unknown_name("value of asteroid.recovery", str(options["recovery"]), RECOVERIES)
    return period
