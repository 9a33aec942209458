"""The papers' own numbers as data: a CSV file of cells per paper, and a TOML file of what its names stand for here."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OOM = "OOM"
#: The artefact of what is said in the paper's text.
CLAIMS = "claims"
#: What a time or a count of both passes begins with where it is of one.
PASSES = ("forward_", "backward_")


@dataclass(frozen=True)
class Cell:
    """One number of a paper, as it is given there: `value` is text, `OOM` included.

    `provenance`: "printed", read off a "figure", or "inferred" from others. An empty field does not apply. A cell
    without a value is one that the paper has not: ours for it is a prediction.
    """

    paper: str
    artefact: str
    model: str
    dataset: str
    technique: str
    system: str
    devices: str
    epochs: str
    metric: str
    value: str
    unit: str
    provenance: str
    note: str
    source: str

    @property
    def number(self) -> float | None:
        """The value, where it is a number."""
        try:
            return float(self.value)
        except ValueError:
            return None

    @property
    def quantity(self) -> str:
        """What a person reads: "training time, h"."""
        name = self.metric.removesuffix(f"_{self.unit.lower()}").replace("_", " ")
        return f"{name}, {self.unit}" if self.unit else name

    @property
    def is_quality(self) -> bool:
        """Whether it says how good the trained model is, which hangs on no testbed."""
        return self.metric == "accuracy"

    def fitted(self, cells: Iterable[str]) -> bool:
        """Whether a constant was fitted to it. A fitted cell is named so: "pac fig8a T5-Base Full forward"."""
        name = f"{self.paper} {self.artefact} {self.model} {self.technique} {self.metric}"
        return any(name.startswith(cell) for cell in cells)


@dataclass(frozen=True)
class Paper:
    """`testbeds` is what the names of the testbeds that stand for the paper's cluster begin with.

    `analysed` are the workload fields of its analyses of a single iteration. `techniques[name in the paper]` is ours,
    where the names differ, and so is `systems`; `cached["table2 PAC"]`, or of a technique of the paper: whether
    activations are. `one_sample_per_device` are the artefacts whose batch has as many samples as there are devices.
    `options[method]`, or `options["fig9b method"]`, are those with which our runs stand for the paper's, `phases` the
    names of what matters in them. `rates` says how its groupings are looked at where links are slower or faster.
    """

    name: str
    title: str
    doi: str
    testbeds: str
    analysed: Mapping[str, int]
    one_sample_per_device: tuple[str, ...]
    cached: Mapping[str, bool]
    techniques: Mapping[str, str]
    systems: Mapping[str, str]
    options: Mapping[str, Mapping[str, object]]
    phases: Mapping[str, Sequence[str]]
    rates: Mapping[str, Any]
    cells: tuple[Cell, ...]

    @property
    def artefacts(self) -> list[str]:
        """Its tables and figures, in its order."""
        return [name for name in dict.fromkeys(cell.artefact for cell in self.cells) if name != CLAIMS]

    @cached_property
    def predicted(self) -> tuple[Cell, ...]:
        """The cells that its tables and figures would have for models that are in others only: without a value."""
        seen: dict[str, set[str]] = {name: set() for name in self.artefacts}
        for cell in self.cells:
            if cell.artefact in seen and cell.model:
                seen[cell.artefact].add(cell.model)
        models = dict.fromkeys(cell.model for cell in self.cells if cell.model)
        return tuple(
            dict.fromkeys(
                replace(cell, model=model, value="", provenance="", note="", source="")
                for cell in self.cells
                if cell.artefact in seen and cell.model
                for model in models
                if model not in seen[cell.artefact]
            )
        )

    def fitted(self, cell: Cell, cells: Iterable[str]) -> bool:
        """Whether a constant was fitted to the cell, or to a part of it: a time of both passes has that of either."""
        fields = {field: getattr(cell, field) for field in ("artefact", "model", "dataset", "technique", "system")}
        metrics = [f"{each}{cell.metric}" for each in ("", *PASSES)]
        return any(
            part.metric in metrics
            and part.fitted(cells)
            and all(getattr(part, field) == value for field, value in fields.items())
            for part in self.cells
        )

    def method(self, cell: Cell) -> str:
        """Our name of the cell's system, if we have it."""
        return self.systems.get(cell.system, cell.system)

    def technique(self, cell: Cell) -> str:
        """Our name of the cell's technique, if we have it."""
        return self.techniques.get(cell.technique, cell.technique.lower())

    def ran_so(self, cell: Cell, method: str, options: Mapping[str, object]) -> bool:
        """Whether a run of our method with these options stands for the cell's."""
        wanted = self.options.get(f"{cell.artefact} {method}", self.options.get(method, {}))
        return all(options.get(name) == value for name, value in wanted.items())

    def batch_size(self, cell: Cell, num_devices: int) -> int:
        """Samples in a mini-batch of the cell's run."""
        return num_devices if cell.artefact in self.one_sample_per_device else self.analysed["batch_size"]

    def caches(self, cell: Cell) -> bool:
        """Whether later epochs of the cell's run read activations from a cache."""
        used = self.cached.get(f"{cell.artefact} {cell.system}", self.cached.get(cell.technique, False))
        return used and cell.epochs != "1"


def names() -> list[str]:
    """Those with both files: cells, and what their names stand for."""
    return sorted(path.stem for path in _folder().glob("*.csv") if path.with_suffix(".toml").exists())


@cache
def load(name: str) -> Paper:
    about = tomllib.loads((_folder() / f"{name}.toml").read_text(encoding="utf-8"))
    with (_folder() / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        cells = tuple(Cell(paper=name, **row) for row in csv.DictReader(file))
    return Paper(name=name, cells=cells, **{**about, "one_sample_per_device": tuple(about["one_sample_per_device"])})


def of_testbed(testbed: str) -> Paper | None:
    """The paper whose cluster the testbed is."""
    return next((paper for paper in map(load, names()) if testbed.startswith(paper.testbeds)), None)


def same(theirs: str, ours: str) -> bool:
    """Whether a paper's name and one of ours mean the same: "STS-B" and "stsb", "T5-Base" and "t5-base"."""
    return re.sub(r"[^a-z0-9.]", "", theirs.lower()) == re.sub(r"[^a-z0-9.]", "", ours.lower())


def _folder() -> Path:
    return Path(str(files("results"))) / "reference"
