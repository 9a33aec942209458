"""The same work by several methods on several testbeds: rows of models and testbeds, a column per method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import pandas as pd

from harness import registry
from harness.errors import OrreryError
from harness.records import Record
from results.settings import COMMON
from results.tables import Table, significant

#: What environments and models of one grid have in common.
SHARED = tuple(name for name in COMMON if name != "testbed")
OUT_OF_MEMORY = "oom"
#: What a run is compared by: the less, the better; none where it gave no number.
Cost = Callable[[Record], float | None]


@dataclass(frozen=True)
class Grid:
    """`cells[model, testbed][label of a method]`: models by name, testbeds by their size; in each what was run of
    `columns`, of which the first one is what the others are compared with."""

    first: Record
    cells: Mapping[tuple[str, str], Mapping[str, Record]]
    columns: tuple[str, ...]

    @property
    def records(self) -> list[Record]:
        return [record for cell in self.cells.values() for record in cell.values()]

    def rows(self, texts: Callable[[Record], object]) -> list[dict[str, object]]:
        """A row per model and testbed, with what is said of each run."""
        return [
            {"model": model, "testbed": testbed}
            | {label: texts(cell[label]) if label in cell else None for label in self.columns}
            for (model, testbed), cell in self.cells.items()
        ]


def label(record: Record) -> str:
    """The method, with those of its options that are not the defaults."""
    usual = defaults(record.method)
    told = [f"{name}={value}" for name, value in record.method_options.items() if usual.get(name) != value]
    return f"{record.method} ({', '.join(told)})" if told else record.method


@cache
def defaults(method: str) -> Mapping[str, object]:
    """Of a method that is not here any more none are known."""
    try:
        return registry.load_method(method).options
    except OrreryError:
        return {}


def arranged(records: Sequence[Record], label: Callable[[Record], str], cost: Cost) -> Grid:
    """Compared with the system that costs least, or is the only one to fit, most often: of those that are labelled by
    their name alone, if any is. The first of equals."""
    cells: dict[tuple[str, str], dict[str, Record]] = {}
    methods: dict[str, str] = {}
    for record in records:
        methods[label(record)] = record.method
        cells.setdefault((record.model, record.testbed), {})[label(record)] = record
    columns = sorted(methods, key=lambda label: (methods[label], label))
    systems = [label for label in columns if _is_system(methods[label])]
    candidates = [label for label in systems if label == methods[label]] or systems or columns
    wins = Counter(_best(cell, candidates, cost) for cell in cells.values())
    reference = max(candidates, key=lambda label: wins[label])
    ordered = (reference, *(label for label in columns if label != reference))
    sizes = {record.testbed: record.num_devices for record in records}
    rows = sorted(cells, key=lambda cell: (cell[0], sizes[cell[1]], cell[1]))
    return Grid(records[0], {key: cells[key] for key in rows}, ordered)


def _best(cell: Mapping[str, Record], labels: Sequence[str], cost: Cost) -> str | None:
    costs = {label: found for label in labels if label in cell and (found := cost(cell[label])) is not None}
    return min(costs, key=lambda label: costs[label], default=None)


def _is_system(method: str) -> bool:
    entry = registry.methods().get(method)
    return entry is not None and entry.kind == registry.SYSTEMS


def ratios(name: str, title: str, grid: Grid, cost: Cost, labels: Sequence[str], says: str) -> Table | None:
    """What each of these methods costs over what the first one does, where both ran; and the largest of each column.

    Rows that have both; None where there is none. `says` explains the numbers.
    """
    rows = []
    for (model, testbed), cell in grid.cells.items():
        base = cost(cell[grid.columns[0]]) if grid.columns[0] in cell else None
        if base:
            found = {label: _over(cell.get(label), base, cost) for label in labels}
            if any(found.values()):
                rows.append({"model": model, "testbed": testbed, **found})
    if not rows:
        return None
    frame = pd.DataFrame(rows)
    most = [
        f"{label}: {frame[label].max():.3g} at most ({frame.model[i]} on {frame.testbed[i]})"
        for label in labels
        if frame[label].notna().any()
        for i in [frame[label].astype(float).idxmax()]
    ]
    formats = dict.fromkeys(labels, significant)
    return Table(name, title, frame, formats=formats, heads=2, notes=(f"{says} {'; '.join(most)}.",))


def _over(record: Record | None, base: float, cost: Cost) -> float | None:
    found = None if record is None else cost(record)
    return found / base if found else None
