"""Validation on data never fitted: what others measured on boards, predicted from other boards and other models.

Training on Raspberry Pis goes through the harness's own cost model: FLOPs counted from the real modules, over the
board's peak times a fraction per operator class and direction. The rates of products of matrices on Jetson Orin are
a fraction of the peak. No prediction knows the cell that it is held against, and nothing is tuned.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from harness import profile, store
from harness.cluster import OPERATOR_CLASSES
from harness.costs import BACKWARD, DIRECTIONS, FORWARD, Affine, Costs
from harness.workload import Workload
from results.tables import Table, percent, significant
from testbeds.profiles import DeviceProfile, load_device

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "validation.csv"
TRAINING, GEMM = "training", "gemm"
GIGA = 1e9
HEAD_ONLY = "head only"
#: The library's constants as they are, against the cells that they don't come from.
LIBRARY = "library"
OTHER_MODELS, OTHER_BOARDS, OTHER_MODES = "other models", "other boards", "other modes"
#: Of an operator class the fraction of a board's peak that is achieved, forward and backward.
Fractions = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Cell:
    """A measurement as `reference/boards.csv` has it. `what`: of a training the layers, of a GEMM the precision.

    `profile` is the device file with the board's peak; empty where no peak is known. `excluded`: why nothing is
    learnt from it and it is in no error figure.
    """

    artefact: str
    board: str
    mode: str
    profile: str
    model: str
    what: str
    value: float
    unit: str
    provenance: str
    excluded: str
    note: str
    source: str

    @property
    def name(self) -> str:
        """How a fitted constant names it: "boards training Raspberry Pi 5 ViT-base all layers"."""
        return " ".join(filter(None, ("boards", self.artefact, self.board, self.mode, self.model, self.what)))

    @property
    def kind(self) -> str:
        """What errors are summed up by."""
        if self.artefact == GEMM:
            return f"GEMM, {self.what}"
        return str(_about()["models"][self.model]["kind"]) if self.model in _about()["models"] else ""

    @property
    def peak(self) -> float:
        """FLOP/s in float32."""
        return _board(self.profile).required("peak_fp32_flops_per_s")


@dataclass(frozen=True)
class Prediction:
    """`value` in the cell's unit, None where there is none and `reason` says why. `fitted`: it may know the cell."""

    cell: Cell
    protocol: str
    value: float | None
    fitted: bool = False
    reason: str = ""


@cache
def cells() -> tuple[Cell, ...]:
    text = files("results").joinpath("reference/boards.csv").read_text(encoding="utf-8")
    numbers = ((row, float(row.pop("value"))) for row in csv.DictReader(text.splitlines()))
    return tuple(Cell(value=value, **row) for row, value in numbers)


@cache
def _board(name: str) -> DeviceProfile:
    return load_device(name)


@cache
def _about() -> dict[str, Any]:
    return tomllib.loads(files("results").joinpath("experiments/validation.toml").read_text(encoding="utf-8"))


@cache
def work(model: str) -> Costs | None:
    """What training the model of a cell costs; None where neither the catalog nor transformers has it."""
    about, training = _about()["models"].get(model), _about()["training"]
    if about is None:
        return None
    workload = Workload(
        about.get("catalog", model),
        "synthetic",
        num_samples=training["batches"] * training["batch_size"],
        seq_len=None,
        **{key: training[key] for key in ("batch_size", "image_size", "num_labels")},
    )
    return profile.count(workload) if "catalog" in about else whole(about["class"], about["config"], workload)


def whole(name: str, config: Mapping[str, object], workload: Workload) -> Costs:
    """The costs of an image classifier of transformers in one piece; the loss is the other unit."""
    import torch
    import transformers
    from torch import Tensor, nn

    from harness.models.layered import Layered, Unit
    from harness.profile.counting import count_units

    kind: Any = getattr(transformers, name)
    asked = kind.config_class(
        **config,
        image_size=workload.image_size,
        num_labels=workload.num_labels,
        attn_implementation=workload.attn_implementation,
    )
    with torch.device("meta"):
        root = kind(asked)

    def logits(pixels: Tensor) -> Tensor:
        out: Tensor = root(pixel_values=pixels).logits
        return out

    loss = nn.CrossEntropyLoss(reduction="sum")
    units = (
        Unit("model", 0, "model", ["pixel_values"], ["logits"], logits, [root]),
        Unit("loss", 0, "loss", ["logits", "labels"], ["loss"], loss),
    )
    return count_units(Layered(root, units, (), ("pixel_values",)), workload)


def learnt(known: Sequence[Cell], costs: Callable[[str], Costs | None] = work) -> Fractions:
    """The fractions of peak with which the cost model comes nearest to these training times.

    Least squares of the relative errors, with no operator faster than in no time (infinity here). A class that none of
    the models needs is not in it.
    """
    from sklearn.linear_model import LinearRegression

    columns = [(operator, direction) for operator in OPERATOR_CLASSES for direction in DIRECTIONS]
    shares = [
        [_flops(counted, cell, *column) / cell.peak / cell.value for column in columns]
        for cell in known
        if (counted := costs(cell.model)) is not None
    ]
    if not shares:
        return {}
    fit = LinearRegression(fit_intercept=False, positive=True).fit(shares, [1.0] * len(shares))
    fractions = {
        column: 1 / float(slowness) if slowness else float("inf")
        for column, slowness, used in zip(columns, fit.coef_, zip(*shares, strict=True), strict=True)
        if any(used)
    }
    return {
        operator: (fractions[operator, FORWARD], fractions[operator, BACKWARD])
        for operator in OPERATOR_CLASSES
        if all((operator, direction) in fractions for direction in DIRECTIONS)
    }


def predictions(known: Sequence[Cell], costs: Callable[[str], Costs | None] = work) -> list[Prediction]:
    """Every cell by every protocol, in the order of the cells."""
    found: list[Prediction] = []
    for cell in known:
        others = [o for o in known if o.artefact == cell.artefact and o.profile and not o.excluded and o != cell]
        found += _gemm(cell, others) if cell.artefact == GEMM else _training(cell, others, costs)
    return found


def _training(cell: Cell, others: Sequence[Cell], costs: Callable[[str], Costs | None]) -> Iterator[Prediction]:
    counted, board = costs(cell.model), _board(cell.profile)
    if counted is None:
        reason = "neither the catalog nor transformers has this model"
        yield from (Prediction(cell, p, None, reason=reason) for p in (LIBRARY, OTHER_MODELS, OTHER_BOARDS))
        return
    fitted = any(cell.name in constant.cells for constant in board.constants.values())
    yield Prediction(cell, LIBRARY, _seconds(counted, cell, board.rates()), fitted)
    for protocol, known in (
        (OTHER_MODELS, [o for o in others if o.board == cell.board and o.model != cell.model]),
        (OTHER_BOARDS, [o for o in others if o.board != cell.board]),
    ):
        fractions = learnt(known, costs)
        needed = (o for o in OPERATOR_CLASSES for d in _directions(cell) if _flops(counted, cell, o, d))
        if unknown := next((operator for operator in needed if operator not in fractions), None):
            yield Prediction(cell, protocol, None, reason=f"nothing tells how fast {unknown} operators are")
            continue
        rates = {operator: (f * cell.peak, b * cell.peak) for operator, (f, b) in fractions.items()}
        yield Prediction(cell, protocol, _seconds(counted, cell, rates))


def _gemm(cell: Cell, others: Sequence[Cell]) -> Iterator[Prediction]:
    same = [o for o in others if o.what == cell.what]
    for protocol, known in (
        (OTHER_MODES, [o for o in same if o.board == cell.board]),
        (OTHER_BOARDS, [o for o in same if o.board != cell.board]),
    ):
        if not cell.profile:
            yield Prediction(cell, protocol, None, reason="no peak is known of this mode")
        elif not known:
            yield Prediction(cell, protocol, None, reason="no other mode has a measurement and a known peak")
        else:
            fraction = median(o.value * GIGA / o.peak for o in known)
            yield Prediction(cell, protocol, fraction * cell.peak / GIGA)


def _directions(cell: Cell) -> tuple[str, ...]:
    """Of training the head alone the forward pass: the classifier's own backward pass is at most 1.4 % of that."""
    return (FORWARD,) if cell.what == HEAD_ONLY else DIRECTIONS


def _flops(costs: Costs, cell: Cell, operator: str, direction: str) -> float:
    """Of one operator class in the whole measured training."""
    if direction not in _directions(cell):
        return 0.0
    training = _about()["training"]
    work: Affine = getattr(costs.work(0, len(costs.units), direction), operator)
    return work.at(training["batch_size"]) * training["batches"]


def _seconds(costs: Costs, cell: Cell, rates: Mapping[str, tuple[float, float]]) -> float:
    """The harness's own cost model, of the board with these rates."""
    board, training = _board(cell.profile), _about()["training"]
    device = replace(board.device(cell.board, int(board.required("usable_memory_bytes"))), rates=dict(rates))
    every, rows = (0, len(costs.units)), training["batch_size"]
    return training["batches"] * sum(costs.seconds(device, *every, d, rows) for d in _directions(cell))


def write(folder: Path, costs: Callable[[str], Costs | None] = work) -> None:
    """Predict every cell, and put what came out into the results folder: validation.csv."""
    rows = [
        {
            **{name: getattr(p.cell, name) for name in ("artefact", "board", "mode", "model", "what", "kind", "unit")},
            "measured": p.cell.value,
            "peak": p.cell.peak if p.cell.profile else None,
            "protocol": p.protocol,
            "predicted": p.value,
            "fitted": p.fitted,
            "excluded": p.cell.excluded,
            "reason": p.reason,
            "note": p.cell.note,
            "source": p.cell.source,
        }
        for p in predictions(cells(), costs)
    ]
    store.write_whole(folder / FILE, partial(pd.DataFrame(rows).to_csv, index=False))


def load(folder: Path) -> pd.DataFrame | None:
    """What `write` has put there; None where nobody asked for it. `error`: of what may be in an error figure."""
    path = folder / FILE
    if not path.is_file():
        return None
    frame = pd.read_csv(path, keep_default_na=False, na_values={"predicted": "", "peak": ""})
    frame["difference"] = frame["predicted"] / frame["measured"] - 1
    frame["error"] = frame["difference"].where(~frame["fitted"] & (frame["excluded"] == ""))
    return frame


def tables(frame: pd.DataFrame) -> list[Table]:
    """The summary, then every cell."""
    return [_summary(frame), _beside(frame, TRAINING), _beside(frame, GEMM)]


def text(folder: Path) -> str:
    """The tables for a terminal; empty where nobody asked for them."""
    frame = load(folder)
    return "" if frame is None else "\n\n".join(table.text() for table in tables(frame))


def _summary(frame: pd.DataFrame) -> Table:
    rows = []
    for (kind, protocol), group in frame.dropna(subset="error").groupby(["kind", "protocol"], sort=False):
        worst = group.loc[group["error"].abs().idxmax()]
        rows.append(
            {
                "kind": kind,
                "predicted from": protocol,
                "cells": len(group),
                "median error": group["error"].abs().median(),
                "worst": worst["error"],
                "worst cell": _named(worst, "board", "mode", "model", "what"),
            }
        )
    return Table(
        "validation-summary",
        "Predictions of what others measured: absolute errors",
        pd.DataFrame(rows),
        {"cells": str, "median error": percent, "worst": signed},
        heads=2,
        notes=(
            "library: the device files as they are, without the cells that their fractions come from. Other models, "
            "modes, boards: from nothing else, by the fractions of peak that come nearest to all of their times, or by "
            "the median of their fractions. Error: (predicted - measured) / measured.",
            _carried(frame),
        ),
    )


def _carried(frame: pd.DataFrame) -> str:
    """Why fractions of peak do not carry over between the two boards that train."""
    training = frame[frame["artefact"] == TRAINING]
    slow, fast = sorted(
        training["board"].unique(), key=lambda board: training["peak"][training["board"] == board].max()
    )
    measured, peaks = (
        training.pivot_table(index=["model", "what"], columns="board", values=column).dropna()
        for column in ("measured", "peak")
    )
    ratios = measured[slow] / measured[fast]
    return (
        f"{fast} is measured to be {ratios.min():.2f} to {ratios.max():.2f} times as fast as {slow} (median "
        f"{ratios.median():.2f}), and has {(peaks[fast] / peaks[slow]).max():.2f} times the peak: no fraction of peak "
        "holds for both."
    )


def _beside(frame: pd.DataFrame, artefact: str) -> Table:
    """Each measurement of the artefact beside what every protocol makes of it."""
    asked = frame[frame["artefact"] == artefact]
    (unit,) = asked["unit"].unique()
    formats: dict[str, Callable[[float], str]] = {f"measured, {unit}": significant}
    rows = []
    for _, cell in asked.groupby(["board", "mode", "model", "what"], sort=False):
        first = cell.iloc[0]
        row = {
            "board": _named(first, "board", "mode"),
            "model": first["model"],
            "what": first["what"],
            f"measured, {unit}": first["measured"],
        }
        for _, prediction in cell.iterrows():
            value, error = f"{prediction['protocol']}, {unit}", f"{prediction['protocol']}: error"
            row |= {value: prediction["predicted"], error: _error(prediction)}
            formats |= {value: significant, error: signed}
        row["note"] = "; ".join(dict.fromkeys(filter(None, (*cell["reason"], first["excluded"], first["note"]))))
        rows.append(row)
    titles = {
        TRAINING: "Seconds of training 20 batches of 16 images of 224 x 224 pixels on a board's CPU (PyTorch 1.13)",
        GEMM: "Rates of a product of matrices, as a fraction of the peak in float32",
    }
    return Table(f"validation-{artefact}", titles[artefact], pd.DataFrame(rows), formats, heads=3)


def _error(prediction: pd.Series) -> float | str:
    """As a number where it counts; where it does not, as a text that says why."""
    if prediction["fitted"]:
        return f"({signed(prediction['difference'])}) fitted"
    if prediction["excluded"] and pd.notna(prediction["difference"]):
        return f"({signed(prediction['difference'])})"
    return float(prediction["error"])


def _named(row: pd.Series, *columns: str) -> str:
    return " ".join(filter(None, row[list(columns)]))


def signed(value: float) -> str:
    return f"{value:+.1%}"
