"""Latency of single requests: every method in every environment, and how much faster the first is than the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from harness import registry
from harness.records import Record
from results.settings import COMMON
from results.tables import Table, significant

#: What environments and models of one table have in common.
SHARED = tuple(name for name in COMMON if name != "testbed")
OUT_OF_MEMORY = "oom"


@dataclass(frozen=True)
class Group:
    """Requests of one kind. `cells[model, testbed][method with its options]`, the methods in the order of `columns`."""

    first: Record
    cells: Mapping[tuple[str, str], Mapping[str, Record]]
    columns: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"latency-{self.first.dataset}-{self.first.seq_len}-{self.first.batch_size}-{self.first.mode}"

    @property
    def title(self) -> str:
        r = self.first
        return f"Latency of a request, {r.mode}, s: {r.batch_size} x {r.seq_len} tokens of {r.dataset}, {r.dtype}"


def groups(records: Sequence[Record]) -> list[Group]:
    """The inference runs that differ in model, testbed and method alone; groups of a single method not."""
    found: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        if record.technique == "inference" and record.status in ("ok", "oom"):
            found.setdefault((record.mode, *(getattr(record, field) for field in SHARED)), []).append(record)
    return [group for group in map(_group, found.values()) if len(group.columns) > 1]


def _group(records: Sequence[Record]) -> Group:
    cells: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        cells.setdefault((record.model, record.testbed), {})[_label(record)] = record
    columns = sorted(
        {label for cell in cells.values() for label in cell}, key=lambda label: (label.split(" ")[0], label)
    )
    systems = [label for label in columns if _is_system(label.split(" ")[0])]
    ordered = (*systems, *(label for label in columns if label not in systems))
    return Group(records[0], {key: cells[key] for key in sorted(cells)}, ordered)


def _label(record: Record) -> str:
    """The method, with the options that are not its defaults."""
    usual = registry.load_method(record.method).options
    chosen = [f"{name}={value}" for name, value in record.method_options.items() if value != usual.get(name)]
    return f"{record.method} ({', '.join(chosen)})" if chosen else record.method


def _is_system(method: str) -> bool:
    entry = registry.methods().get(method)
    return entry is not None and entry.kind == registry.SYSTEMS


def tables(found: Sequence[Group]) -> Iterator[Table]:
    """Of each group the latencies, then how many times as long the others take as the first method."""
    for group in found:
        yield latencies(group)
        if (table := speedups(group)) is not None:
            yield table


def latencies(group: Group) -> Table:
    """Seconds of a request; of what did not fit what is missing."""
    rows = [
        {"model": model, "testbed": testbed, **{label: _cell(cell.get(label)) for label in group.columns}}
        for (model, testbed), cell in group.cells.items()
    ]
    return Table(group.name, group.title, pd.DataFrame(rows), heads=2)


def _cell(record: Record | None) -> str | None:
    if record is None:
        return None
    return "out of memory" if record.status == OUT_OF_MEMORY else f"{record.latency_s:.4g}"


def speedups(group: Group) -> Table | None:
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
        f"{group.name}-ratios",
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
