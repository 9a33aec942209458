"""What Asteroid does about a lost device: topology-driven replication and lightweight re-planning.

As re-implementations that agree have it (attributed to section 3.4): a stage of several devices holds replicas of
itself; a stage of one device keeps a copy on the next stage, the last one on the first. After a failure layers move
between neighbouring stages until their work is in proportion to the speed that is left, and only what moves travels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

from harness.errors import Broken
from harness.layer_tables import LayerTables
from harness.plan.values import Range
from harness.recovery import Loss
from harness.schedules import Stage


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


def restorers(stages: Sequence[Stage], loss: Loss) -> dict[Range, str]:
    """Units of stages of which nobody is left -> the device that has the copy. Raises Broken where there is none."""
    backups = topology(stages)
    found: dict[Range, str] = {}
    for stage in stages:
        if set(stage.devices) - set(loss.devices):
            continue
        backup = backups.get(stage.devices[0]) if len(stage.devices) == 1 else None
        if backup is None or backup in loss.devices:
            copies = "the only copy of" if backup else "every copy of"
            raise Broken(
                f"{' and '.join(loss.devices)} had {copies} what units {stage.units[0]} to {stage.units[1]} have "
                f"learned since the beginning; the last snapshot was of round {loss.trained}."
            )
        found[stage.units] = backup
    return found


def shifted(tables: LayerTables, groups: Sequence[Sequence[int]], rows: int) -> list[Range]:
    """The layers of each group of devices, by number, in the order of the stages that they were: work in proportion to
    the speed of the group, and at least one layer for each."""
    speed = [sum(tables.speeds[device] for device in group) for group in groups]
    devices = [device for group in groups for device in group]
    both = (tables.layer_seconds(device, rows) for device in devices)
    work = np.mean([forward + backward for forward, backward in both], axis=0)
    cuts = [0]
    for number, reached in enumerate(accumulate(speed[:-1]), start=1):
        wanted = work[-1] * reached / sum(speed)
        lowest, highest = cuts[-1] + 1, tables.num_layers - (len(groups) - number)
        cuts.append(min(range(lowest, highest + 1), key=lambda cut: abs(work[cut] - wanted)))
    return list(zip(cuts, (*cuts[1:], tables.num_layers), strict=True))


def left(stages: Sequence[Stage], lost: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The groups of the stages that still have a device."""
    for stage in stages:
        if group := tuple(device for device in stage.devices if device not in lost):
            yield group
