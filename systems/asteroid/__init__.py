"""Asteroid: hybrid pipeline parallelism for unequal devices, planned by their speed, memory and links.

Ye et al., Asteroid: Resource-Efficient Hybrid Pipeline Parallelism for Collaborative DNN Training on Heterogeneous Edge
Devices, MobiCom 2024. Its equations are known from independent re-implementations that agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import OrreryError, Unsupported, unknown_name
from harness.layer_tables import LayerTables
from harness.plan import Plan
from harness.recovery import Loss, Resumed, resumed, stages_of
from harness.replication import replicated
from harness.schedules import Stage, micro_batches
from harness.search import Layout as Layouts
from harness.search import plan_pipeline
from harness.workload import Workload
from systems.asteroid.planner import Groups, Layout, Placed, Planner, searched
from systems.asteroid.recovery import groups_left, restorers, shifted, topology

LIGHTWEIGHT, HEAVY = RECOVERIES = ("lightweight", "heavy")
PAPER, EXACT, SEARCH = PLANNERS = ("paper", "exact", "search")
#: `planner`: the "paper"'s dynamic program over devices in the order of their memory; the "exact" one, which finds the
#: best for that order; or a "search" for the order, too. `offload`: stragglers give rows to faster devices (the second
#: part of algorithm 1). `stages`: their number, instead of the best one.
#: `replication_period`: rounds between two snapshots, which a run that goes on without a lost device needs; None: there
#: are none. `recovery`: "lightweight" as in the paper, or "heavy": all is collected on one device, planned anew by the
#: planner, and handed out.
OPTIONS: dict[str, object] = {
    "micro_batch_size": None,
    "planner": PAPER,
    "offload": True,
    "stages": None,
    "replication_period": None,
    "recovery": LIGHTWEIGHT,
}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """The plan of least latency by equations 4 to 6, for the micro-batch size with which it simulates fastest."""
    found, period = _planned(workload, costs, cluster, options), _period(options)
    return found if period is None else replicated(found, topology(stages_of(found)), period)


def replan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object], loss: Loss) -> Resumed:
    """The plan for what is left, on the devices that are left. Raises Broken where a part of the model is lost, and
    OutOfMemory where it does not fit any more."""
    names = tuple(device for device in cluster.names if device not in loss.devices)
    rest = replace(cluster, devices=tuple(map(cluster.device, names)))
    if loss.plan is None:
        return Resumed(plan(workload, costs, rest, options), {})
    before = stages_of(loss.plan)
    backups = restorers(before, loss)
    size = max(phase.micro_batches[0] for phase in loss.plan.phases if phase.shards)
    found = None if options["recovery"] == HEAVY else _lightweight(workload, costs, cluster, rest, before, loss, size)
    if found is None:
        found = _layouts(workload, costs, rest, options)(size)
    period = _period(options)
    assert period is not None, "a plan with snapshots has a period"
    return resumed(
        "asteroid",
        workload,
        costs,
        loss,
        found[0],
        size,
        found[1],
        backups,
        topology(found[0]),
        period,
        through=names[0] if options["recovery"] == HEAVY else None,
    )


def _lightweight(
    workload: Workload, costs: Costs, cluster: Cluster, rest: Cluster, before: Sequence[Stage], loss: Loss, size: int
) -> tuple[list[Stage], list[int]] | None:
    """The stages that are left, with layers shifted between them, and how many micro-batches each keeps in flight; None
    where they don't fit."""
    tables = LayerTables(costs, cluster, workload.optimizer)
    speed = dict(zip(cluster.names, tables.speeds, strict=True))
    both = (tables.layer_seconds(device, size) for device in range(len(cluster.devices)))
    work = np.mean([forward + backward for forward, backward in both], axis=0)
    layer_of = {first: layer for layer, (first, _) in enumerate(costs.layers)} | {len(costs.units): len(costs.layers)}
    of_stage = [float(work[layer_of[stage.units[1]]] - work[layer_of[stage.units[0]]]) for stage in before]
    left = groups_left(before, loss.devices, speed, of_stage)
    ranges = shifted(work, [wanted for _, wanted in left])
    maker = Groups(LayerTables(costs, rest, workload.optimizer), size, len(micro_batches(workload.batch_size, size)))
    placed = [
        maker.stage(layers, tuple(map(rest.names.index, group)), len(left) - 1 - place)
        for place, (layers, (group, _)) in enumerate(zip(ranges, left, strict=True))
    ]
    fitting = [stage for stage in placed if stage is not None]
    if len(fitting) < len(placed):
        return None
    return _stages(maker.tables, fitting), _kept(fitting)


def _period(options: Mapping[str, object]) -> int | None:
    period = options["replication_period"]
    if period is not None and (type(period) is not int or period < 1):
        raise OrreryError(f"asteroid.replication_period is {period!r}; it must be a whole number of rounds, from 1 on.")
    if options["recovery"] not in RECOVERIES:
        raise unknown_name("value of asteroid.recovery", str(options["recovery"]), RECOVERIES)
    return period


def _planned(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    layout = _layouts(workload, costs, cluster, options)

    def constant(size: int) -> Layouts:
        stages, kept = layout(size)
        return stages, lambda _: kept

    return plan_pipeline("asteroid", workload, costs, cluster, constant, options)


def _layouts(
    workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]
) -> Callable[[int], tuple[list[Stage], list[int]]]:
    """For a size of micro-batch the stages of least latency, and how many micro-batches each keeps in flight."""
    planner, offload, stages = options["planner"], options["offload"], options["stages"]
    if planner not in PLANNERS:
        raise unknown_name("value of asteroid.planner", str(planner), PLANNERS)
    if not isinstance(offload, bool):
        raise OrreryError(f"asteroid.offload is {offload!r}; it must be true or false.")
    if stages is not None and (type(stages) is not int or not 1 <= stages <= len(cluster.devices)):
        raise OrreryError(
            f"asteroid.stages is {stages!r}; it must be a whole number from 1 to {len(cluster.devices)}, as many "
            f"as {cluster.name} has devices."
        )
    if stages is not None and planner == SEARCH:
        raise OrreryError("asteroid.planner=search chooses the number of stages. Leave asteroid.stages away.")
    tables = LayerTables(costs, cluster, workload.optimizer)
    roomy = LayerTables(costs, cluster, workload.optimizer, [float("inf")] * len(cluster.devices))

    def layout(size: int) -> tuple[list[Stage], list[int]]:
        count = len(micro_batches(workload.batch_size, size))

        def found(given: LayerTables) -> Layout | None:
            groups = Groups(given, size, count, offload)
            return searched(groups) if planner == SEARCH else Planner(groups, exact=planner == EXACT).best(stages)

        best = found(tables) or found(roomy)  # what the second one lacks is for the simulator to say
        if best is None:
            raise Unsupported(
                f"{tables.num_layers} layers don't make {stages} stages" if stages else "no stage can be made"
            )
        return _stages(tables, best.stages), _kept(best.stages)

    return layout


def _kept(stages: Sequence[Placed]) -> list[int]:
    """Micro-batches in flight: more than come from in front never are."""
    return list(accumulate((stage.in_flight for stage in stages), min))


def _stages(tables: LayerTables, layout: Sequence[Placed]) -> list[Stage]:
    """The layout as stages of the pipeline."""
    layers, names = tables.costs.layers, tables.cluster.names
    return [
        Stage(
            (layers[stage.layers[0]][0], layers[stage.layers[1] - 1][1]),
            tuple(names[device] for device in stage.devices),
            tuple(map(float, stage.rows)),
        )
        for stage in layout
    ]
