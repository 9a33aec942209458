"""Asteroid: hybrid pipeline parallelism for unequal devices, planned by their speed, memory and links.

Ye et al., Asteroid: Resource-Efficient Hybrid Pipeline Parallelism for Collaborative DNN Training on Heterogeneous Edge
Devices, MobiCom 2024. Its equations are known from independent re-implementations that agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import OrreryError, Unsupported, unknown_name
from harness.layer_tables import LayerTables
from harness.plan import Plan
from harness.schedules import Stage, micro_batches, split
from harness.search import Layout, plan_pipeline
from harness.workload import Workload
from systems.asteroid.planner import Groups, Placed, Planner, by_memory, searched

PAPER, EXACT, SEARCH = PLANNERS = ("paper", "exact", "search")
ASTEROID, ONE_F_ONE_B, GPIPE = WARMUPS = ("asteroid", "1f1b", "gpipe")
BALANCED, EQUAL = SHARES = ("balanced", "equal")
PLANNED, EVEN = CUTS = ("planned", "even")
#: `planner`: the "paper"'s dynamic program over devices in the order of their memory; the "exact" one, which finds the
#: best for that order; or a "search" for the order, too. `offload`: stragglers give rows to faster devices (the second
#: part of algorithm 1). `stages`: their number, instead of the best one.
#: What is left of it without a part: `shares` within a group by algorithm 1, or "equal"; `cuts` as planned, or "even",
#: as many layers and devices for each of so many stages; `warmup`: stage p of P begins with 2 (P - p) - 1
#: micro-batches, with P - p as in plain "1f1b", or with all as "gpipe" does.
OPTIONS: dict[str, object] = {
    "micro_batch_size": None,
    "planner": PAPER,
    "offload": True,
    "stages": None,
    "shares": BALANCED,
    "cuts": PLANNED,
    "warmup": ASTEROID,
}
#: An option that is one of several words.
WORDS = {"planner": PLANNERS, "shares": SHARES, "cuts": CUTS, "warmup": WARMUPS}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """The plan of least latency by equations 4 to 6, for the micro-batch size with which it simulates fastest."""
    _check(cluster, options)
    stages = options["stages"]
    assert stages is None or isinstance(stages, int)
    balanced = options["shares"] == BALANCED
    tables = LayerTables(costs, cluster, workload.optimizer)
    roomy = LayerTables(costs, cluster, workload.optimizer, [float("inf")] * len(cluster.devices))

    def layout(size: int) -> Layout:
        count = len(micro_batches(workload.batch_size, size))

        def found(given: LayerTables) -> Sequence[Placed] | None:
            groups = Groups(given, size, count, balanced and options["offload"] is True, balanced)
            if options["cuts"] == EVEN:
                assert stages is not None
                return _even(groups, stages)
            exact = options["planner"] == EXACT
            best = searched(groups) if options["planner"] == SEARCH else Planner(groups, exact=exact).best(stages)
            return None if best is None else best.stages

        placed = found(tables) or found(roomy)  # what the second one lacks is for the simulator to say
        if placed is None:
            raise Unsupported(
                f"{tables.num_layers} layers don't make {stages} stages" if stages else "no stage can be made"
            )
        return _stages(tables, placed), _warmup(str(options["warmup"]), placed)

    return plan_pipeline("asteroid", workload, costs, cluster, layout, options)


def _check(cluster: Cluster, options: Mapping[str, object]) -> None:
    for name, words in WORDS.items():
        if options[name] not in words:
            raise unknown_name(f"value of asteroid.{name}", str(options[name]), words)
    offload, stages = options["offload"], options["stages"]
    if not isinstance(offload, bool):
        raise OrreryError(f"asteroid.offload is {offload!r}; it must be true or false.")
    if stages is not None and (type(stages) is not int or not 1 <= stages <= len(cluster.devices)):
        raise OrreryError(
            f"asteroid.stages is {stages!r}; it must be a whole number from 1 to {len(cluster.devices)}, as many "
            f"as {cluster.name} has devices."
        )
    if options["cuts"] == EVEN and stages is None:
        raise OrreryError("asteroid.cuts=even makes as many stages as asteroid.stages says. Set that, too.")
    if stages is not None and options["cuts"] == PLANNED and options["planner"] == SEARCH:
        raise OrreryError("asteroid.planner=search chooses the number of stages. Leave asteroid.stages away.")


def _even(groups: Groups, stages: int) -> Sequence[Placed] | None:
    """So many stages of as many layers, on as many devices in the order of memory; None where one does not fit."""
    if groups.tables.num_layers < stages:
        return None
    order, ones = by_memory(groups.tables), [1.0] * stages
    edges, places = ([0, *accumulate(split(total, ones))] for total in (groups.tables.num_layers, len(order)))
    placed = [
        groups.stage(layers, order[slice(*of)], stages - 1 - p)
        for p, (layers, of) in enumerate(zip(pairwise(edges), pairwise(places), strict=True))
    ]
    whole = [stage for stage in placed if stage is not None]
    return whole if len(whole) == stages else None


def _warmup(rule: str, placed: Sequence[Placed]) -> Callable[[int], Sequence[int]]:
    """How many micro-batches each stage begins with, of a round's number of them."""
    if rule == GPIPE:
        return lambda count: [count] * len(placed)
    kept = list(accumulate((stage.in_flight for stage in placed), min))  # more than come from in front never are
    if rule == ONE_F_ONE_B:
        kept = [min(of, len(placed) - p) for p, of in enumerate(kept)]
    return lambda _: kept


def _stages(tables: LayerTables, placed: Sequence[Placed]) -> list[Stage]:
    """As stages of the pipeline."""
    layers, names = tables.costs.layers, tables.cluster.names
    return [
        Stage(
            (layers[stage.layers[0]][0], layers[stage.layers[1] - 1][1]),
            tuple(names[device] for device in stage.devices),
            tuple(map(float, stage.rows)),
        )
        for stage in placed
    ]
