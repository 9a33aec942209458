"""Latency of single requests: every method in every environment, and how much faster the first is than the others.

Of a request that generates tokens also that of its parts: up to the first token, and every further one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from harness import registry
from harness.records import Record
from results import scaling
from results.settings import COMMON, Setting
from results.tables import Table, significant

#: What environments and models of one table have in common.
SHARED = tuple(name for name in COMMON if name != "testbed")
OUT_OF_MEMORY = "oom"
PARTS = {
    "latency_s": "Latency of a request",
    "prefill_time_s": "Latency of a request's first token",
    "time_per_token_s": "Latency of every further token",
}


@dataclass(frozen=True)
class Group:
    """Requests of one kind. `cells[model, testbed][method with its options]`, in the order of `columns`: the first one
    is what the others are compared with."""

    first: Record
    cells: Mapping[tuple[str, str], Mapping[str, Record]]
    columns: tuple[str, ...]

    @property
    def title(self) -> str:
        r = self.first
        new = f" and {r.new_tokens} new ones" if r.new_tokens else ""
        return f"{r.mode}, s: {r.batch_size} x {r.seq_len} tokens{new} of {r.dataset}, {r.dtype}"

    @property
    def parts(self) -> tuple[str, ...]:
        """The fields that have a table."""
        return tuple(PARTS) if self.first.new_tokens else ("latency_s",)


def groups(records: Sequence[Record]) -> list[Group]:
    """The inference runs that differ in model, testbed and method alone, where there are several methods or options.

    Without those that are there to see how latency scales.
    """
    found: dict[tuple[object, ...], list[Record]] = {}
    scaled = scaling.members(records)
    for record in records:
        if id(record) in scaled:
            continue
        if record.technique == "inference" and record.status in ("ok", OUT_OF_MEMORY):
            found.setdefault((record.mode, *(getattr(record, field) for field in SHARED)), []).append(record)
    return [group for group in map(_group, found.values()) if len(group.columns) > 1]


def _group(records: Sequence[Record]) -> Group:
    """Compared with the system that is the fastest, or the only one to fit, most often; the first of equals."""
    setting = Setting("", tuple(records))
    cells: dict[tuple[str, str], dict[str, Record]] = {}
    methods: dict[str, str] = {}
    for record in records:
        label = setting.label(record)
        methods[label] = record.method
        cells.setdefault((record.model, record.testbed), {})[label] = record
    columns = sorted(methods, key=lambda label: (methods[label], label))
    candidates = [label for label in columns if _is_system(methods[label])] or columns
    wins = Counter(_fastest(cell, candidates) for cell in cells.values())
    reference = max(candidates, key=lambda label: wins[label])
    ordered = (reference, *(label for label in columns if label != reference))
    return Group(records[0], {key: cells[key] for key in sorted(cells)}, ordered)


def _fastest(cell: Mapping[str, Record], labels: Sequence[str]) -> str | None:
    ran = [label for label in labels if label in cell and cell[label].latency_s is not None]
    return min(ran, key=lambda label: cell[label].latency_s or 0.0, default=None)


def _is_system(method: str) -> bool:
    entry = registry.methods().get(method)
    return entry is not None and entry.kind == registry.SYSTEMS


def tables(found: Sequence[Group]) -> Iterator[Table]:
    """Of each group the latencies, then how many times as long the others take as the first method."""
    for number, group in enumerate(found, 1):
        name = f"latency-{number}-{group.first.dataset}-{group.first.mode}"
        for part in group.parts:
            yield latencies(name if part == "latency_s" else f"{name}-{part}", group, part)
        if (table := speedups(f"{name}-ratios", group)) is not None:
            yield table


def latencies(name: str, group: Group, part: str = "latency_s") -> Table:
    """Seconds of a request, or of the `part` of it, or that it did not fit."""
    rows = [
        {"model": model, "testbed": testbed, **{label: _cell(cell.get(label), part) for label in group.columns}}
        for (model, testbed), cell in group.cells.items()
    ]
    return Table(name, f"{PARTS[part]}, {group.title}", pd.DataFrame(rows), heads=2)


def _cell(record: Record | None, part: str) -> str | None:
    if record is None:
        return None
    seconds = getattr(record, part)
    return "out of memory" if record.status == OUT_OF_MEMORY else None if seconds is None else f"{seconds:.4g}"


def speedups(name: str, group: Group) -> Table | None:
    """Latency of each method over that of the first column's, where both ran; and the largest of each column."""
    reference, *others = group.columns
    rows = []
    for (model, testbed), cell in group.cells.items():
        base = cell.get(reference)
        if base is None or not base.latency_s:
            continue
        ratios = {label: _ratio(cell.get(label), base.latency_s) for label in others}
        rows.append({"model": model, "testbed": testbed, **ratios})
    if not rows:
        return None
    frame = pd.DataFrame(rows)
    most = [
        f"{label}: {frame[label].max():.3g} at most ({frame.model[i]} on {frame.testbed[i]})"
        for label in others
        if frame[label].notna().any()
        for i in [frame[label].astype(float).idxmax()]
    ]
    return Table(
        name,
        f"How many times as long as {reference} a request takes",
        frame,
        formats=dict.fromkeys(others, significant),
        heads=2,
        notes=("Above 1: slower. " + "; ".join(most) + ".",),
    )


def _ratio(record: Record | None, base: float) -> float | None:
    return None if record is None or not record.latency_s else record.latency_s / base


def text(records: Sequence[Record]) -> str:
    """The tables for a terminal; empty where no two methods answered the same requests."""
    return "\n\n".join(table.text() for table in tables(groups(records)))
