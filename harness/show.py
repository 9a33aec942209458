"""Text for people: columns, run lines, progress. Standard output carries results, standard error carries progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from harness.cluster import Cluster
from harness.costs import DIRECTIONS, FORWARD, Costs
from harness.records import Record


def columns(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Left-aligned columns, as wide as their widest entry."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )


def records_table(records: Iterable[Record]) -> str:
    """One line per run: what was asked, how it ended, the numbers people look at first."""
    asked = ("method", "model", "technique", "dataset", "batch_size", "testbed", "mode", "status")
    rows = [
        (
            *(str(getattr(record, field)) for field in asked),
            number(record.throughput_samples_per_s),
            "-" if record.total_time_s is None else duration(record.total_time_s),
            number(record.peak_memory_bytes and record.peak_memory_bytes / 2**20),
            number(record.energy_j),
        )
        for record in records
    ]
    return columns((*(field.partition("_")[0] for field in asked), "samples/s", "total", "peak MiB", "J"), rows)


def costs_table(costs: Costs, cluster: Cluster, rows: int) -> str:
    """One line per unit of the chain for a batch of `rows`: work, bytes, and seconds on each kind of device."""
    boards = {device.profile: device for device in cluster.devices}
    directions = DIRECTIONS if costs.training else (FORWARD,)
    lines = [
        (
            unit.name,
            number(unit.forward.flops(rows) / 1e9),
            number(sum(costs.parameters[name].bytes for name in unit.parameters) / 2**20),
            number(costs.saved(index, index + 1).at(rows) / 2**20),
            *(
                duration(sum(costs.seconds(board, index, index + 1, direction, rows) for direction in directions))
                for board in boards.values()
            ),
        )
        for index, unit in enumerate(costs.units)
    ]
    return columns(("unit", "forward GFLOP", "weights MiB", "saved MiB", *boards), lines)


def ending(record: Record) -> str:
    """How a run ended, in a few words."""
    if record.status == "ok":
        speed = f"ok, {number(record.throughput_samples_per_s)} samples/s"
        if record.resumed_after_epoch is not None:
            return f"{speed} since it was resumed after epoch {record.resumed_after_epoch}"
        return f"{speed} in {duration(record.total_time_s or 0)}"
    return f"{record.status}: {record.reason}"


def duration(seconds: float) -> str:
    """Seconds in the unit people would use."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def number(value: float | None) -> str:
    """Four digits, or as many as a whole number has."""
    return "-" if value is None else f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, plain lines elsewhere, both on standard error. Gives a function that ends one item."""
    if sys.stderr.isatty():
        with _bar(total) as advance:
            yield advance
        return
    done = 0

    def line(text: str) -> None:
        nonlocal done
        done += 1
        print(f"[{done}/{total}] {text}", file=sys.stderr, flush=True)

    yield line


@contextmanager
def _bar(total: int) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    layout = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*layout, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)

        def advance(text: str) -> None:
            bar.console.print(text, markup=False, highlight=False)
            bar.advance(task)

        yield advance
