"""How good techniques make a pretrained model, on samples it has not seen: means and spread over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, stdev

import pandas as pd

from harness import datasets, show
from harness.records import Record
from harness.techniques import TECHNIQUES, all_options
from results import papers
from results.comparison import caches, qualities
from results.papers import same
from results.settings import COMMON
from results.tables import MIB, Table, beside, percent, significant

#: What the techniques of one table may differ in: each has a learning rate of its own.
OWN = ("technique", "learning_rate")
#: Whose claim it is that it is as good as the others.
CLAIMED = "parallel-adapters"
REFERENCE = "full"


@dataclass(frozen=True)
class Row:
    """The runs of one technique with different seeds, by one method with or without a cache."""

    records: tuple[Record, ...]

    @property
    def technique(self) -> str:
        return self.records[0].technique

    @property
    def name(self) -> str:
        """The technique, with what was chosen of its options."""
        usual = all_options(self.technique)
        chosen = [f"{key}={value}" for key, value in self.records[0].technique_options.items() if value != usual[key]]
        return f"{self.technique} ({', '.join(chosen)})" if chosen else self.technique

    @property
    def metrics(self) -> list[float]:
        """In points, of each seed."""
        return [record.metric for record in self.records if record.metric is not None]

    @property
    def mean(self) -> float:
        return fmean(self.metrics)

    @property
    def seconds(self) -> float:
        return median(record.total_time_s for record in self.records if record.total_time_s is not None)

    @property
    def later_epoch_s(self) -> float | None:
        """Seconds of an epoch after the first: from the cache, where there is one."""
        return median(found) if (found := [s for r in self.records if (s := _later_epoch_s(r)) is not None]) else None

    @property
    def peak_bytes(self) -> float:
        return max(record.peak_memory_bytes for record in self.records if record.peak_memory_bytes is not None)


def _later_epoch_s(record: Record) -> float | None:
    if record.epochs == 1 or record.steps is not None or record.phases is None or record.total_time_s is None:
        return None
    cached = [phase.time_s for phase in record.phases if phase.name == "cached epoch"]
    return sum(cached) / (record.epochs - 1) if cached else record.total_time_s / record.epochs


@dataclass(frozen=True)
class Group:
    """The rows of one model, data set and amount of training: full fine-tuning first."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Record:
        return self.rows[0].records[0]

    @property
    def title(self) -> str:
        r = self.first
        amount = f"{r.steps} iterations" if r.steps else f"{r.epochs} epoch{'s'[: r.epochs != 1]}"
        return f"{r.model} on {r.dataset}: {datasets.spec(r.dataset).metric}, {amount} of {r.num_samples} samples"

    def others(self) -> list[Row]:
        return [row for row in self.rows if row.technique != CLAIMED]


def groups(records: Iterable[Record]) -> list[Group]:
    """The evaluated runs that differ in nothing but technique, method and seed; groups of a single technique, too."""
    found: dict[tuple[object, ...], dict[tuple[object, ...], list[Record]]] = {}
    shared = [field for field in COMMON if field not in OWN]
    for record in records:
        if record.status == "ok" and record.metric is not None:
            question = tuple(getattr(record, field) for field in ("model", "mode", *shared))
            chosen = list(TECHNIQUES).index(record.technique), json.dumps(record.technique_options)
            row = (*chosen, record.learning_rate, record.method, caches(record))
            found.setdefault(question, {}).setdefault(row, []).append(record)
    return [Group(tuple(Row(tuple(rows[key])) for key in sorted(rows))) for rows in found.values()]


def text(records: Sequence[Record]) -> str:
    """The tables for a terminal; empty where nothing was evaluated."""
    return "\n\n".join(
        "\n".join((table.title, show.columns(list(table.frame.columns), table.cells()), *table.notes))
        for table in tables(groups(records))
    )


def tables(found: Sequence[Group]) -> Iterator[Table]:
    """Of each group its own table, then the papers' cells for the same training, where there are any."""
    for number, group in enumerate(found, 1):
        name = f"quality-{number}-{group.first.model}-{group.first.dataset}"
        yield table(name, group)
        for paper in map(papers.load, papers.names()):
            compared = qualities(paper, [list(row.records) for row in group.rows])
            if compared:
                cells = beside(paper, compared[0].cell.artefact, compared)
                yield replace(cells, name=f"{name}-{cells.name}")


def table(name: str, group: Group) -> Table:
    """A row per technique; time and memory also as shares of full fine-tuning's."""
    full = next((row for row in group.rows if row.technique == REFERENCE), None)
    rows = []
    for row in group.rows:
        record = row.records[0]
        rows.append(
            {
                "technique": row.name,
                "method": record.method,
                "cache": "yes" if caches(record) else "no",
                "learning rate": f"{record.learning_rate:g}",
                "seeds": len(row.records),
                "mean": row.mean,
                "deviation": stdev(row.metrics) if len(row.records) > 1 else None,
                "lowest": min(row.metrics),
                "highest": max(row.metrics),
                "time, s": row.seconds,
                "of full's time": row.seconds / full.seconds if full else None,
                "later epoch, s": row.later_epoch_s,
                "peak, MiB": row.peak_bytes / MIB,
                "of full's peak": row.peak_bytes / full.peak_bytes if full else None,
                **_papers(group, row),
            }
        )
    frame = pd.DataFrame(rows)
    frame = frame.drop(columns=[column for column in frame.columns if frame[column].isna().all()])
    formats = {
        **dict.fromkeys(("mean", "lowest", "highest", "deviation"), "{:.2f}".format),
        **dict.fromkeys(("time, s", "later epoch, s", "peak, MiB"), significant),
        **dict.fromkeys(("of full's time", "of full's peak"), percent),
        "seeds": "{:.0f}".format,
    }
    notes = [
        "Points on the validation split, which is not trained on: 100 is perfect. Deviation: standard deviation over "
        "seeds, which draw the new weights, the order of batches and the dropout.",
        "Time: of the training, median over seeds; peak: most bytes alive at once on the worst device.",
        *_verdict(group),
    ]
    if any(column.startswith("in ") for column in frame.columns):
        notes.append("Of papers: other models, shown as context only; they are in no error figure.")
    return Table(name, group.title, frame, formats, heads=3, notes=tuple(notes))


def _papers(group: Group, row: Row) -> dict[str, str]:
    """What papers print for the technique and data set, with models of theirs."""
    return {
        f"in {paper.name.upper()}, {cell.model}": cell.value
        for paper in map(papers.load, papers.names())
        for cell in paper.cells
        if cell.is_quality
        and same(cell.dataset, group.first.dataset)
        and paper.technique(cell) == row.technique
        and not same(cell.model, group.first.model)
    }


def _verdict(group: Group) -> Iterator[str]:
    """Whether the claimed technique is as good as the others, by a rule that the line states."""
    others = group.others()
    if not others:
        return
    lowest, highest = min(min(row.metrics) for row in others), max(max(row.metrics) for row in others)
    mean = fmean(row.mean for row in others)
    for row in group.rows:
        if row.technique == CLAIMED:
            place = "within" if lowest <= row.mean <= highest else "below" if row.mean < lowest else "above"
            what = f"{row.name} {'with the cache' if caches(row.records[0]) else 'without a cache'}"
            yield (
                f"{what}: {row.mean - mean:+.2f} points from the mean of the other techniques; its mean is "
                f"{place} their spread, which is from their lowest run to their highest, {lowest:.2f} to {highest:.2f}."
            )
