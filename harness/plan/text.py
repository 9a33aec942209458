"""A plan as text for people: who holds what, and each device's actions in a compact notation.

`F3[0:24] r0:4` is the forward pass of rows 0 to 3 of micro-batch 3 over units 0 to 23, `B3[0:24]` its backward
pass; `F3[5:6] r0:4 t0:71 w0:256` is one of 71 of their tokens and 256 channels of unit 5.
Values print as `name#micro_batch[r rows t tokens w width].v version`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from harness.plan.actions import (
    QUEUE_OF,
    Action,
    Collective,
    Combine,
    Commit,
    Compute,
    Free,
    Load,
    Recv,
    Send,
    Step,
    Store,
)
from harness.plan.plan import Phase, Plan
from harness.plan.values import Value

#: Names in a list that are printed before the rest is counted.
MAX_VALUES = 4
MAX_DEVICES = 16


def describe(plan: Plan, max_actions: int = 30) -> str:
    """The plan in lines of text. Of more than `max_actions` per device the ends are shown and the rest is counted."""
    return "\n".join(_lines(plan, max_actions)) + "\n"


def notation(plan: Plan, action: Action) -> str:
    """One action in one line."""
    match action:
        case Compute():
            rows = f" r{action.rows[0]}:{action.rows[1]}"
            versions = sorted({value.version for value in action.weights} - {0})
            stale = f" weights {_listed(f'v{v}' for v in versions)}" if versions else ""
            letter = action.direction[0].upper()
            parts = ((" t", action.tokens), (" w", action.width))
            cut = "".join(f"{axis}{part[0]}:{part[1]}" for axis, part in parts if part is not None)
            again = " again" if action.replica else ""
            return f"{letter}{action.micro_batch}[{action.units[0]}:{action.units[1]}]{rows}{cut}{again}{stale}"
        case Send():
            return f"send {_sized(plan, action.value)} -> {action.peer}"
        case Recv():
            return f"recv {_sized(plan, action.value)} <- {action.peer}"
        case Combine():
            place = " in place" if action.in_place else ""
            return f"{action.op} {_listed(map(str, action.reads), ' + ') or 'of nothing'} -> {action.write}{place}"
        case Step():
            clipped = "" if action.norm is None else f" clipped by {action.norm}"
            kept = f" beside {_listed(map(str, action.kept))}" if action.kept else ""
            return f"step {_listed(map(str, action.writes))}{kept}{clipped}"
        case Load() | Store():
            return f"{type(action).__name__.lower()} {_sized(plan, action.value)}"
        case Free():
            return f"free {_listed(map(str, action.values))}"
        case Commit():
            return "commit"
        case Collective():
            result = "" if action.kind == "all-reduce" else f" -> {action.result}"
            shares = f" shares {_listed(map(str, action.shares))}" if action.shares else ""
            tiles = f" in {action.tiles} tiles" if action.tiles > 1 else ""
            axis = f" along {action.axis}" if action.axis != "width" else ""
            return f"{action.kind} {_sized(plan, action.value)}{result} ({_listed(action.group)}){axis}{shares}{tiles}"


def _lines(plan: Plan, max_actions: int) -> Iterator[str]:
    yield f"{plan.method}: {_count(plan.devices, 'device')}, {plan.num_units} units, {_count(plan.phases, 'phase')}"
    for key, entry in plan.summary.items():
        yield f"  {key}: {entry}"
    first_place: dict[int, int] = {}
    for place, phase in enumerate(plan.phases, start=1):
        yield ""
        yield f"phase {place} {phase.name!r}, {phase.repeat} time{'' if phase.repeat == 1 else 's'}"
        same = first_place.setdefault(id(phase.actions), place)
        if same == place:
            yield from _phase_lines(plan, phase, max_actions)
        else:
            yield f"  the actions of phase {same}"


def _phase_lines(plan: Plan, phase: Phase, max_actions: int) -> Iterator[str]:
    kind = "training" if phase.training else "one more token" if phase.decoding else "inference"
    kind = kind if phase.shards else "nothing is computed"
    if phase.micro_batches:
        if phase.mini_batches:
            kind += f", an update after each mini-batch of {_runs(phase.micro_batches)} rows"
        else:
            kind += f", batch of {phase.batch_size} rows in micro-batches of {_runs(phase.micro_batches)}"
    yield f"  {kind}"
    for tied, group in phase.tied.items():
        yield f"  {tied} is summed over {_listed(group)}"
    width = max(len(name) for name in phase.actions)
    shown = list(phase.actions)[:MAX_DEVICES]
    for name in shown:
        held = _size(sum(plan.bytes(value) for value in phase.live.get(name, ())))
        shard = phase.shards.get(name)
        if shard is None:
            yield f"  {name:{width}}  holds no units, {held} from iteration to iteration"
            continue
        rows = _runs([last - first for first, last in shard.micro_batch_rows])
        units = f"units {shard.units[0]}:{shard.units[1]}"
        yield f"  {name:{width}}  {units}, {rows} rows per micro-batch, {held} from iteration to iteration"
    left_out = len(phase.actions) - len(shown)
    if left_out:
        yield f"  ... {left_out} more devices"
    for name in shown:
        actions = phase.actions[name]
        yield f"  {name}: {_count(actions, 'action')}"
        head, tail = len(actions), len(actions)
        if len(actions) > max_actions:
            head, tail = max_actions - max_actions // 3, len(actions) - max_actions // 3
        yield from (_action_line(plan, action) for action in actions[:head])
        if head < tail:
            yield f"    ... {tail - head} actions left out ..."
        yield from (_action_line(plan, action) for action in actions[tail:])
    if left_out:
        yield f"  ... the actions of {left_out} more devices"


def _action_line(plan: Plan, action: Action) -> str:
    queue = "several" if isinstance(action, Collective) else QUEUE_OF.get(type(action), "-")
    return f"    {queue:8}{notation(plan, action)}"


def _runs(counts: Sequence[int]) -> str:
    """(4, 4, 4, 2) -> "3 x 4, 1 x 2"."""
    return ", ".join(f"{len(list(run))} x {count}" for count, run in groupby(counts))


def _listed(names: Iterable[str], separator: str = ", ") -> str:
    names = list(names)
    more = f" and {len(names) - MAX_VALUES} more" if len(names) > MAX_VALUES else ""
    return separator.join(names[:MAX_VALUES]) + more


def _count(items: Sequence[object], noun: str) -> str:
    return f"{len(items)} {noun}" + ("" if len(items) == 1 else "s")


def _sized(plan: Plan, value: Value) -> str:
    return f"{value} {_size(plan.bytes(value))}"


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"
