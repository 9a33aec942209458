"""Asteroid: hybrid pipeline parallelism for unequal devices, planned by their speed, memory and links.

Ye et al., Asteroid: Resource-Efficient Hybrid Pipeline Parallelism for Collaborative DNN Training on Heterogeneous Edge
Devices, MobiCom 2024. Its equations are known from independent re-implementations that agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import OrreryError, Unsupported, unknown_name
from harness.layer_tables import LayerTables
from harness.plan import Plan
from harness.schedules import Stage, micro_batches
from harness.search import Layout as Stages
from harness.search import plan_pipeline
from harness.workload import Workload
from systems.asteroid.groups import Groups
from systems.asteroid.planner import Layout, Planner, searched

PAPER, EXACT, SEARCH = PLANNERS = ("paper", "exact", "search")
#: `planner`: the "paper"'s dynamic program over devices in the order of their memory; the "exact" one, which finds the
#: best for that order; or a "search" for the order, too. `offload`: stragglers give rows to faster devices (the second
#: part of algorithm 1). `stages`: their number, instead of the best one. `idle`: devices may be left away; no source
#: speaks of that, so all are used.
OPTIONS: dict[str, object] = {
    "micro_batch_size": None,
    "planner": PAPER,
    "offload": True,
    "stages": None,
    "idle": False,
}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """The plan of least latency by equations 4 to 6, for the micro-batch size with which it simulates fastest."""
    planner, offload, stages, idle = (options[name] for name in ("planner", "offload", "stages", "idle"))
    if planner not in PLANNERS:
        raise unknown_name("value of asteroid.planner", str(planner), PLANNERS)
    for name, value in (("offload", offload), ("idle", idle)):
        if type(value) is not bool:
            raise OrreryError(f"asteroid.{name} is {value!r}; it must be true or false.")
    if stages is not None and (type(stages) is not int or not 1 <= stages <= len(cluster.devices)):
        raise OrreryError(
            f"asteroid.stages is {stages!r}; it must be a whole number from 1 to {len(cluster.devices)}, as many "
            f"as {cluster.name} has devices."
        )
    if stages is not None and planner == SEARCH:
        raise OrreryError("asteroid.planner=search chooses the number of stages. Leave asteroid.stages away.")
    tables = LayerTables(costs, cluster, workload.optimizer)
    roomy = LayerTables(costs, cluster, workload.optimizer, [float("inf")] * len(cluster.devices))

    def layout(size: int) -> Stages:
        count = len(micro_batches(workload.batch_size, size))

        def found(given: LayerTables) -> Layout | None:
            groups = Groups(given, size, count, bool(offload))
            if planner == SEARCH:
                return searched(groups, bool(idle))
            return Planner(groups, exact=planner == EXACT, idle=bool(idle)).best(stages)

        best = found(tables) or found(roomy)  # what the second one lacks is for the simulator to say
        if best is None:
            raise Unsupported(
                f"{tables.num_layers} layers don't make {stages} stages" if stages else "no stage can be made"
            )
        return laid_out(tables, best)

    return plan_pipeline("asteroid", workload, costs, cluster, layout, options)


def laid_out(tables: LayerTables, layout: Layout) -> Stages:
    """The layout as stages of the pipeline; none keeps more micro-batches in flight than come from in front."""
    layers, names = tables.costs.layers, tables.cluster.names
    stages = [
        Stage(
            (layers[stage.layers[0]][0], layers[stage.layers[1] - 1][1]),
            tuple(names[device] for device in stage.devices),
            tuple(map(float, stage.rows)),
        )
        for stage in layout.stages
    ]
    kept = list(accumulate((stage.in_flight for stage in layout.stages), min))
    return stages, lambda _: kept
