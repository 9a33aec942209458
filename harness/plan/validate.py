"""Is this plan a correct computation? Answered without running it, with the reason when it is not."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from math import prod

from harness.costs import FORWARD, Costs
from harness.plan import pieces
from harness.plan.actions import Combine, Compute
from harness.plan.flow import linked
from harness.plan.gradients import check_gradients
from harness.plan.graph import InvalidPlan, check_order
from harness.plan.plan import Phase, Plan
from harness.plan.shared_gradients import check_shared_gradients, is_shared
from harness.plan.storage import check_storage
from harness.plan.sums import check_sums
from harness.plan.updates import follow_updates
from harness.plan.values import Range, Value, joined_axis, saved_name


def validate(plan: Plan, costs: Costs) -> dict[str, int]:
    """Check every phase; returns each device's memory high-water mark in bytes, in list order.

    In each phase: every value is written before it is read and freed once, sends and receives pair up, the order
    can't deadlock; each row, token and channel of every unit is computed exactly once per micro-batch, but for declared
    replicas, from the tensors that the unit reads, which are sums of every part once; each weight's gradient, when its
    step reads it, holds every row of every stage that uses the weight exactly once. A phase begins with what the one
    before leaves, and loads what was stored on its device before it. Raises InvalidPlan.
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
        graph = linked(phase, plan)
        order = check_order(graph, f"phase {phase.name!r}")
        if phase.shards or _computes(phase):
            chain = phase.chain(costs)
            _check_passes(phase, chain)
            _check_flow(phase, chain)
            check_sums(phase, graph, order, chain)
        if phase.training and is_shared(phase):
            check_shared_gradients(phase, plan, graph, order, chain)
        elif phase.training and phase.mini_batches:
            follow_updates(phase, plan)
        elif phase.training:
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


def _check_passes(phase: Phase, costs: Costs) -> None:
    """Forward passes tile (unit x micro-batch x rows x tokens x width), replicas aside; no pass runs twice on a device,
    no backward before its forward, or with other weights."""
    forward: dict[int, list[Compute]] = defaultdict(list)
    for device, shard in phase.shards.items():
        if device not in phase.actions:
            raise InvalidPlan(f"phase {phase.name!r}: the shard of {device} belongs to no device of the phase")
        if (found := len(shard.micro_batch_rows)) != (wanted := len(phase.micro_batches)):
            raise InvalidPlan(
                f"phase {phase.name!r}: {device}: the shard has {found} micro-batches, the phase {wanted}"
            )
    for device, actions in phase.actions.items():
        live = Counter(value.name for value in phase.live.get(device, ()))
        if twice := [name for name, count in live.items() if count > 1]:
            raise InvalidPlan(f"phase {phase.name!r}: {device} begins with two values of {twice[0]}")
        done: dict[tuple[object, ...], Compute] = {}
        for action in actions:
            if not isinstance(action, Compute):
                continue
            where = f"phase {phase.name!r}: {device}: units {action.units} of micro-batch {action.micro_batch}"
            _check_shard(phase, device, action, where)
            if broken := pieces.broken_rule(action, costs):
                raise InvalidPlan(f"{where}: {broken}")
            key = (action.units, action.micro_batch, action.rows, action.tokens, action.width)
            this = (action.direction, *key)
            if this in done:
                raise InvalidPlan(f"{where}: computed {action.direction} twice")
            done[this] = action
            if action.direction == FORWARD:
                if not action.replica:
                    forward[action.micro_batch].append(action)
                continue
            before = done.get((FORWARD, *key))
            if before is None:
                raise InvalidPlan(f"{where}: backward without a forward before it")
            if others := set(action.weights) - set(before.weights):
                raise InvalidPlan(f"{where}: backward with {min(others, key=str)}, its forward with another version")
    for m, rows in enumerate(phase.micro_batches):
        edges = sorted({0, len(costs.units), *(edge for action in forward[m] for edge in action.units)})
        for first, last in pairwise(edges):
            passes = [action for action in forward[m] if action.units[0] <= first and last <= action.units[1]]
            where = f"phase {phase.name!r}: micro-batch {m}: units {(first, last)}"
            if any(map(pieces.is_part, passes)):
                _fill(passes, costs, first, rows, where)
            else:
                _tile((action.rows for action in passes), rows, f"{where}: rows")


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


def _fill(passes: list[Compute], costs: Costs, number: int, rows: int, where: str) -> None:
    """The passes over a unit are boxes of rows, tokens and channels, which fill all that there is without overlap."""
    unit = costs.units[number]
    boxes = [(action.rows, *pieces.spans(action, unit, costs)) for action in passes]
    for index, box in enumerate(boxes):
        for other in boxes[:index]:
            if all(a[0] < b[1] and b[0] < a[1] for a, b in zip(box, other, strict=True)):
                raise InvalidPlan(f"{where}: {box} and {other} of rows, tokens and width are both computed")
    tokens, width = pieces.extents(unit, costs)
    found = sum(prod(high - low for low, high in box) for box in boxes)
    if found != rows * tokens * width:
        raise InvalidPlan(f"{where}: {found} of {rows * tokens * width} elements are computed")


def _check_flow(phase: Phase, costs: Costs) -> None:
    """Each pass reads what the model's units read of each other, for its own rows; joined pieces make a whole."""
    shared = is_shared(phase)
    for device, actions in phase.actions.items():
        where = f"phase {phase.name!r}: {device}"
        for action in actions:
            if isinstance(action, Combine) and action.op == "concat" and action.write.rows is not None:
                _check_joined(action, costs, where)
            elif isinstance(action, Compute):
                read = {value._replace(version=0) for value in action.reads}
                if missing := _needed(action, costs, shared) - read:
                    raise InvalidPlan(
                        f"{where}: {action.direction} of units {action.units}, micro-batch {action.micro_batch}, "
                        f"does not read {min(missing, key=str)}"
                    )


def _check_joined(action: Combine, costs: Costs, where: str) -> None:
    """The pieces of a concatenation follow each other, and make up what it writes."""
    try:
        axis = joined_axis(action.reads)
    except ValueError as error:
        raise InvalidPlan(f"{where}: {action.write}: {error}") from error
    whole = action.write.range_of(axis)
    if whole is None:
        tensor = costs.tensors[action.write.name.removeprefix("grad:").partition("@")[0]]
        whole = 0, tensor.tokens if axis == "tokens" else tensor.width
    first, last = whole
    parts = [value.range_of(axis) or (0, 0) for value in action.reads]
    _tile(((low - first, high - first) for low, high in parts), last - first, f"{where}: {action.write}: {axis}")


def _needed(action: Compute, costs: Costs, shared: bool) -> set[Value]:
    """What a pass can't do without: its inputs; backward, what it saved and the gradients of what it handed on; where
    layers are `shared`, of what it made."""
    if action.direction == FORWARD:
        return set(pieces.inputs(action, costs))
    first, last = action.units
    if shared:
        saved = Value(saved_name(first, last), action.micro_batch, action.rows, action.tokens, action.width)
        made = (value for value in pieces.outputs(action, costs) if costs.tensors[value.name].needs_grad)
        return {saved, *(value._replace(name=f"grad:{value.name}@{last}") for value in made)}
    flowing = (name for name in costs.carried(last) if costs.tensors[name].needs_grad)
    names = [saved_name(first, last, bool(costs.loaded)), *(f"grad:{name}@{last}" for name in flowing)]
    return {Value(name, action.micro_batch, action.rows) for name in names}
