"""What Asteroid does about a device that is lost or slow: topology-driven replication and lightweight re-planning.

As re-implementations that agree have it (attributed to section 3.4): a stage of several devices holds replicas of
itself; a stage of one device keeps a copy on the next stage, the last one on the first. After a failure layers move
between neighbouring stages until their work is in proportion to the speed that is left, and only what moves travels.
How much work is meant for a stage, and who takes the place of a stage that is lost, is this project's reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import Broken
from harness.layer_tables import LayerTables
from harness.plan.values import Range
from harness.recovery import Change
from harness.schedules import Stage, micro_batches
from harness.search import Layout
from harness.workload import Workload
from systems.asteroid.groups import Groups
from systems.asteroid.layouts import laid_out

#: Groups of devices, in the order of their stages, with the work that is meant for each.
Left = list[tuple[tuple[str, ...], float]]


def topology(stages: Sequence[Stage]) -> dict[str, str]:
    """Device of a stage of its own -> the first device of the next stage, after the last one of the first."""
    if len(stages) == 1:
        return {}
    following = (*stages[1:], stages[0])
    return {
        stage.devices[0]: after.devices[0]
        for stage, after in zip(stages, following, strict=True)
        if len(stage.devices) == 1
    }


def restorers(stages: Sequence[Stage], change: Change) -> dict[Range, str]:
    """Units of stages of which nobody is left -> the device that has the copy. Raises Broken where there is none."""
    backups = topology(stages)
    found: dict[Range, str] = {}
    for stage in stages:
        if set(stage.devices) - set(change.lost):
            continue
        backup = backups.get(stage.devices[0]) if len(stage.devices) == 1 else None
        if backup is None or backup in change.lost:
            copies = "the only copy of" if backup else "every copy of"
            raise Broken(
                f"{' and '.join(change.lost)} had {copies} what units {stage.units[0]} to {stage.units[1]} have "
                f"learned since the beginning; the last snapshot was of round {change.trained}."
            )
        found[stage.units] = backup
    return found


def lightweight(
    workload: Workload, costs: Costs, rest: Cluster, before: Sequence[Stage], change: Change, size: int
) -> Layout | None:
    """The stages that are left of `before` on the devices `rest`, as fast as they are now, with layers shifted between
    them, and how many micro-batches each begins with; None where they don't fit."""
    tables = LayerTables(costs, change.before, workload.optimizer)
    both = (tables.layer_seconds(device, size) for device in range(len(change.before.devices)))
    work = np.mean([forward + backward for forward, backward in both], axis=0)
    layer_of = {first: layer for layer, (first, _) in enumerate(costs.layers)} | {len(costs.units): len(costs.layers)}
    of_stage = [float(work[layer_of[stage.units[1]]] - work[layer_of[stage.units[0]]]) for stage in before]
    had, now = (speeds(workload, costs, cluster) for cluster in (change.before, rest))
    left = groups_left(before, change.lost, had, now, of_stage)
    ranges = shifted(work, [wanted for _, wanted in left])
    maker = Groups(LayerTables(costs, rest, workload.optimizer), size, len(micro_batches(workload.batch_size, size)))
    placed = [
        maker.stage(layers, tuple(map(rest.names.index, group)), len(left) - 1 - place)
        for place, (layers, (group, _)) in enumerate(zip(ranges, left, strict=True))
    ]
    fitting = [stage for stage in placed if stage is not None]
    if len(fitting) < len(placed):
        return None
    return laid_out(maker.tables, fitting)


def speeds(workload: Workload, costs: Costs, cluster: Cluster) -> dict[str, float]:
    """Of each device, of the whole model: one over seconds."""
    return dict(zip(cluster.names, LayerTables(costs, cluster, workload.optimizer).speeds, strict=True))


def groups_left(
    stages: Sequence[Stage],
    lost: Sequence[str],
    before: Mapping[str, float],
    now: Mapping[str, float],
    work: Sequence[float],
) -> Left:
    """The groups that go on, each with the work that is meant for it, in proportion.

    A group is what is left of a stage. Where nothing is left, the device with the copy takes its place if that leaves
    its own group somebody; else the stage is merged with the one behind it, the last one with the one in front. Work is
    that of the stage before, times the part of its speed that is left: so that what the planner has balanced stays so.

    before, now: speed of every device, of those that are left; work: of every stage.
    """
    groups = [[device for device in stage.devices if device not in lost] for stage in stages]
    had = [sum(before[device] for device in stage.devices) for stage in stages]
    wanted = list(work)
    for number in [number for number, group in enumerate(groups) if not group]:
        following = (number + 1) % len(stages)
        if len(groups[following]) > 1:
            backup = stages[following].devices[0]
            groups[following].remove(backup)
            groups[number] = [backup]
    alive = [number for number, group in enumerate(groups) if group]
    for number in range(len(groups)):
        if not groups[number]:
            behind = [other for other in alive if other > number]
            target = behind[0] if behind else alive[-1]
            wanted[target] += wanted[number]
            had[target] += had[number]
    return [
        (tuple(groups[number]), wanted[number] * sum(now[device] for device in groups[number]) / had[number])
        for number in alive
    ]


def shifted(work: Sequence[float], wanted: Sequence[float]) -> list[Range]:
    """The layers of each stage: as near as layers allow to the `wanted` proportions, and at least one for each.

    work: that of the first l layers, l = 0 ... L.
    """
    last = len(work) - 1
    cuts = [0]
    for number, reached in enumerate(accumulate(wanted[:-1]), start=1):
        target = work[-1] * reached / sum(wanted)
        lowest, highest = cuts[-1] + 1, last - (len(wanted) - number)
        cuts.append(min(range(lowest, highest + 1), key=lambda cut: abs(work[cut] - target)))
    return list(zip(cuts, (*cuts[1:], last), strict=True))
