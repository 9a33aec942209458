"""Plans as JSON, exactly there and back. The format is meant to be written by hand, too (`--plan FILE`).

A plan file names every tensor once and every phase body once; `phases` says which body runs how often, in order.
Values are written as they print: `name#micro_batch[r rows t tokens w width].v version`, all but the name optional;
ranges are half-open, "0:4" is 0, 1, 2, 3. An action is one object: "do" names it, the other keys are the fields of
`harness.plan.actions`; a field that has a default there, or is an empty list, may be left out. One device, one unit,
one micro-batch of two rows:

    {
     "orrery_plan": 1,
     "method": "by-hand",
     "num_units": 1,
     "tensors": {
      "weights": {"kind": "weights", "tokens": 1, "width": 100, "itemsize": 4},
      "gradients": {"kind": "gradients", "tokens": 1, "width": 100, "itemsize": 4}
     },
     "bodies": {
      "body0": {
       "name": "train",
       "micro_batches": [2],
       "shards": {"device0": {"units": "0:1", "micro_batch_rows": ["0:2"]}},
       "live": {"device0": ["weights"]},
       "actions": {
        "device0": [
         {"do": "compute", "units": "0:1", "direction": "forward", "micro_batch": 0, "rows": "0:2",
          "weights": ["weights"]},
         {"do": "compute", "units": "0:1", "direction": "backward", "micro_batch": 0, "rows": "0:2",
          "weights": ["weights"], "accumulates": ["gradients"]},
         {"do": "step", "units": "0:1", "gradients": ["gradients"], "reads": ["weights"], "writes": ["weights.v1"]},
         {"do": "free", "values": ["gradients"]}
        ]
       }
      }
     },
     "phases": [{"body": "body0", "repeat": 10}]
    }

The other actions: send and recv (value, peer), combine (op, reads, write, in_place), load and store (value),
commit, collective (kind, value, result, group, shares, tiles, axis). A step that clips its gradients also has a norm,
one that leaves older weights in place for passes that began with them also has those as kept.
One member of three in the ring that sums up a tensor 100 wide and leaves each member its share of the sum:

    {"do": "collective", "kind": "reduce-scatter", "value": "h", "result": "h[w60:100].v1",
     "group": ["device0", "device1", "device2"], "shares": [60, 0, 40], "tiles": 4}

(member 2). Kinds are all-reduce, reduce-scatter and all-gather; without shares they are as even as possible.
Reading checks form and names only; whether the plan is right is for `harness.plan.validate` to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from functools import cache
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from harness.costs import DIRECTIONS
from harness.errors import OrreryError, unknown_name
from harness.plain import is_plain
from harness.plan.actions import COLLECTIVES, COMBINATIONS, SHARED_AXES, Action, Collective, Combine, Compute
from harness.plan.plan import Phase, Plan
from harness.plan.values import KINDS, Range, Tensor, Value

VERSION = 1
ACTION_OF: dict[str, type] = {cls.__name__.lower(): cls for cls in get_args(Action)}
DO_OF = {cls: do for do, cls in ACTION_OF.items()}
#: Words allowed in the text fields that hold no names.
WORDS: dict[tuple[type, str], tuple[str, ...]] = {
    (Tensor, "kind"): KINDS,
    (Compute, "direction"): DIRECTIONS,
    (Combine, "op"): COMBINATIONS,
    (Collective, "kind"): COLLECTIVES,
    (Collective, "axis"): SHARED_AXES,
}
LINE = 120

_NAME = re.compile(r"(?!.*\.v-?\d+$)[^#\[\]\n]+")
_VALUE = re.compile(r"([^#\[\]\n]+?)(?:#(\d+))?(?:\[([^#\[\]\n]+)\])?(?:\.v(-?\d+))?")


def parse_value(text: str) -> Value:
    """The value that prints as `text`: the inverse of `str(value)`. ValueError for what no value prints as."""
    match = _VALUE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a value")
    name, micro_batch, axes, version = match.groups()
    ranges = {part[0]: parse_range(part[1:]) for part in axes.split(" ")} if axes else {}
    value = Value(
        name,
        -1 if micro_batch is None else int(micro_batch),
        ranges.get("r"),
        ranges.get("t"),
        ranges.get("w"),
        int(version or 0),
    )
    if str(value) != text:
        raise ValueError(f"{text!r} is not a value")
    return value


def parse_range(text: str) -> Range:
    """ "2:5" -> (2, 5). ValueError for anything else, and for a range that ends before it begins."""
    first, last = map(int, text.split(":"))
    if not 0 <= first <= last or text != f"{first}:{last}":
        raise ValueError(f"{text!r} is not a range")
    return first, last


def to_json(plan: Plan) -> str:
    """The plan as a JSON text, from which `from_json` makes an equal plan."""
    for name in plan.tensors:
        if not _NAME.fullmatch(name):
            raise OrreryError(
                f"The {plan.method} plan can't be written to a file: its tensor is called {name!r}, but names hold "
                "none of the characters # [ ] and don't end like a version (.v1). Rename the tensor."
            )
    runs: list[dict[str, object]] = []
    bodies: dict[str, str] = {}
    name_of_phase: dict[int, str] = {}
    for phase in plan.phases:
        if id(phase) not in name_of_phase:
            text = _layout(_plain(replace(phase, repeat=1)), depth=2)
            name_of_phase[id(phase)] = bodies.setdefault(text, f"body{len(bodies)}")
        runs.append({"body": name_of_phase[id(phase)], "repeat": phase.repeat})
    entries = {"orrery_plan": str(VERSION)}
    for key in ("method", "num_units", "summary", "tensors"):
        entries[key] = _layout(_plain(getattr(plan, key)), depth=1)
    entries["bodies"] = "{\n" + ",\n".join(f'  "{name}": {text}' for text, name in bodies.items()) + "\n }"
    entries["phases"] = _layout(runs, depth=1)
    return "{\n" + ",\n".join(f' "{key}": {text}' for key, text in entries.items()) + "\n}\n"


def from_json(text: str, source: str = "the plan") -> Plan:
    """The plan that a JSON text describes. OrreryError with `source`, the place and what is allowed there."""
    return _Reader(source).plan(text)


def _plain(item: Any) -> Any:
    """Dataclasses, values and mappings as what JSON knows; fields that have their default are left out."""
    if isinstance(item, Value):
        return str(item)
    if isinstance(item, Mapping):
        return {key: _plain(entry) for key, entry in item.items()}
    if isinstance(item, list | tuple):
        return [_plain(entry) for entry in item]
    if item is None or isinstance(item, str | int | float):
        return item
    entries: dict[str, Any] = {"do": DO_OF[type(item)]} if type(item) in DO_OF else {}
    for name, hint, default in _fields(item.__class__):
        entry = getattr(item, name)
        if default is MISSING or entry != default:
            entries[name] = _plain_field(hint, entry)
    return entries


def _plain_field(hint: Any, entry: Any) -> Any:
    if hint in (Range, Range | None):
        return None if entry is None else f"{entry[0]}:{entry[1]}"
    if hint == tuple[Range, ...]:
        return [f"{first}:{last}" for first, last in entry]
    return _plain(entry)


def _layout(item: Any, depth: int) -> str:
    """JSON with an action, a list of plain entries, or whatever fits, on one line."""
    line = json.dumps(item, ensure_ascii=False)
    if not isinstance(item, dict | list) or len(line) + depth <= LINE:
        return line
    entries = item.values() if isinstance(item, dict) else item
    if (isinstance(item, dict) and "do" in item) or not any(isinstance(entry, dict | list) for entry in entries):
        return line
    keys = [json.dumps(key, ensure_ascii=False) + ": " for key in item] if isinstance(item, dict) else [""] * len(item)
    inner = [" " * (depth + 1) + key + _layout(entry, depth + 1) for key, entry in zip(keys, entries, strict=True)]
    opening, closing = "{}" if isinstance(item, dict) else "[]"
    return opening + "\n" + ",\n".join(inner) + "\n" + " " * depth + closing


@cache
def _fields(cls: Any) -> tuple[tuple[str, Any, Any], ...]:
    """(name, type, default or MISSING) of each field. Tuples and mappings default to empty ones in a file."""
    hints = get_type_hints(cls)
    found = []
    for field in fields(cls):
        hint, default = hints[field.name], field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        elif default is MISSING and get_origin(hint) is tuple and hint != Range:
            default = ()
        found.append((field.name, hint, default))
    return tuple(found)


class _Reader:
    """Reads one plan file: knows its name for errors, its tensors, and the values already parsed."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.tensors: Mapping[str, Tensor] = {}
        self.values: dict[str, Value] = {}

    def fail(self, place: str, found: object, allowed: str) -> NoReturn:
        shown = json.dumps(found, ensure_ascii=False)
        shown = shown if len(shown) <= 200 else shown[:200] + "..."
        raise OrreryError(f"{self.source}: {place or 'the file'} is {shown}; allowed is {allowed}.")

    def plan(self, text: str) -> Plan:
        data = self.parsed(text)
        keys = ("orrery_plan", "method", "num_units", "summary", "tensors", "bodies", "phases")
        self.keys(data, "", keys, required=set(keys) - {"summary"})
        if self.integer(data["orrery_plan"], "orrery_plan") != VERSION:
            self.fail(
                "orrery_plan", data["orrery_plan"], f"{VERSION}, the version of the format that this Orrery reads"
            )
        self.tensors = self.read(Mapping[str, Tensor], data["tensors"], "tensors")
        bodies = self.read(Mapping[str, Phase], data["bodies"], "bodies")
        made: dict[tuple[str, int], Phase] = {}
        phases = []
        for index, run in enumerate(self.array(data["phases"], "phases")):
            place = f"phases[{index}]"
            self.keys(run, place, ("body", "repeat"), required={"body"})
            name = self.word(run["body"], f"{place}.body", tuple(bodies))
            repeat = self.integer(run.get("repeat", 1), f"{place}.repeat", least=1)
            phases.append(made.setdefault((name, repeat), replace(bodies[name], repeat=repeat)))
        if not phases:
            self.fail("phases", [], "a list of at least one phase")
        return Plan(
            method=self.read(str, data["method"], "method"),
            num_units=self.integer(data["num_units"], "num_units", least=1),
            tensors=self.tensors,
            phases=tuple(phases),
            summary=self.summary(data.get("summary", {})),
        )

    def summary(self, data: Any) -> dict[str, Any]:
        if not is_plain(data):
            self.fail("summary", data, "an object of finite numbers and Unicode texts")
        return self.object(data, "summary")

    def parsed(self, text: str) -> Any:
        try:
            return json.loads(text, object_pairs_hook=self.without_duplicates)
        except json.JSONDecodeError as error:
            raise OrreryError(
                f"{self.source}, line {error.lineno} column {error.colno}: this is not JSON ({error.msg}). "
                "Mend the file, or write it again with `orrery plan`."
            ) from error
        except ValueError as error:
            raise OrreryError(f"{self.source}: this is not JSON ({error}). Mend the file.") from error
        except RecursionError as error:
            raise OrreryError(f"{self.source}: objects or lists are nested too deeply for a plan.") from error

    def without_duplicates(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise OrreryError(f"{self.source}: the key {twice!r} stands twice in one object. Keep one of the two.")
        return entries

    def read(self, hint: Any, data: Any, place: str) -> Any:
        """`data` as the type `hint`."""
        if hint in (Value, Value | None):
            return self.value(data, place)
        if hint is str:
            return data if isinstance(data, str) and is_plain(data) else self.fail(place, data, "a Unicode text")
        if hint is bool:
            return data if isinstance(data, bool) else self.fail(place, data, "true or false")
        if hint is int:
            return self.integer(data, place)
        if hint in (Range, Range | None):
            return self.range(data, place)
        if hint == Action:
            return self.action(data, place)
        if get_origin(hint) is tuple:
            inner = get_args(hint)[0]
            return tuple(self.read(inner, entry, f"{place}[{i}]") for i, entry in enumerate(self.array(data, place)))
        if get_origin(hint) is Mapping:
            inner = get_args(hint)[1]
            return {key: self.read(inner, entry, f"{place}.{key}") for key, entry in self.object(data, place).items()}
        return self.record(hint, self.object(data, place), place)

    def record(self, cls: type, data: dict[str, Any], place: str) -> Any:
        """`data` as the dataclass `cls`."""
        known = _fields(cls)
        self.keys(
            data, place, [name for name, _, _ in known], {name for name, _, default in known if default is MISSING}
        )
        entries = {}
        for name, hint, default in known:
            if name not in data:
                entries[name] = default
            elif (cls, name) in WORDS:
                entries[name] = self.word(data[name], f"{place}.{name}", WORDS[cls, name])
            else:
                entries[name] = self.read(hint, data[name], f"{place}.{name}")
        return cls(**entries)

    def action(self, data: Any, place: str) -> Any:
        entries = dict(self.object(data, place))
        do = self.word(entries.pop("do", None), f"{place}.do", tuple(ACTION_OF))
        return self.record(ACTION_OF[do], entries, place)

    def value(self, data: Any, place: str) -> Value:
        if isinstance(data, str) and data in self.values:
            return self.values[data]
        allowed = 'a value like "hidden@4#0[r0:2].v1"'
        try:
            value = parse_value(data) if isinstance(data, str) else self.fail(place, data, allowed)
        except ValueError:
            self.fail(place, data, allowed)
        if value.name not in self.tensors:
            raise OrreryError(f"{self.source}: {place}: {unknown_name('tensor', value.name, self.tensors)}")
        if self.tensors[value.name].per_row and value.rows is None:
            self.fail(place, data, f"a value with rows, like {data}[r0:2], because {value.name} has a row per sample")
        self.values[data] = value
        return value

    def range(self, data: Any, place: str) -> Range:
        try:
            return parse_range(data) if isinstance(data, str) else self.fail(place, data, 'a range like "0:4"')
        except ValueError:
            self.fail(place, data, 'a range like "0:4"')

    def integer(self, data: Any, place: str, least: int = 0) -> int:
        if isinstance(data, bool) or not isinstance(data, int) or data < least:
            self.fail(place, data, f"a whole number from {least} up")
        return data

    def word(self, data: Any, place: str, allowed: tuple[str, ...]) -> str:
        if data not in allowed:
            self.fail(place, data, "one of " + ", ".join(allowed))
        return str(data)

    def object(self, data: Any, place: str) -> dict[str, Any]:
        return data if isinstance(data, dict) else self.fail(place, data, "an object {...}")

    def array(self, data: Any, place: str) -> list[Any]:
        return data if isinstance(data, list) else self.fail(place, data, "a list [...]")

    def keys(self, data: Any, place: str, allowed: Any, required: set[str]) -> None:
        """Refuses unknown keys and missing ones."""
        present = self.object(data, place).keys()
        for key in present - set(allowed):
            raise OrreryError(f"{self.source}: {place or 'the file'}: {unknown_name('key', key, allowed)}")
        for key in required - present:
            raise OrreryError(
                f"{self.source}: {place or 'the file'} has no key {key!r}; its keys are {', '.join(allowed)}. Add it."
            )
