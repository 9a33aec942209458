"""Is this plan a correct computation? Answered without running it, with the reason when it is not."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from harness.plan.actions import Collective, Combine, Compute, Step
from harness.plan.flow import InvalidPlan, link
from harness.plan.plan import Phase, Plan
from harness.plan.values import Range, Value

#: What a gradient holds: (units, micro-batch, rows) -> how many times it was added.
Content = Counter[tuple[Range, int, Range]]


def validate(plan: Plan) -> dict[str, int]:
    """Check every phase; returns each device's memory high-water mark in bytes, in list order.

    In each phase: every value is written before it is read and freed once, sends and receives pair up, the order
    can't deadlock (all by `link`); the rows of every unit are computed exactly once per micro-batch; each weight's
    gradient, when its step reads it, holds every row of every stage that uses the weight exactly once.
    Raises InvalidPlan. Workspace inside an action, known only with the costs, is in the simulator's ledger.
    """
    high: dict[str, int] = {}
    for phase in {id(p): p for p in plan.phases}.values():
        if set(phase.actions) != set(plan.devices):
            raise InvalidPlan(f"phase {phase.name!r} has other devices than the first phase")
        graph = link(phase, plan.tensors)
        _check_passes(phase, plan.num_units)
        if phase.training:
            _check_gradients(phase)
        for device, nbytes in zip(graph.devices, graph.high_water, strict=True):
            high[device] = max(high.get(device, 0), nbytes)
    return high


def _check_passes(phase: Phase, num_units: int) -> None:
    """Forward (and backward) passes tile (unit x micro-batch x rows); each backward has its forward before it."""
    forward: dict[int, list[tuple[Range, Range]]] = defaultdict(list)
    for device, actions in phase.actions.items():
        done: set[tuple[Range, int, Range]] = set()
        undone: set[tuple[Range, int, Range]] = set()
        for action in actions:
            if not isinstance(action, Compute):
                continue
            key = (action.units, action.micro_batch, action.rows)
            where = f"phase {phase.name!r}: {device}: units {action.units} of micro-batch {action.micro_batch}"
            if not 0 <= action.micro_batch < len(phase.micro_batches):
                raise InvalidPlan(f"{where}: the phase has {len(phase.micro_batches)} micro-batches")
            shard = phase.shards[device]
            if action.units != shard.units or action.rows != shard.micro_batch_rows[action.micro_batch]:
                raise InvalidPlan(f"{where}: rows {action.rows} are not what the device's shard declares")
            if action.direction == "forward":
                if key in done:
                    raise InvalidPlan(f"{where}: computed forward twice")
                done.add(key)
                forward[action.micro_batch].append((action.units, action.rows))
            else:
                if key not in done:
                    raise InvalidPlan(f"{where}: backward without a forward before it")
                if key in undone:
                    raise InvalidPlan(f"{where}: computed backward twice")
                undone.add(key)
    for m, rows in enumerate(phase.micro_batches):
        _check_tiling(forward[m], num_units, rows, f"phase {phase.name!r}: micro-batch {m}")


def _check_tiling(pieces: list[tuple[Range, Range]], num_units: int, rows: int, where: str) -> None:
    """Stages tile the units, and the devices of each stage tile the rows."""
    stages: dict[Range, list[Range]] = defaultdict(list)
    for units, part in pieces:
        stages[units].append(part)
    _tile(list(stages), num_units, f"{where}: units")
    for units, parts in stages.items():
        _tile(parts, rows, f"{where}: units {units}: rows")


def _tile(parts: Iterable[Range], total: int, where: str) -> None:
    reached = 0
    for low, high in sorted(parts):
        if low != reached:
            what = "are missing" if low > reached else "are covered twice"
            raise InvalidPlan(f"{where} {min(low, reached)}:{max(low, reached)} {what}")
        reached = high
    if reached != total:
        problem = "are missing" if reached < total else "do not exist"
        raise InvalidPlan(f"{where} {min(reached, total)}:{max(reached, total)} {problem}")


def _check_gradients(phase: Phase) -> None:
    """Follow what every gradient holds through the collectives, and check it where a step reads it."""
    held: dict[str, dict[Value, Content]] = {device: {} for device in phase.actions}
    wanted = _wanted(phase)
    stepped: dict[str, set[str]] = {device: set() for device in phase.actions}
    position = dict.fromkeys(phase.actions, 0)
    waiting: dict[Collective, set[str]] = defaultdict(set)
    progress = True
    while progress:
        progress = False
        for device, actions in phase.actions.items():
            while position[device] < len(actions):
                action = actions[position[device]]
                if isinstance(action, Collective):
                    waiting[action].add(device)
                    if action.result not in held[device]:
                        if waiting[action] < set(action.group):
                            break
                        _reduce(action, held, phase)
                elif isinstance(action, Compute) and action.direction == "backward":
                    for value in action.accumulates:
                        content = held[device].setdefault(value, Counter())
                        content[action.units, action.micro_batch, action.rows] += 1
                elif isinstance(action, Combine):
                    _combine(action, held[device])
                elif isinstance(action, Step):
                    _check_step(action, device, held[device], wanted, phase)
                    stepped[device].update(value.name for value in action.gradients)
                position[device] += 1
                progress = True
    for device, actions in phase.actions.items():
        if position[device] < len(actions):
            action = actions[position[device]]
            assert isinstance(action, Collective)
            absent = ", ".join(sorted(set(action.group) - waiting[action]))
            raise InvalidPlan(
                f"phase {phase.name!r}: {device}: {action.kind} of {action.value} waits for {absent}, "
                "which never joins with the same group"
            )
        made = {value.name for value in held[device] if value.name.startswith("gradients")}
        if unused := made - stepped[device]:
            raise InvalidPlan(f"phase {phase.name!r}: {device}: no step uses {min(unused)}")


def _reduce(action: Collective, held: Mapping[str, dict[Value, Content]], phase: Phase) -> None:
    total: Content = Counter()
    for member in action.group:
        if action.value not in held[member]:
            raise InvalidPlan(
                f"phase {phase.name!r}: {member}: {action.kind} of {action.value}, which it does not hold"
            )
        total.update(held[member].pop(action.value))
    for member in action.group:
        held[member][action.result] = total


def _combine(action: Combine, mine: dict[Value, Content]) -> None:
    total: Content = Counter()
    for value in action.reads:
        total.update(mine.get(value, Counter()))
    mine[action.write] = total


def _wanted(phase: Phase) -> dict[str, Content]:
    """Per gradient: the rows that each device which steps with it has of every micro-batch, once."""
    wanted: dict[str, Content] = defaultdict(Counter)
    for device, actions in phase.actions.items():
        shard = phase.shards[device]
        for value in (value for action in actions if isinstance(action, Step) for value in action.gradients):
            for m, rows in enumerate(shard.micro_batch_rows):
                if rows[0] < rows[1]:
                    wanted[value.name][shard.units, m, rows] = 1
    return wanted


def _check_step(
    action: Step, device: str, mine: Mapping[Value, Content], wanted: Mapping[str, Content], phase: Phase
) -> None:
    for value in action.gradients:
        content, need = mine.get(value, Counter()), wanted.get(value.name, Counter())
        twice = [piece for piece, count in content.items() if count > 1]
        missing = [piece for piece in need if piece not in content]
        problem = f"adds {twice[0]} twice" if twice else f"lacks {missing[0]}" if missing else ""
        if problem:
            raise InvalidPlan(
                f"phase {phase.name!r}: {device}: the gradient {value} {problem} (units, micro-batch, rows)"
            )
