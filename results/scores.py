"""How near our numbers come to a paper's, artefact by artefact: errors, what does not fit, and who is ahead of whom."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from itertools import combinations
from statistics import fmean, median

import pandas as pd

from harness import show
from harness.records import Record
from results import claims, papers
from results.comparison import Comparison, compare
from results.papers import CLAIMS, Paper
from results.settings import settings
from results.tables import Table, percent, title_of

Key = tuple[str, ...]


def of_papers(compared: Iterable[Mapping[str, Sequence[Comparison]]]) -> dict[str, list[Comparison]]:
    """By paper: the comparisons of all settings, each once, in the order of the paper's artefacts.

    A cell is counted or run in one way once, and runs that stand for it alike with options that make no difference,
    such as a cache that has nothing to do, are one.
    """
    found: dict[str, list[Comparison]] = {}
    seen: set[tuple[object, ...]] = set()
    for c in (c for artefacts in compared for comparisons in artefacts.values() for c in comparisons):
        keys = {(c.cell, c.how), (c.cell, c.ours, c.alike)}
        if not keys & seen:
            found.setdefault(c.cell.paper, []).append(c)
        seen |= keys
    return {name: sorted(comparisons, key=_places(papers.load(name))) for name, comparisons in found.items()}


def _places(paper: Paper) -> Callable[[Comparison], tuple[int, int]]:
    artefacts = {name: place for place, name in enumerate((*paper.artefacts, CLAIMS))}
    cells = {cell: place for place, cell in enumerate((*paper.cells, *paper.predicted))}
    return lambda comparison: (artefacts[comparison.cell.artefact], cells[comparison.cell])


def by_artefact(comparisons: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    """The comparisons of tables and figures."""
    found: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.cell.artefact != CLAIMS:
            found.setdefault(comparison.cell.artefact, []).append(comparison)
    return found


def text(records: Sequence[Record]) -> str:
    """The summaries for a terminal; empty where no paper has a cell for any of the records."""
    made = [
        table
        for name, comparisons in of_papers(map(compare, settings(records))).items()
        for table in (summary(papers.load(name), comparisons), claims.table(papers.load(name), comparisons))
        if table is not None
    ]
    return "\n\n".join(
        "\n".join((table.title, show.columns(list(table.frame.columns), table.cells()), *table.notes)) for table in made
    )


def summary(paper: Paper, comparisons: Sequence[Comparison]) -> Table | None:
    """A row per artefact and way of comparing: absolute errors, and agreement on what no error says."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for artefact, cells in by_artefact(comparisons).items():
        for comparison in cells:
            groups.setdefault((artefact, _way(comparison)), []).append(comparison)
    rows = [_row(artefact, way, cells, several(paper)) for (artefact, way), cells in groups.items()]
    rows = [row for row in rows if row]
    if not rows:
        return None
    frame = pd.DataFrame(rows)
    formats: dict[str, Callable[[float], str]] = {
        **dict.fromkeys(("median", "mean", "worst"), percent),
        **dict.fromkeys(("cells", "fitted", "predictions", "run otherwise"), "{:.0f}".format),
    }
    return Table(
        f"{paper.name}-summary",
        f"How near to {paper.title}",
        frame,
        formats,
        heads=2,
        notes=(
            "Errors are absolute, each cell's (ours - paper's) / paper's. Not in them, but counted beside: cells that "
            "constants were fitted to; predictions, which the paper has no cell for; and runs otherwise than the "
            "paper's, as far as its way is known.",
            "Out of memory, groupings: cells that are no number on either side, and agree.",
            "Order: pairs of systems or techniques on the same model, data set and devices that are in the paper's "
            "order, of all pairs whose numbers the paper's digits tell apart.",
        ),
    )


def _way(comparison: Comparison) -> str:
    counted = comparison.how.startswith(("counted", "one "))
    return "counted" if counted else "whole runs"


def _row(artefact: str, way: str, comparisons: Sequence[Comparison], swept: frozenset[str]) -> dict[str, object]:
    errors = [abs(c.error) for c in comparisons if c.error is not None]
    of_the_paper = [c for c in comparisons if c.alike and c.cell.value and c.ours is not None]
    words = [c for c in of_the_paper if c.cell.number is None or isinstance(c.ours, str)]
    ordered, pairs = in_order(comparisons, swept)
    if not errors and not words:
        return {}
    return {
        "artefact": title_of(artefact),
        "ours from": way,
        "cells": len(errors),
        "median": median(errors) if errors else None,
        "mean": fmean(errors) if errors else None,
        "worst": max(errors, default=None),
        "out of memory, groupings": f"{sum(c.ours == c.cell.value for c in words)} of {len(words)}" if words else "",
        "order": f"{ordered} of {pairs}" if pairs else "",
        "fitted": sum(c.fitted for c in comparisons),
        "predictions": sum(not c.cell.value and c.ours is not None for c in comparisons),
        "run otherwise": sum(bool(c.cell.value) and not c.alike for c in comparisons),
    }


def several(paper: Paper) -> frozenset[str]:
    """Artefacts that show one system on several numbers of devices, so that order is within each."""
    seen: dict[Key, set[str]] = {}
    for cell in (cell for cell in paper.cells if cell.artefact != CLAIMS):
        key = (cell.artefact, cell.model, cell.dataset, cell.technique, cell.system, cell.epochs, cell.metric)
        seen.setdefault(key, set()).add(cell.devices)
    return frozenset(key[0] for key, devices in seen.items() if len(devices) > 1)


def in_order(comparisons: Iterable[Comparison], swept: frozenset[str]) -> tuple[int, int]:
    """Pairs that are in the paper's order here, and all pairs that can be told apart in the paper.

    A pair is of two systems or techniques for one model, data set, number of epochs and metric, and in the artefacts
    `swept` one number of devices. It is told apart where the paper's values differ by their last digit or more.
    """
    groups: dict[Key, list[Comparison]] = {}
    for c in comparisons:
        if c.alike and isinstance(c.ours, float) and c.cell.number is not None:
            devices = c.cell.devices if c.cell.artefact in swept else ""
            key = (c.cell.artefact, c.cell.model, c.cell.dataset, c.cell.epochs, c.cell.metric, devices)
            groups.setdefault(key, []).append(c)
    pairs = [pair for group in groups.values() for pair in combinations(group, 2) if _told_apart(*pair)]
    return sum(_same_order(*pair) for pair in pairs), len(pairs)


def _told_apart(a: Comparison, b: Comparison) -> bool:
    theirs = Decimal(a.cell.value), Decimal(b.cell.value)
    last_digit = max(Decimal(1).scaleb(int(value.as_tuple().exponent)) for value in theirs)
    return abs(theirs[0] - theirs[1]) >= last_digit


def _same_order(a: Comparison, b: Comparison) -> bool:
    assert isinstance(a.ours, float) and isinstance(b.ours, float)
    theirs = Decimal(a.cell.value) - Decimal(b.cell.value)
    return (a.ours - b.ours) * float(theirs) > 0
