"""Training on several testbeds: every method on each of them, how much faster the first is than the others, what it
owes to its parts, and what memory and bytes it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from harness.records import Record
from harness.registry import load_testbed
from results import grids
from results.grids import OUT_OF_MEMORY, SHARED, Grid, label
from results.papers import of_testbed
from results.tables import MIB, Table, significant

#: So many testbeds make a comparison across them.
LEAST_TESTBEDS = 3
#: What is said of runs that are not ok, and yet belong into a comparison.
NOT_RUN = {OUT_OF_MEMORY: "out of memory", "unsupported": "unsupported"}


def seconds(record: Record) -> float | None:
    return record.time_per_sample_s


def sent(record: Record) -> float | None:
    return record.comm_bytes


def groups(records: Sequence[Record]) -> list[Grid]:
    """The training runs that differ in model, testbed and method alone, of several methods on several testbeds: those
    that are no paper's, for what is a paper's stands beside that. Links differ, and what boards can do does not."""
    found: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        trained = record.technique != "inference" and record.status in ("ok", *NOT_RUN)
        if trained and of_testbed(record.testbed) is None:
            shared = (getattr(record, field) for field in SHARED)
            found.setdefault((record.mode, boards(record.testbed), *shared), []).append(record)
    made = [
        grids.arranged(runs, label, seconds)
        for runs in found.values()
        if len({run.testbed for run in runs}) >= LEAST_TESTBEDS
    ]
    several = (grid for grid in made if len(grid.columns) > 1)
    return sorted(several, key=lambda grid: (title(grid), grid.columns))


def boards(testbed: str) -> str:
    """What the testbed's name asks of boards, not of links: "@145us" of "nano-4@1000mbit@145us"."""
    return "".join(f"@{asked}" for asked in testbed.split("@")[1:] if asked.endswith(("gib", "us")))


def members(found: Sequence[Grid]) -> set[int]:
    """The `id`s of records that need no tables and figures beside those of the grids: those of all testbeds but the one
    on which the first method is ahead the furthest, and there those of that method with other options."""
    told: set[int] = set()
    for grid in found:
        shown, variants = widest(grid), own(grid)[1:]
        for (_, testbed), cell in grid.cells.items():
            told |= {id(run) for called, run in cell.items() if called in variants or testbed != (shown or testbed)}
    return told


def widest(grid: Grid) -> str | None:
    """The testbed on which the first method is ahead of the best of the other methods the furthest, over all models."""
    leads: dict[str, float] = {}
    for (_, testbed), cell in grid.cells.items():
        mine = seconds(cell[grid.columns[0]]) if grid.columns[0] in cell else None
        theirs = [found for name in others(grid) if name in cell and (found := seconds(cell[name])) is not None]
        if mine and theirs:
            leads[testbed] = max(leads.get(testbed, 0.0), min(theirs) / mine)
    return max(leads, key=lambda testbed: leads[testbed], default=None)


def own(grid: Grid) -> list[str]:
    """The first method's columns: as it is, and with other options."""
    method = grid.columns[0].partition(" (")[0]
    return [column for column in grid.columns if column.partition(" (")[0] == method]


def others(grid: Grid) -> list[str]:
    """The columns of other methods."""
    return [column for column in grid.columns if column not in own(grid)]


def title(grid: Grid) -> str:
    r = grid.first
    shape = f"{r.seq_len} tokens" if r.seq_len else f"{r.image_size} x {r.image_size} pixels"
    technique = "" if r.technique == "full" else f", {r.technique}"
    asked = boards(r.testbed)
    where = f" on boards {asked}" if asked else ""
    return f"{r.mode}{where}: {r.dataset}, {shape}, batch {r.batch_size}, {r.optimizer}, {r.dtype}{technique}"


def name(grid: Grid, number: int) -> str:
    """Of the grid's tables and figures, unique in a report."""
    return f"throughput-{number}-{grid.first.dataset}-{grid.first.mode}"


def tables(grid: Grid, number: int = 1) -> Iterator[Table]:
    """Samples per second, and the other methods' time over the first one's, which is then compared with itself where
    its options were others."""
    first, *parts = own(grid)
    compared, called = others(grid), name(grid, number)
    yield _texts(called, f"Throughput, samples/s, {title(grid)}", grid, [first, *compared], _throughput)
    over = f"How many times as long as {first} a sample takes"
    made = (
        grids.ratios(f"{called}-speedups", over, grid, seconds, compared, "Above 1: slower."),
        grids.ratios(f"{called}-parts", f"{over}, otherwise", grid, seconds, parts, "Above 1: slower."),
    )
    yield from filter(None, made)


def details(grid: Grid, number: int = 1) -> Iterator[Table]:
    """Bytes and memory of every method; of the first one memory of every device, and its plans."""
    first, called = grid.columns[0], name(grid, number)
    more = f"How many times as many bytes as by {first} are sent"
    if (sends := grids.ratios(f"{called}-bytes", more, grid, sent, others(grid), "Above 1: more.")) is not None:
        yield sends
    yield _texts(f"{called}-peaks", f"Peak memory of the worst device, MiB, {title(grid)}", grid, grid.columns, _peak)
    rows = [
        {"model": model, "testbed": testbed, **_devices(cell[first])}
        for (model, testbed), cell in grid.cells.items()
        if first in cell
    ]
    each = f"Peak memory of every device by {first}: MiB, and part of what it has"
    yield Table(f"{called}-devices", each, pd.DataFrame(rows), heads=2)
    plans = f"Layers, devices and, where several share them, rows of a micro-batch by {first}"
    yield _texts(f"{called}-plans", plans, grid, [first], _plan)


def _texts(name: str, title: str, grid: Grid, columns: Sequence[str], say: Callable[[Record], str | None]) -> Table:
    return Table(name, title, pd.DataFrame(grid.rows(say))[["model", "testbed", *columns]], heads=2)


def _throughput(record: Record) -> str | None:
    value = record.throughput_samples_per_s
    return NOT_RUN.get(record.status) or (None if value is None else significant(value))


def _peak(record: Record) -> str | None:
    return None if record.peak_memory_bytes is None else f"{record.peak_memory_bytes / MIB:.0f}"


def _devices(record: Record) -> dict[str, str]:
    budgets = {device.name: device.memory_bytes for device in load_testbed(record.testbed).cluster.devices}
    return {
        device: f"{memory.peak_bytes / MIB:.0f} ({memory.peak_bytes / budgets[device]:.0%})"
        for device, memory in sorted((record.memory or {}).items())
    }


def _plan(record: Record) -> str | None:
    """ "0-7 on 3 | 7-19 on 2 (12), 0 (10), 1 (10)": layers [0, 7) on device3."""
    plan: Mapping[str, Any] = record.plan or {}
    if not plan.keys() >= {"layer_cuts", "devices", "rows"}:
        return None
    stages = []
    for (first, last), devices, rows in zip(plan["layer_cuts"], plan["devices"], plan["rows"], strict=True):
        names = [device.removeprefix("device") for device in devices]
        shared = [f"{name} ({count})" for name, count in zip(names, rows, strict=True)]
        stages.append(f"{first}-{last} on {', '.join(shared if len(names) > 1 else names)}")
    return f"{' | '.join(stages)}; {record.micro_batch_size} rows"


def text(records: Sequence[Record]) -> str:
    """The tables for a terminal; empty where nothing was trained on several testbeds by several methods."""
    return "\n\n".join(table.text() for grid in groups(records) for table in tables(grid))
