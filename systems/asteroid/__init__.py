"""Asteroid: hybrid pipeline parallelism for unequal devices, planned by their speed, memory and links.

Ye et al., Asteroid: Resource-Efficient Hybrid Pipeline Parallelism for Collaborative DNN Training on Heterogeneous Edge
Devices, MobiCom 2024. Its equations are known from independent re-implementations that agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import OrreryError, unknown_name
from harness.plan import Plan
from harness.recovery import FULLEST, Change, Resumed, resumed, stages_of
from harness.replication import replicated
from harness.schedules import Stage, micro_batches
from harness.search import plan_pipeline
from harness.workload import Workload
from systems.asteroid.layouts import ASTEROID, BALANCED, PAPER, PLANNED, layouts
from systems.asteroid.recovery import lightweight, restorers, speeds, topology

LIGHTWEIGHT, HEAVY = RECOVERIES = ("lightweight", "heavy")
FIRST = "first"
COLLECTORS = (FULLEST, FIRST)
#: `planner`: the "paper"'s dynamic program over devices in the order of their memory; the "exact" one, which finds the
#: best for that order; or a "search" for the order, too, which minds what few micro-batches in flight cost. `offload`:
#: stragglers give rows to faster devices (the second part of algorithm 1). `stages`: their number, instead of the best
#: one. `idle`: devices may be left away; no source speaks of that, so all are used.
#: What is left of it without a part: `shares` within a group by algorithm 1, or "equal"; `cuts` as planned, or "even",
#: as many layers and devices for each of so many stages; `warmup`: stage p of P begins with 2 (P - p) - 1
#: micro-batches, with P - p as in plain "1f1b", or with all as "gpipe" does.
#: `replication_period`: rounds between two snapshots, which a run that goes on without a lost device needs; None: there
#: are none. `recovery`: "lightweight" as in the paper, or "heavy": all is collected on one device, planned anew by the
#: planner, and handed out. `collector`: that device is the "fullest", which has the most of it already, or the "first"
#: that is left, whatever it has. `straggler`: where a device takes so many times as long as planned, or as little, all
#: is shared anew at the next snapshot; None: it is left as it is.
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
    "collector": FULLEST,
    "straggler": None,
}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """The plan of least latency by equations 4 to 6, for the micro-batch size with which it simulates fastest; that of
    `planner="search"` bounded by round trips, too."""
    period = _period(options)
    layout = layouts(workload, costs, cluster, options)
    found = plan_pipeline("asteroid", workload, costs, cluster, layout, options)
    return found if period is None else replicated(found, topology(stages_of(found)), period)


def replan(
    workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object], change: Change
) -> Resumed | None:
    """The plan for what is left, on the devices that take part now; None where it is no better to change anything.
    Raises Broken where a part of the model is lost, and OutOfMemory where it does not fit any more."""
    if change.plan is None:
        return Resumed(plan(workload, costs, cluster, _stages_for(options, cluster)), {})
    rest = cluster.only((*change.plan.devices, *change.joined))
    options = _stages_for(options, rest)
    before = stages_of(change.plan)
    forced = bool(change.lost or change.joined)
    if not forced and not _straggles(workload, costs, rest, options["straggler"], change):
        return None
    backups = restorers(before, change)
    size = max(phase.micro_batches[0] for phase in change.plan.phases if phase.shards)
    found = None
    if options["recovery"] == LIGHTWEIGHT and not change.joined:
        found = lightweight(workload, costs, rest, before, change, size)
    after, warmup = layouts(workload, costs, rest, options)(size) if found is None else found
    if not forced and _alike(after, size) == _alike(before, size):
        return None
    period = _period(options)
    assert period is not None, "a plan with snapshots has a period"
    return resumed(
        "asteroid",
        workload,
        costs,
        change,
        after,
        size,
        warmup(len(micro_batches(workload.batch_size, size))),
        backups,
        topology(after),
        period,
        collector=None if options["recovery"] == LIGHTWEIGHT else _collector(options, rest),
    )


def _stages_for(options: Mapping[str, object], cluster: Cluster) -> Mapping[str, object]:
    """The options, where there may be fewer devices than stages were asked for."""
    stages = options["stages"]
    return {**options, "stages": min(stages, len(cluster.devices))} if isinstance(stages, int) else options


def _alike(stages: Sequence[Stage], size: int) -> list[tuple[object, ...]]:
    """The same for stages that do the same with micro-batches of that size."""
    return [(stage.units, stage.devices, stage.rows(size)) for stage in stages]


def _collector(options: Mapping[str, object], cluster: Cluster) -> str:
    return cluster.names[0] if options["collector"] == FIRST else FULLEST


def _straggles(workload: Workload, costs: Costs, cluster: Cluster, most: object, change: Change) -> bool:
    """Whether a device is so much slower or faster than when the plan was made."""
    if not isinstance(most, int | float):
        return False
    before, now = speeds(workload, costs, change.before), speeds(workload, costs, cluster)
    return any(max(before[device] / now[device], now[device] / before[device]) >= most for device in now)


def _period(options: Mapping[str, object]) -> int | None:
    period = options["replication_period"]
    if period is not None and (type(period) is not int or period < 1):
        raise OrreryError(f"asteroid.replication_period is {period!r}; it must be a whole number of rounds, from 1 on.")
    if options["recovery"] not in RECOVERIES:
        raise unknown_name("value of asteroid.recovery", str(options["recovery"]), RECOVERIES)
    if options["collector"] not in COLLECTORS:
        raise unknown_name("value of asteroid.collector", str(options["collector"]), COLLECTORS)
    straggler = options["straggler"]
    if straggler is not None and not (isinstance(straggler, int | float) and straggler > 1):
        raise OrreryError(f"asteroid.straggler is {straggler!r}; it must be a number above 1.")
    return period
