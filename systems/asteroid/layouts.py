"""From options to stages: which planner lays them out, and what is left of Asteroid without one of its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import OrreryError, Unsupported, unknown_name
from harness.layer_tables import LayerTables
from harness.schedules import Stage, micro_batches, split
from harness.search import Layout
from harness.workload import Workload
from systems.asteroid.groups import Groups, Placed, by_memory
from systems.asteroid.planner import Planner, searched

PAPER, EXACT, SEARCH = PLANNERS = ("paper", "exact", "search")
ASTEROID, ONE_F_ONE_B, GPIPE = WARMUPS = ("asteroid", "1f1b", "gpipe")
BALANCED, EQUAL = SHARES = ("balanced", "equal")
PLANNED, EVEN = CUTS = ("planned", "even")
#: Options that are one of several words.
WORDS = {"planner": PLANNERS, "shares": SHARES, "cuts": CUTS, "warmup": WARMUPS}


def layouts(
    workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]
) -> Callable[[int], Layout]:
    """For a size of micro-batch the stages that the options ask for, and how many micro-batches each begins with.
    Raises OrreryError for options that can't be."""
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
            idle = options["idle"] is True
            if options["planner"] == SEARCH:
                best = searched(groups, idle)
            else:
                best = Planner(groups, exact=options["planner"] == EXACT, idle=idle).best(stages)
            return None if best is None else best.stages

        placed = found(tables) or found(roomy)  # what the second one lacks is for the simulator to say
        if placed is None:
            raise Unsupported(
                f"{tables.num_layers} layers don't make {stages} stages" if stages else "no stage can be made"
            )
        return laid_out(tables, placed, str(options["warmup"]))

    return layout


def laid_out(tables: LayerTables, placed: Sequence[Placed], rule: str = ASTEROID) -> Layout:
    """As stages of the pipeline, and how many micro-batches each begins with."""
    return _stages(tables, placed), _warmup(rule, placed)


def _check(cluster: Cluster, options: Mapping[str, object]) -> None:
    for name, words in WORDS.items():
        if options[name] not in words:
            raise unknown_name(f"value of asteroid.{name}", str(options[name]), words)
    for name in ("offload", "idle"):
        if not isinstance(options[name], bool):
            raise OrreryError(f"asteroid.{name} is {options[name]!r}; it must be true or false.")
    stages = options["stages"]
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
