"""The tables of a report, as data frames with what is needed to print them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from harness import show
from harness.records import Record
from results import again
from results.comparison import GIB, Comparison, mean_error
from results.papers import Paper, same
from results.settings import Setting
from testbeds import library

MIB = 2**20
#: Unit of a table's times, by the longest of them.
TIME_UNITS = (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3))


#: What a simulated and a real run are compared by: text, field, divisor.
MEASURED = (
    ("total time, s", "total_time_s", 1),
    ("samples/s", "throughput_samples_per_s", 1),
    ("peak memory, MiB", "peak_memory_bytes", MIB),
)


@dataclass(frozen=True)
class Table:
    """`frame` holds plain numbers and texts; `formats[column]` turns a number into text. `name` is unique in a report.

    The first `heads` columns name the row.
    """

    name: str
    title: str
    frame: pd.DataFrame
    formats: Mapping[str, Callable[[float], str]] = field(default_factory=dict)
    heads: int = 1
    notes: tuple[str, ...] = ()

    def cells(self) -> list[list[str]]:
        """Every row as text; a dash where there is nothing."""
        return [
            [self._text(column, value) for column, value in zip(self.frame.columns, row, strict=True)]
            for row in self.frame.itertuples(index=False)
        ]

    def text(self) -> str:
        """For a terminal."""
        return "\n".join((self.title, show.columns(list(self.frame.columns), self.cells()), *self.notes))

    def numeric(self, column: str) -> bool:
        return column in self.formats

    def _text(self, column: str, value: object) -> str:
        if value is None or value == "" or (isinstance(value, float) and pd.isna(value)):
            return "-"
        return self.formats[column](value) if column in self.formats and isinstance(value, int | float) else str(value)


def significant(value: float) -> str:
    """Three digits, or as many as a whole number has."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def percent(value: float) -> str:
    return f"{value:.1%}"


#: Of the table of runs: formats of columns that are no plain numbers, and what columns mean, without their units.
RUN_FORMATS: dict[str, Callable[[float], str]] = {
    "idle": percent,
    "network": percent,
    "micro-batch": "{:.0f}".format,
    "paper, h": str,
}
RUN_NOTES = {
    "spread": "Spread: interquartile range of the repeats; every time is their median.",
    "peak": "Peak: most bytes alive at once on the worst device; of a run that did not fit, what it would need.",
    "energy": "Energy: of all devices over the run, idle power included; modelled where simulated.",
    "idle": "Idle: share of the run in which a device does not compute, mean over devices.",
    "network": "Network: share of the run in which the busiest network queue of any device works.",
}


def runs(setting: Setting, comparisons: Mapping[str, Sequence[Comparison]]) -> Table:
    """Method x model: times, throughput, memory, status; beside ours the paper's hours for the same run."""
    theirs = [c for cells in comparisons.values() for c in cells if c.cell.metric == "training_time_h"]
    longest = max((r.total_time_s for r in setting.records if r.total_time_s is not None), default=0.0)
    unit, seconds = next(((u, s) for u, s in TIME_UNITS if longest >= s or theirs), TIME_UNITS[-1])
    rows = []
    for record in setting.records:
        total = None if record.total_time_s is None else record.total_time_s / seconds
        rows.append(
            {
                "model": record.model,
                "method": setting.label(record),
                "mode": record.mode,
                "status": record.status,
                f"per epoch, {unit}": None if total is None or record.steps else total / record.epochs,
                f"in all, {unit}": total,
                f"spread, {unit}": record.iqr["total_time_s"] / seconds if record.iqr else None,
                "paper, h": next((c.cell.value for c in theirs if _answers(c, setting, record)), None),
                "samples/s": record.throughput_samples_per_s,
                "peak, MiB": record.peak_memory_bytes and record.peak_memory_bytes / MIB,
                "energy, kJ": record.energy_j and record.energy_j / 1000,
                "idle": record.bubble_fraction,
                "network": _network(record),
                "micro-batch": record.micro_batch_size,
                "note": note(record),
            }
        )
    frame = pd.DataFrame(rows)
    one_mode = frame["mode"].nunique() == 1
    frame = frame.drop(columns=[c for c in frame.columns if (frame[c].isna() | (frame[c] == "")).all()])
    texts = ("model", "method", "mode", "status", "note")
    notes = [RUN_NOTES[name] for name in (column.partition(",")[0] for column in frame.columns) if name in RUN_NOTES]
    formats = {column: RUN_FORMATS.get(column, significant) for column in frame.columns if column not in texts}
    return Table(
        f"{setting.name}-runs",
        f"{setting.title}, {setting.first.mode}" if one_mode else setting.title,
        frame.drop(columns="mode") if one_mode else frame,
        formats,
        heads=2,
        notes=tuple(notes),
    )


def _network(record: Record) -> float | None:
    """Share of the run in which the busiest network queue works; none where nothing is sent."""
    if not record.comm_bytes or record.comm_time_s is None or record.total_time_s is None:
        return None
    return record.comm_time_s / record.total_time_s


def _answers(comparison: Comparison, setting: Setting, record: Record) -> bool:
    return comparison.how == setting.label(record) and same(comparison.cell.model, record.model)


def note(record: Record) -> str:
    """Why a run is not ok, and whether that hangs on a constant that is not known better than a range."""
    if record.reason is None:
        return ""
    return "; ".join((record.reason, *_hangs_on(record)))


def _hangs_on(record: Record) -> Iterable[str]:
    """An out-of-memory verdict that the upper end of the memory's own range would turn."""
    device = re.match(r"\w+", record.reason or "")
    profile = record.provenance.devices.get(device[0]) if device else None
    if record.status != "oom" or profile not in library.devices() or record.peak_memory_bytes is None:
        return
    memory = library.load_device(profile).constants.get("usable_memory_bytes")
    if memory is not None and memory.high is not None and record.peak_memory_bytes <= memory.high:
        yield f"depends on usable_memory_bytes, which may be up to {memory.high / MIB:.1f} MiB"


def beside(paper: Paper, artefact: str, comparisons: Sequence[Comparison]) -> Table:
    """A paper's table or figure, cell by cell, beside ours."""
    frame = pd.DataFrame(
        {
            "model": c.cell.model,
            "data set": c.cell.dataset,
            "devices": c.cell.devices,
            "epochs": c.cell.epochs,
            "technique": c.cell.technique,
            "system": c.cell.system,
            "quantity": c.cell.quantity,
            "ours from": c.how,
            "paper": c.cell.value,
            "ours": c.ours,
            "error": c.verdict,
            "paper's value is": "; ".join(filter(None, (c.cell.provenance, c.cell.note))),
        }
        for c in comparisons
    )
    error = mean_error(comparisons)
    notes = [] if error is None else [f"Mean absolute error over {_counted(comparisons)} cells: {error:.1%}."]
    if left_out := sum(c.fitted for c in comparisons):
        notes.append(f"{left_out} cells are marked fitted: constants were fitted to them, so no error figure has them.")
    if otherwise := sum(not c.alike and bool(c.cell.value) for c in comparisons):
        notes.append(f"{otherwise} are of runs otherwise than the paper's, as far as its way is known: not in it.")
    if any(not c.cell.value for c in comparisons):
        notes.append("Predictions are for models that the paper measured elsewhere, not here.")
    return Table(
        f"{paper.name}-{artefact}",
        f"{paper.title}: {title_of(artefact)}",
        frame.drop(columns=[column for column in frame.columns if (frame[column] == "").all()]),
        {"ours": lambda value: f"{value:.4g}", "paper": str},
        heads=2,
        notes=tuple(notes),
    )


def _counted(comparisons: Iterable[Comparison]) -> int:
    return sum(c.error is not None for c in comparisons)


def title_of(artefact: str) -> str:
    """ "fig8a" -> "Figure 8(a)", "table2" -> "Table 2"."""
    match = re.fullmatch(r"(fig|table)(\d+)(\w?)", artefact)
    if match is None:
        return artefact
    part = f"({match[3]})" if match[3] else ""
    return f"{'Figure' if match[1] == 'fig' else 'Table'} {match[2]}{part}"


def kept(found: Sequence[Setting], comparison: Comparison) -> Table:
    """What explains the difference in the bytes kept for the backward pass: counted, not fitted."""
    from results.dropout import kept_bytes

    cell = comparison.cell
    setting, record = next(
        (setting, record)
        for setting in found
        if setting.paper is not None and setting.paper.name == cell.paper
        for record in setting.records
        if same(cell.model, record.model) and record.technique == setting.paper.technique(cell)
    )
    theirs = comparison.cell.number
    assert theirs is not None
    rows = [
        {"kept for the backward pass": text, "GiB": nbytes / GIB, "less the paper's, GiB": nbytes / GIB - theirs}
        for text, nbytes in kept_bytes(again.workload(record)).items()
    ]
    return Table(
        f"{setting.name}-kept",
        f"Why the activations of {record.model} differ from the paper's {comparison.cell.value} GiB",
        pd.DataFrame(rows),
        {"GiB": lambda value: f"{value:.3f}", "less the paper's, GiB": lambda value: f"{value:+.3f}"},
        notes=(
            "The first row is what the ledger of a testbed of GPUs uses. What remains of the gap these counts do "
            "not explain. Nothing was fitted to the paper's value.",
        ),
    )


def modes(setting: Setting) -> Table | None:
    """The same run in several modes: the simulator beside what really happened."""
    groups: dict[tuple[str, str], dict[str, Record]] = {}
    for record in setting.records:
        if record.status == "ok":
            groups.setdefault((record.model, setting.label(record)), {})[record.mode] = record
    rows = [
        {
            "model": model,
            "method": method,
            "quantity": text,
            mode: getattr(real, name) / divisor,
            "simulated": getattr(by_mode["simulated"], name) / divisor,
            "simulated / real": getattr(by_mode["simulated"], name) / getattr(real, name),
        }
        for (model, method), by_mode in groups.items()
        for mode, real in by_mode.items()
        if mode != "simulated" and "simulated" in by_mode
        for text, name, divisor in MEASURED
    ]
    if not rows:
        return None
    frame = pd.DataFrame(rows)
    numbers = [column for column in frame.columns if column not in ("model", "method", "quantity")]
    formats = dict.fromkeys(numbers, significant) | {"simulated / real": lambda value: f"{value:.3f}"}
    return Table(f"{setting.name}-modes", f"{setting.title}: simulated beside real", frame, formats, heads=3)


def constants(setting: Setting) -> Table | None:
    """The constants underneath that nobody measured, or that were fitted, with their ranges."""
    seen = {
        (c.owner, c.key): {
            "of": c.owner,
            "constant": c.key,
            "value": c.value,
            "low": c.low,
            "high": c.high,
            "origin": f"fitted to {', '.join(c.cells)}" if c.cells else c.provenance,
            "source": c.source,
        }
        for record in setting.records
        for c in record.provenance.assumptions
    }
    if not seen:
        return None
    return Table(
        f"{setting.name}-constants",
        f"Assumed and fitted constants of {setting.first.testbed}",
        pd.DataFrame(seen.values()),
        dict.fromkeys(("value", "low", "high"), lambda value: f"{value:.4g}"),
        heads=2,
    )
