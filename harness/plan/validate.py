"""Is this plan a correct computation? Answered without running it, with the reason when it is not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise

from harness.costs import FORWARD, Costs
from harness.plan.actions import Combine, Compute
from harness.plan.flow import link
from harness.plan.gradients import check_gradients
from harness.plan.graph import InvalidPlan, check_order
from harness.plan.plan import Phase, Plan
from harness.plan.storage import check_storage
from harness.plan.values import Range, Value, saved_name


def validate(plan: Plan, costs: Costs) -> dict[str, int]:
    """Check every phase; returns each device's memory high-water mark in bytes, in list order.

    In each phase: every value is written before it is read and freed once, sends and receives pair up, the order
    can't deadlock; each row of every unit is computed exactly once per micro-batch, from the tensors
    that the unit reads; each weight's gradient, when its step reads it, holds every row of every stage that uses the
    weight exactly once. A phase begins with what the one before leaves, and loads what was stored on its device before
    it. Raises InvalidPlan.
    Workspace inside an action is in the simulator's ledger.
    """
    high: dict[str, int] = {}
    checked: set[int] = set()
    for before, phase in zip((None, *plan.phases), plan.phases, strict=False):
        if before is not None:
            _check_succession(before, phase)
        if id(phase) in checked:
            continue
        checked.add(id(phase))
        graph = link(phase, plan.tensors, plan.devices)
        check_order(graph, f"phase {phase.name!r}")
        if phase.shards or _computes(phase):
            _check_passes(phase, len(costs.units))
            _check_flow(phase, costs.cached if phase.cached else costs)
        if phase.training:
            check_gradients(phase, plan)
        for device, nbytes in zip(graph.devices, graph.high_water, strict=True):
            high[device] = max(high.get(device, 0), nbytes)
    if plan.phases and not plan.phases[0].cached:  # else it begins with what an earlier run has kept
        check_storage(plan)
    return high


def _computes(phase: Phase) -> bool:
    return any(isinstance(action, Compute) for actions in phase.actions.values() for action in actions)


def _check_succession(before: Phase, after: Phase) -> None:
    for device in before.actions:
        left = {value.name for value in before.leaves_of(device)}
        begins = {value.name for value in after.live.get(device, ())}
        if left != begins:
            raise InvalidPlan(
                f"phase {after.name!r}: {device} begins with {', '.join(sorted(begins)) or 'nothing'}, and phase "
                f"{before.name!r} leaves {', '.join(sorted(left)) or 'nothing'}"
            )


def _check_passes(phase: Phase, num_units: int) -> None:
    """Forward passes tile (unit x micro-batch x rows); no pass runs twice, no backward before its forward."""
    forward: dict[int, list[tuple[Range, Range]]] = defaultdict(list)
    for device, shard in phase.shards.items():
        if device not in phase.actions:
            raise InvalidPlan(f"phase {phase.name!r}: the shard of {device} belongs to no device of the phase")
        if (found := len(shard.micro_batch_rows)) != (wanted := len(phase.micro_batches)):
            raise InvalidPlan(
                f"phase {phase.name!r}: {device}: the shard has {found} micro-batches, the phase {wanted}"
            )
    for device, actions in phase.actions.items():
        done: set[tuple[str, Range, int, Range]] = set()
        for action in actions:
            if not isinstance(action, Compute):
                continue
            where = f"phase {phase.name!r}: {device}: units {action.units} of micro-batch {action.micro_batch}"
            _check_shard(phase, device, action, where)
            key = (action.units, action.micro_batch, action.rows)
            if (action.direction, *key) in done:
                raise InvalidPlan(f"{where}: computed {action.direction} twice")
            done.add((action.direction, *key))
            if action.direction == FORWARD:
                forward[action.micro_batch].append((action.units, action.rows))
            elif (FORWARD, *key) not in done:
                raise InvalidPlan(f"{where}: backward without a forward before it")
    for m, rows in enumerate(phase.micro_batches):
        edges = sorted({0, num_units, *(edge for units, _ in forward[m] for edge in units)})
        for first, last in pairwise(edges):
            parts = [part for units, part in forward[m] if units[0] <= first and last <= units[1]]
            _tile(parts, rows, f"phase {phase.name!r}: micro-batch {m}: units {(first, last)}: rows")


def _check_shard(phase: Phase, device: str, action: Compute, where: str) -> None:
    if not 0 <= action.micro_batch < len(phase.micro_batches):
        raise InvalidPlan(f"{where}: the phase has {len(phase.micro_batches)} micro-batches")
    shard = phase.shards.get(device)
    if shard is None:
        raise InvalidPlan(f"{where}: the device has no shard")
    if not shard.units[0] <= action.units[0] < action.units[1] <= shard.units[1]:
        raise InvalidPlan(f"{where}: the device's shard has the units {shard.units}")
    if action.rows != shard.micro_batch_rows[action.micro_batch]:
        raise InvalidPlan(f"{where}: rows {action.rows} are not what the device's shard declares")


def _tile(parts: Iterable[Range], total: int, where: str) -> None:
    reached = 0
    for low, high in sorted(parts):
        if low != reached:
            problem = "are missing" if low > reached else "are covered twice"
            raise InvalidPlan(f"{where} {min(low, reached)}:{max(low, reached)} {problem}")
        reached = high
    if reached != total:
        problem = "are missing" if reached < total else "do not exist"
        raise InvalidPlan(f"{where} {min(reached, total)}:{max(reached, total)} {problem}")


def _check_flow(phase: Phase, costs: Costs) -> None:
    """Each pass reads what the model's units read of each other, for its own rows; joined pieces make a whole."""
    for device, actions in phase.actions.items():
        where = f"phase {phase.name!r}: {device}"
        for action in actions:
            if isinstance(action, Combine) and action.op == "concat" and action.write.rows is not None:
                first, last = action.write.rows
                parts = [value.rows or (0, 0) for value in action.reads]
                _tile(
                    ((low - first, high - first) for low, high in parts), last - first, f"{where}: {action.write}: rows"
                )
            elif isinstance(action, Compute) and (missing := _needed(action, costs) - set(action.reads)):
                raise InvalidPlan(
                    f"{where}: {action.direction} of units {action.units}, micro-batch {action.micro_batch}, "
                    f"does not read {min(missing)}"
                )


def _needed(action: Compute, costs: Costs) -> set[Value]:
    """What a pass can't do without: its inputs; backward, what it saved and the gradients of what it handed on."""
    first, last = action.units
    if action.direction == FORWARD:
        read = {name for unit in costs.units[first:last] for name in unit.reads}
        names = [name for name in costs.carried(first) if name in read]
        names += [name for name in costs.loaded if name in read]
    else:
        flowing = (name for name in costs.carried(last) if costs.tensors[name].needs_grad)
        names = [saved_name(first, last, bool(costs.loaded)), *(f"grad:{name}@{last}" for name in flowing)]
    return {Value(name, action.micro_batch, action.rows) for name in names}
