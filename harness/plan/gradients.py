"""Does every step see the whole gradient? Followed through accumulation, sums and collectives, without running.

Gradients are followed through an all-reduce, not through a reduce-scatter or an all-gather: such a plan is refused.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from harness.costs import BACKWARD
from harness.plan.actions import Action, Collective, Combine, Commit, Compute, Step
from harness.plan.graph import InvalidPlan
from harness.plan.plan import Phase, Plan
from harness.plan.values import Range, Value

#: What a gradient holds: (units, micro-batch, rows) -> how many times it was added.
#: What a norm holds: name of a gradient -> how many times its square was added.
Content = Counter[tuple[Range, int, Range] | str]


def check_gradients(phase: Phase, plan: Plan) -> None:
    """Every device that holds trained weights steps once with the gradient of all rows of all who hold them.

    Where some step clips, every step reads a norm that holds each gradient of the phase once, and whole.
    The gradient of `weights...` is called `gradients...`. Raises InvalidPlan.
    """
    for name, devices in phase.tied.items():
        holders = {device for device in phase.actions if name in _trained(phase, plan, device)}
        if holders != set(devices):
            raise InvalidPlan(f"phase {phase.name!r}: {name} is tied over {devices}, and held by {sorted(holders)}")
    wanted = _wanted(phase, plan)
    norms = {name for actions in phase.actions.values() for action in actions for name in _norm(action)}
    followed = norms.union(name for name, tensor in plan.tensors.items() if tensor.kind == "gradients")
    held: dict[str, dict[Value, Content]] = {device: {} for device in phase.actions}
    stepped: dict[str, Counter[str]] = {device: Counter() for device in phase.actions}
    position = dict.fromkeys(phase.actions, 0)
    waiting: dict[Collective, set[str]] = defaultdict(set)
    progress = True
    while progress:
        progress = False
        for device, actions in phase.actions.items():
            while position[device] < len(actions):
                action = actions[position[device]]
                where = f"phase {phase.name!r}: {device}"
                if isinstance(action, Collective) and action.value.name in followed:
                    waiting[action].add(device)
                    if action.result not in held[device]:
                        if waiting[action] < set(action.group):
                            break
                        _reduce(action, held, phase)
                elif isinstance(action, Compute) and action.direction == BACKWARD:
                    for value in action.accumulates:
                        content = held[device].setdefault(value, Counter())
                        content[action.units, action.micro_batch, action.rows] += 1
                elif isinstance(action, Combine):
                    _combine(action, held[device], wanted, where)
                elif isinstance(action, Step):
                    _check_step(action, held[device], wanted, where)
                    if norms:
                        _check_norm(action, held[device], wanted, where)
                    stepped[device].update(value.name for value in action.gradients)
                position[device] += 1
                progress = True
    for device, actions in phase.actions.items():
        where = f"phase {phase.name!r}: {device}"
        if position[device] < len(actions):
            action = actions[position[device]]
            assert isinstance(action, Collective)
            absent = ", ".join(sorted(set(action.group) - waiting[action]))
            raise InvalidPlan(
                f"{where}: {action.kind} of {action.value} waits for {absent}, which never joins with the same group"
            )
        once = Counter(_trained(phase, plan, device))
        if stepped[device] != once:
            odd = min((once - stepped[device]) + (stepped[device] - once))
            raise InvalidPlan(f"{where}: {stepped[device][odd]} steps use {odd}, and {once[odd]} should")
        if sum(isinstance(action, Commit) for action in actions) != 1:
            raise InvalidPlan(f"{where}: a round of training has one commit")


def _norm(action: Action) -> Iterator[str]:
    """The names of the norms that the action makes or reads."""
    if isinstance(action, Combine) and action.op == "square-sum":
        yield action.write.name
    if isinstance(action, Step) and action.norm is not None:
        yield action.norm.name


def _trained(phase: Phase, plan: Plan, device: str) -> list[str]:
    """Gradients of the weights that the device holds, as far as they are trained at all."""
    weights = (value.name for value in phase.live.get(device, ()) if plan.tensors[value.name].kind == "weights")
    return [gradient for name in weights if (gradient := "gradients" + name.removeprefix("weights")) in plan.tensors]


def _wanted(phase: Phase, plan: Plan) -> dict[str, Content]:
    """Per gradient: the rows that each device which holds the weights has of every micro-batch, once."""
    wanted: dict[str, Content] = defaultdict(Counter)
    for device, shard in phase.shards.items():
        for name in _trained(phase, plan, device):
            for m, rows in enumerate(shard.micro_batch_rows):
                if rows[0] < rows[1]:
                    wanted[name][shard.units, m, rows] = 1
    return wanted


def _reduce(action: Collective, held: Mapping[str, dict[Value, Content]], phase: Phase) -> None:
    if action.kind != "all-reduce":
        raise InvalidPlan(
            f"phase {phase.name!r}: {action.kind} of {action.value}: gradients and their norm are followed through an "
            "all-reduce only"
        )
    total: Content = Counter()
    for member in action.group:
        if action.value not in held[member]:
            raise InvalidPlan(
                f"phase {phase.name!r}: {member}: {action.kind} of {action.value}, which it does not hold"
            )
        total.update(held[member].pop(action.value))
    for member in action.group:
        held[member][action.result] = total


def _combine(action: Combine, mine: dict[Value, Content], wanted: Mapping[str, Content], where: str) -> None:
    total: Content = Counter()
    for value in action.reads:
        if action.op == "square-sum":
            _check_whole(value, mine, wanted, where)
            total[value.name] += 1
        else:
            total.update(mine.get(value, Counter()))
    mine[action.write] = total


def _check_step(action: Step, mine: Mapping[Value, Content], wanted: Mapping[str, Content], where: str) -> None:
    if {v.name: v.version + 1 for v in action.reads} != {v.name: v.version for v in action.writes}:
        raise InvalidPlan(f"{where}: the step must write what it reads, one version on")
    for value in action.gradients:
        _check_whole(value, mine, wanted, where)


def _check_whole(value: Value, mine: Mapping[Value, Content], wanted: Mapping[str, Content], where: str) -> None:
    content, need = mine.get(value, Counter()), wanted.get(value.name, Counter())
    twice = [piece for piece, count in content.items() if count > 1]
    missing = [piece for piece in need if piece not in content]
    problem = f"adds {twice[0]} twice" if twice else f"lacks {missing[0]}" if missing else ""
    if problem:
        raise InvalidPlan(f"{where}: the gradient {value} {problem} (units, micro-batch, rows)")


def _check_norm(action: Step, mine: Mapping[Value, Content], wanted: Mapping[str, Content], where: str) -> None:
    if action.norm is None:
        raise InvalidPlan(f"{where}: the step of {action.units} reads no norm, and others do")
    content: Content = mine.get(action.norm, Counter())
    once: Content = Counter(dict.fromkeys(wanted, 1))
    if content != once:
        odd = min(map(str, (content - once) + (once - content)))
        raise InvalidPlan(f"{where}: the norm {action.norm} counts {odd} {content[odd]} times, and should {once[odd]}")
