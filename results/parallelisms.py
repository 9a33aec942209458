"""Four parallelisms by energy: what a sample takes by each, and whether what is said of them holds here.

Nobody could read a number of the study of collaborative edge training (IEEE Wireless Communications 31, 2024;
arXiv 2404.17766): what is reproduced are its statements, each with a verdict for every testbed and workload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness import models
from harness.errors import OrreryError
from harness.records import Record
from harness.registry import load_testbed
from harness.workload import Workload
from results.settings import COMMON
from results.tables import MIB, Table, significant

DATA, SEQUENCE, TENSOR, PIPELINE = STUDY = ("eddl", "sequence-parallel", "megatron", "pipedream-1f1b")
ALONE = "standalone"
SHORT = {DATA: "DP", SEQUENCE: "SP", TENSOR: "TP", PIPELINE: "PP", ALONE: "one device"}
#: As much energy as one device, give or take.
ABOUT = 0.1
HOLDS, NOT = "holds", "does not hold"


@dataclass(frozen=True)
class Cell:
    """One workload on one testbed, by method: runs that were ok, or did not fit."""

    runs: dict[str, Record]

    @property
    def first(self) -> Record:
        return next(iter(self.runs.values()))

    @property
    def where(self) -> dict[str, object]:
        r = self.first
        return {"model": r.model, "testbed": r.testbed, "batch": r.batch_size, "tokens": r.seq_len}

    def of(self, value: Callable[[Record], float | None]) -> dict[str, float]:
        """What is known, by method."""
        found = {method: value(run) for method, run in self.runs.items() if run.status == "ok"}
        return {method: number for method, number in found.items() if number is not None}


def samples(record: Record) -> int:
    return record.batch_size * record.steps if record.steps else record.num_samples * record.epochs


def idle_share(record: Record) -> float | None:
    """Of the energy, what the boards would have drawn idle in that time."""
    if record.energy is None or not record.energy_j:
        return None
    return sum(parts.idle_j for parts in record.energy.values()) / record.energy_j


def cells(records: Sequence[Record]) -> list[Cell]:
    """Simulated training of a whole model by all four parallelisms."""
    found: dict[tuple[object, ...], dict[str, Record]] = {}
    for record in records:
        if record.mode == "simulated" and record.technique == "full" and record.inject is None:
            key = record.model, *(getattr(record, name) for name in COMMON)
            found.setdefault(key, {}).setdefault(record.method, record)
    return [Cell(runs) for runs in found.values() if set(STUDY) <= runs.keys() and _has_energy(runs)]


def _has_energy(runs: dict[str, Record]) -> bool:
    return any(run.energy_j is not None for run in runs.values())


def tables(records: Sequence[Record]) -> Iterator[Table]:
    """What a sample takes, where tensor parallelism overtakes data parallelism, and the verdicts."""
    found = sorted(cells(records), key=lambda cell: tuple(map(str, cell.where.values())))
    if not found:
        return
    yield _energy(found)
    if (table := _break_even(found)) is not None:
        yield table
    yield _verdicts(found)


def _energy(found: Sequence[Cell]) -> Table:
    rows = [
        {
            **cell.where,
            "method": method,
            "J/sample": run.energy_per_sample_j,
            "samples/s": run.throughput_samples_per_s,
            "J/epoch": run.energy_per_sample_j and run.energy_per_sample_j * run.num_samples,
            "idle, %": None if (share := idle_share(run)) is None else 100 * share,
            "peak, MiB": run.peak_memory_bytes and run.peak_memory_bytes / MIB,
            "MB moved/batch": run.comm_bytes and run.comm_bytes / 1e6 / (samples(run) / run.batch_size),
            "status": run.status,
        }
        for cell in found
        for method, run in sorted(cell.runs.items(), key=lambda item: (item[0] not in STUDY, item[0]))
    ]
    numbers = dict.fromkeys(("J/sample", "samples/s", "J/epoch", "idle, %", "peak, MiB", "MB moved/batch"), significant)
    notes = (
        "Energy is modelled, of boards that take part, idle power included. Idle: what they would have drawn idle.",
    )
    return Table("parallelisms", "Training by four parallelisms, and others", pd.DataFrame(rows), numbers, 5, notes)


def _break_even(found: Sequence[Cell]) -> Table | None:
    """Tokens per batch from which data parallelism sends fewer bytes than tensor parallelism, as simulated, beside
    parameters / (4 layers x hidden size)."""
    rows, seen = [], set()
    for cell in found:
        data, tensor = cell.runs[DATA], cell.runs[TENSOR]
        if not (data.comm_bytes and tensor.comm_bytes) or tensor.seq_len is None:
            continue
        key = (data.model, data.num_devices, data.batch_size, data.seq_len)
        if key in seen:
            continue
        seen.add(key)
        batches = samples(data) / data.batch_size
        per_token = tensor.comm_bytes / samples(tensor) / tensor.seq_len
        simulated = data.comm_bytes / batches / per_token
        expected = _closed_form(data)
        rows.append(
            {
                "model": data.model,
                "devices": data.num_devices,
                "batch": data.batch_size,
                "tokens": data.seq_len,
                "simulated": simulated,
                "closed form": expected,
                "error, %": 100 * (simulated / expected - 1),
            }
        )
    if not rows:
        return None
    title = "From how many tokens per batch data parallelism sends fewer bytes than tensor parallelism"
    numbers = {"simulated": "{:.0f}".format, "closed form": "{:.0f}".format, "error, %": "{:+.2f}".format}
    return Table("break-even", title, pd.DataFrame(rows), numbers, 4)


def _closed_form(record: Record) -> float:
    """Parameters over 4 times layers times hidden size (facts derived from ring collectives)."""
    asked = {name: getattr(record, name) for name in ("model", "dataset", "num_samples", "batch_size", "seq_len")}
    root = models.build(Workload(technique="full", **asked), device="meta").root
    config: Any = root.config
    return sum(p.numel() for p in root.parameters()) / (4 * config.num_hidden_layers * config.hidden_size)


def _verdicts(found: Sequence[Cell]) -> Table:
    rows = [row for cell in found for row in _statements(cell, found)]
    title = "What the study says of its parallelisms, and whether it holds here"
    notes = (
        "(i) pipeline and data parallelism take least energy. (ii) The GPU takes less than the CPU. (iii) Energy is "
        f"about that of one device, within {ABOUT:.0%}, and time far lower, by over half of the devices. (iv) Tensor "
        "and sequence parallelism communicate longer than the others. (v) Data and sequence parallelism run out of "
        "memory first. Thresholds are this project's: the study's numbers are unknown.",
    )
    return Table("verdicts", title, pd.DataFrame(rows), {}, 5, notes)


def _statements(cell: Cell, found: Sequence[Cell]) -> Iterator[dict[str, object]]:
    energy = cell.of(lambda run: run.energy_per_sample_j)
    ranked = sorted((method for method in STUDY if method in energy), key=lambda method: energy[method])
    order = " < ".join(f"{SHORT[method]} {energy[method]:.3g}" for method in ranked)

    def row(statement: str, holds: bool, seen: str) -> dict[str, object]:
        return {**cell.where, "statement": statement, "verdict": HOLDS if holds else NOT, "seen": seen}

    if len(ranked) == len(STUDY) and _accelerator(cell.first) == "gpu":
        yield row("(i)", set(ranked[:2]) == {DATA, PIPELINE}, f"J per sample: {order}")
    other = _on_other(cell, found)
    if other is not None:
        theirs = other.of(lambda run: run.energy_per_sample_j)
        both = [method for method in STUDY if method in energy and method in theirs]
        if both:
            ratios = ", ".join(f"{SHORT[method]} {theirs[method] / energy[method]:.3g}x" for method in both)
            yield row("(ii)", all(energy[m] < theirs[m] for m in both), f"CPU over GPU: {ratios}")
    alone = cell.runs.get(ALONE)
    if ranked and alone is not None and ALONE in energy and alone.throughput_samples_per_s:
        yield from _beside_one(cell, alone, energy, ranked[0], row)
    talk = cell.of(lambda run: run.comm_time_s)
    if set(STUDY) <= talk.keys():
        others = max(talk[DATA], talk[PIPELINE])
        seen = ", ".join(f"{SHORT[method]} {talk[method]:.3g}" for method in STUDY)
        yield row("(iv)", min(talk[TENSOR], talk[SEQUENCE]) > others, f"seconds of communication: {seen}")
    if lacking := [method for method in STUDY if cell.runs[method].status == "oom"]:
        fits = [method for method in STUDY if cell.runs[method].status == "ok"]
        seen = f"out of memory: {', '.join(SHORT[m] for m in lacking)}; fits: {', '.join(SHORT[m] for m in fits)}"
        yield row("(v)", set(lacking) == {DATA, SEQUENCE}, seen)


def _beside_one(
    cell: Cell,
    alone: Record,
    energy: dict[str, float],
    best: str,
    row: Callable[[str, bool, str], dict[str, object]],
) -> Iterator[dict[str, object]]:
    """The parallelism that takes the least energy, beside one device, and beside E_n / E_1 = 1 + r (n / S - 1)."""
    run = cell.runs[best]
    assert alone.throughput_samples_per_s and run.throughput_samples_per_s
    speedup = run.throughput_samples_per_s / alone.throughput_samples_per_s
    ratio = energy[best] / energy[ALONE]
    share = idle_share(alone)
    assert share is not None
    count = len(run.energy or ())
    expected = 1 + share * (count / speedup - 1)
    seen = f"{SHORT[best]}: {ratio:.3g} times the energy (closed form {expected:.3g}), {speedup:.3g} times as fast"
    yield row("(iii)", abs(ratio - 1) <= ABOUT and speedup > count / 2, seen)


def _accelerator(record: Record) -> str | None:
    """What the testbed's boards compute on, if all are alike, and the testbed is in the library."""
    try:
        kinds = {device.accelerator for device in load_testbed(record.testbed).cluster.devices}
    except OrreryError:  # of a testbed from a file a record has the name only
        return None
    return kinds.pop() if len(kinds) == 1 else None


def _on_other(cell: Cell, found: Sequence[Cell]) -> Cell | None:
    """The same workload on the same boards' CPUs."""
    testbed = cell.first.testbed
    if not testbed.startswith("nano-") or testbed.startswith("nano-cpu-"):
        return None
    wanted = {**cell.where, "testbed": testbed.replace("nano-", "nano-cpu-", 1)}
    return next((other for other in found if other.where == wanted), None)


def text(records: Sequence[Record]) -> str:
    """The break-even and the verdicts for a terminal; empty where not all four were run."""
    return "\n\n".join(table.text() for table in tables(records) if table.name != "parallelisms")
