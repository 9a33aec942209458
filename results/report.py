"""The report of a results folder: report.md and index.html, from what lies there alone. Same records, same bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

from harness import store
from harness.compare import title as run_title
from harness.records import Record
from results import (
    agreement,
    claims,
    document,
    figures,
    latency,
    papers,
    parallelisms,
    quality,
    rates,
    recovery,
    scaling,
    scores,
    system_claims,
    tables,
    throughput,
    validation,
)
from results.comparison import COUNTED_BYTES, Comparison, compare
from results.document import Block, Bullets, Folded, Heading, Text
from results.grids import Grid
from results.papers import Paper
from results.settings import Setting, settings
from results.tables import Table

TITLE = "Orrery: report"


def write(folder: Path) -> Path:
    """Write runs.csv, runs.parquet, tables/, figures/, report.md and index.html into the results folder.

    Returns the path of the page. Raises OrreryError where the folder has no results or can't be written.
    """
    validated = list(_validation(folder))
    recorded: list[Block] = []
    if store.holds_records(folder) or not validated:
        store.table(folder)
        recorded = list(_blocks(store.load_all(folder), folder))
    blocks = [Heading(1, TITLE), *recorded, *validated]
    for block in blocks:
        table = block.table if isinstance(block, Folded) else block
        if isinstance(table, Table):
            store.write_whole(folder / "tables" / f"{table.name}.csv", partial(table.frame.to_csv, index=False))
    page = folder / "index.html"
    _write(folder / "report.md", document.markdown(blocks, folder))
    _write(page, document.html(TITLE, blocks, folder))
    return page


def _write(path: Path, text: str) -> None:
    store.write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def _blocks(records: Sequence[Record], folder: Path) -> Iterator[Block]:
    lost = recovery.members(records)
    whole = [record for record in records if record.inject is None]
    found = settings(whole)
    yield Text(_summary(records))
    yield Bullets(tuple(f"{setting.title}: {_summary(setting.records)}" for setting in found))
    compared = [compare(setting) for setting in found]
    trained = throughput.groups(whole)
    elsewhere, told = scaling.members(whole), throughput.members(trained)
    for setting, comparisons in zip(found, compared, strict=True):
        left = tuple(record for record in setting.records if id(record) not in told)
        if not all(id(record) in elsewhere for record in left):
            yield from _setting(replace(setting, records=left), comparisons, folder)
    for name, cells in scores.of_papers(compared).items():
        yield from _beside(papers.load(name), cells, found)
    yield from _agreement(found, folder)
    yield from _quality(whole)
    yield from _latency(whole)
    yield from _throughput(trained, folder)
    yield from _scaling(whole)
    if study := list(parallelisms.tables(whole)):
        yield Heading(2, "The energy of four parallelisms")
        yield from study
    yield from _claims(records)
    if recovered := list(recovery.tables(lost)):
        yield Heading(2, "Devices that were lost")
        yield from recovered
    yield from _origin([*(record for setting in found for record in setting.records), *lost])


def _summary(records: Sequence[Record]) -> str:
    statuses = Counter(record.status for record in records)
    counts = ", ".join(f"{number} {status}" for status, number in sorted(statuses.items()))
    return f"{len(records)} run{'s'[: len(records) != 1]}: {counts}."


def _setting(setting: Setting, comparisons: Mapping[str, Sequence[Comparison]], folder: Path) -> Iterator[Block]:
    yield Heading(2, setting.title)
    yield Text(setting.work)
    yield tables.runs(setting, comparisons)
    rests_on = tables.constants(setting)
    if rests_on is not None:
        yield Folded(rests_on)
    yield from figures.draw(setting, folder / "figures")
    several = tables.modes(setting)
    if several is not None:
        yield several


def _beside(paper: Paper, comparisons: Sequence[Comparison], found: Sequence[Setting]) -> Iterator[Block]:
    """A paper's claims, tables and figures beside ours."""
    yield Heading(2, f"Beside {paper.title}")
    yield Text(f"doi {paper.doi}. Error: (ours - paper's) / paper's.")
    yield from filter(None, (scores.summary(paper, comparisons), claims.table(paper, comparisons)))
    for artefact, cells in scores.by_artefact(comparisons).items():
        yield tables.beside(paper, artefact, cells)
        for cell in cells:
            what = (cell.cell.metric, cell.cell.technique, cell.how)
            if what == ("activations_gib", "Full", COUNTED_BYTES) and cell.cell.value:
                yield tables.kept(found, cell)
        if artefact == paper.rates.get("artefact"):
            flips, points = rates.tables(paper, cells) or (None, None)
            if flips and points:
                yield flips
                yield Folded(points)


def _agreement(found: Sequence[Setting], folder: Path) -> Iterator[Block]:
    """Nothing where no run on several devices was done in both modes."""
    pairs = agreement.pairs(found)
    if not any(pair.ok for pair in pairs):
        return
    yield Heading(2, "Simulated beside emulated")
    yield Text(
        "The same plans in virtual time and for real: processes of this machine that train, and exchange tensors over "
        "TCP. Emulated times are medians of repeats of real runs, on a machine that is never quite still; simulated "
        "ones come from times of single layers, measured beforehand, and from the links' rates."
    )
    yield agreement.cells(pairs)
    yield agreement.summary(pairs)
    overlaid = figures.laid_on_each_other(pairs, folder)
    if overlaid is not None:
        yield overlaid
    for table in agreement.measured(pairs):
        yield Folded(table)


def _quality(records: Sequence[Record]) -> Iterator[Block]:
    """Nothing where no run was evaluated."""
    found = quality.groups(records)
    if found:
        yield Heading(2, "Quality of what was trained")
        yield from quality.tables(found)


def _latency(records: Sequence[Record]) -> Iterator[Block]:
    """Nothing where no two methods answered the same requests."""
    if found := latency.groups(records):
        yield Heading(2, "Latency of requests")
        yield from latency.tables(found)


def _throughput(grids: Sequence[Grid], folder: Path) -> Iterator[Block]:
    """Nothing where no several methods trained the same on several testbeds."""
    if grids:
        yield Heading(2, "Training on several testbeds")
    for number, grid in enumerate(grids, 1):
        yield Heading(3, throughput.title(grid))
        yield from throughput.tables(grid, number)
        yield from figures.leads(grid, folder / "figures" / f"{throughput.name(grid, number)}-speedups")
        yield from map(Folded, throughput.details(grid, number))


def _scaling(records: Sequence[Record]) -> Iterator[Block]:
    """Nothing where no family of testbeds has a single device."""
    for training, what in ((False, "Latency"), (True, "Training")):
        found = [group for group in scaling.groups(records) if group.training == training]
        if scaled := list(scaling.tables(found)):
            yield Heading(2, f"{what} on more devices")
            yield from scaled


def _claims(records: Sequence[Record]) -> Iterator[Block]:
    """What is claimed of systems whose cells are not known."""
    for title, table in system_claims.tables(records):
        yield Heading(2, f"What {title} claims")
        yield table


def _validation(folder: Path) -> Iterator[Block]:
    """Nothing where nobody asked for it."""
    predicted = validation.load(folder)
    if predicted is None:
        return
    yield Heading(2, "Validation on data never fitted")
    yield Text(
        "What others measured on boards, predicted from what is known of other boards and other models. Training goes "
        "through the cost model of every simulated run: FLOPs counted from the real modules, over a fraction of the "
        "board's peak that belongs to an operator class and a direction."
    )
    yield from validation.tables(predicted)


def _origin(records: Sequence[Record]) -> Iterator[Block]:
    """Code and libraries that made the records; then what differs from run to run of the same thing."""
    yield Heading(2, "Where the numbers come from")
    origins = Counter(
        json.dumps(
            {
                "orrery-bench": r.provenance.package_version or "not installed",
                "git commit": r.provenance.git_commit or "no checkout",
                "with uncommitted changes": {True: "yes", False: "no", None: "-"}[r.provenance.git_dirty],
                "record schema": r.provenance.schema_version,
                **r.provenance.libraries,
                **{key: r.provenance.host[key] for key in ("python", "machine") if key in r.provenance.host},
            }
        )
        for r in records
    )
    rows = [{"runs": count, **json.loads(origin)} for origin, count in sorted(origins.items())]
    turned = pd.DataFrame(
        [{"what": key, **{f"origin {n}": row.get(key) for n, row in enumerate(rows, 1)}} for key in rows[0]]
    )
    yield Table("origin", "Code and libraries", turned)
    files = pd.DataFrame(
        {
            "run": run_title(r),
            "status": r.status,
            "seed": r.provenance.seed,
            "record": f"runs/{r.provenance.config_hash}.json",
        }
        for r in records
    )
    yield Folded(Table("records", f"The records of the {len(records)} runs", files))
    yield Heading(2, "Wall clock")
    yield Text("These numbers differ from one execution of the same runs to the next.")
    clock = pd.DataFrame(
        {
            "run": run_title(r),
            "planning, s": r.planning_time_s,
            "host": r.provenance.host.get("name"),
            "cpus": r.provenance.host.get("cpus"),
        }
        for r in records
    )
    yield Folded(Table("clock", "Time that planning took", clock, {"planning, s": tables.significant, "cpus": str}))
