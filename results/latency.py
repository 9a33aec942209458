"""Latency of single requests: every method in every environment, and how much faster the first is than the others.

Of a request that generates tokens also that of its parts: up to the first token, and every further one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from harness.records import Record
from results import grids, scaling
from results.grids import OUT_OF_MEMORY, SHARED, Grid
from results.settings import Setting
from results.tables import Table

PARTS = {
    "latency_s": "Latency of a request",
    "prefill_time_s": "Latency of a request's first token",
    "time_per_token_s": "Latency of every further token",
}


@dataclass(frozen=True)
class Group(Grid):
    """Requests of one kind."""

    @property
    def title(self) -> str:
        r = self.first
        new = f" and {r.new_tokens} new ones" if r.new_tokens else ""
        return f"{r.mode}, s: {r.batch_size} x {r.seq_len} tokens{new} of {r.dataset}, {r.dtype}"

    @property
    def parts(self) -> tuple[str, ...]:
        """The fields that have a table."""
        return tuple(PARTS) if self.first.new_tokens else ("latency_s",)


def seconds(record: Record) -> float | None:
    return record.latency_s


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
    made = (grids.arranged(runs, Setting("", tuple(runs)).label, seconds) for runs in found.values())
    return [Group(grid.first, grid.cells, grid.columns) for grid in made if len(grid.columns) > 1]


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
    rows = group.rows(lambda record: _cell(record, part))
    return Table(name, f"{PARTS[part]}, {group.title}", pd.DataFrame(rows), heads=2)


def _cell(record: Record, part: str) -> str | None:
    value = getattr(record, part)
    return "out of memory" if record.status == OUT_OF_MEMORY else None if value is None else f"{value:.4g}"


def speedups(name: str, group: Group) -> Table | None:
    """Latency of each method over that of the first column's, where both ran; and the largest of each column."""
    reference, *others = group.columns
    title = f"How many times as long as {reference} a request takes"
    return grids.ratios(name, title, group, seconds, others, "Above 1: slower.")


def text(records: Sequence[Record]) -> str:
    """The tables for a terminal; empty where no two methods answered the same requests."""
    return "\n\n".join(table.text() for table in tables(groups(records)))
