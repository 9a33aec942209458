"""Whether a device has stored what it loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import accumulate

from harness.plan.actions import Load, Store
from harness.plan.graph import InvalidPlan
from harness.plan.plan import Phase, Plan

#: A device, the name of a tensor, the size of a batch, and a row of it. Batches are formed once: row 3 of the batches
#: of 16 rows are the same samples in every epoch, whatever the order of the batches.
Place = tuple[str, str, int, int]


def check_storage(plan: Plan) -> None:
    """Each row that a phase loads was stored on that device by phases before it, of as many batches as the phase has.

    Raises InvalidPlan.
    """
    stored: Counter[Place] = Counter()
    for phase in {id(phase): phase for phase in plan.phases}.values():  # what it may load once, it may load again
        for place in _places(phase, Load):
            if stored[place] < phase.repeat:
                device, name, size, row = place
                raise InvalidPlan(
                    f"phase {phase.name!r}: {device} loads {name} of row {row} of {phase.repeat} batches of {size}, "
                    f"and the phases before it have stored it there of {stored[place]}"
                )
        for place in set(_places(phase, Store)):
            stored[place] += phase.repeat


def _places(phase: Phase, kind: type[Load] | type[Store]) -> Iterator[Place]:
    starts = [0, *accumulate(phase.micro_batches)]
    for device, actions in phase.actions.items():
        for action in actions:
            if isinstance(action, kind) and action.value.rows is not None:
                first = starts[action.value.micro_batch]
                for row in range(*action.value.rows):
                    yield device, action.value.name, phase.batch_size, first + row
