"""Predictions of what others measured know nothing of what they are held against."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness import models, profile
from harness.cli import app
from harness.cluster import OPERATOR_CLASSES
from harness.costs import BACKWARD, FORWARD, Affine, Costs, Work
from harness.workload import Workload
from results import report, reproduce, validation
from results.validation import GEMM, HEAD_ONLY, LIBRARY, OTHER_BOARDS, OTHER_MODELS, TRAINING, Cell, learnt, predictions
from testbeds.profiles import devices, load_device
from tests.harness.toys import chain

#: GFLOP per image and operator class, forward; backward is twice that.
TOYS = {
    "ResNet-18": (0.1, 3.0, 0.0),
    "ResNet-50": (0.2, 8.0, 0.0),
    "ViT-base": (30.0, 0.2, 0.0),
    "ViT-tiny": (2.0, 0.1, 0.0),
    "MobileNetV2-0.5": (0.1, 0.2, 0.02),
    "MobileNetV2-1.0": (0.1, 0.5, 0.05),
}
BOARDS = ("Raspberry Pi 5", "Raspberry Pi 4B")


def toy(model: str) -> Costs | None:
    if model not in TOYS:
        return None
    (unit,) = chain(1).units
    forward, backward = (
        Work(**{o: Affine(0, times * g * 1e9) for o, g in zip(OPERATOR_CLASSES, TOYS[model], strict=True)})
        for times in (1, 2)
    )
    return replace(chain(1), units=(replace(unit, forward=forward, backward=backward),))


def trainings() -> list[Cell]:
    return [cell for cell in validation.cells() if cell.model in TOYS]


def values(found: list[validation.Prediction]) -> dict[tuple[str, str], float | None]:
    return {(p.cell.name, p.protocol): p.value for p in found}


def test_cells_have_their_origin_and_are_given_once() -> None:
    text = files("results").joinpath("reference/boards.csv").read_text(encoding="utf-8")
    assert len(list(csv.DictReader(text.splitlines()))) == len(validation.cells()) == 71
    assert max(Counter(cell.name for cell in validation.cells()).values()) == 1
    for cell in validation.cells():
        assert cell.provenance == "measured" and "/" in cell.source and cell.value > 0, cell
        assert not cell.profile or cell.peak > 0
    assert {cell.artefact for cell in validation.cells()} == {TRAINING, GEMM}


@pytest.mark.parametrize("held_out", trainings(), ids=lambda cell: cell.name)
def test_a_training_time_is_predicted_without_it(held_out: Cell) -> None:
    """Of another measured value every prediction is the same, and some other cell's is not."""
    known = trainings()
    changed = [replace(cell, value=3 * cell.value) if cell == held_out else cell for cell in known]
    before, after = values(predictions(known, toy)), values(predictions(changed, toy))
    for protocol in (LIBRARY, OTHER_MODELS, OTHER_BOARDS):
        assert after[held_out.name, protocol] == before[held_out.name, protocol] is not None
    assert any(after[key] != before[key] for key in before)


@pytest.mark.parametrize("board", BOARDS)
def test_other_models_and_other_boards_are_nothing_else(board: str) -> None:
    """Held out are all cells of the model on the board, or all cells of the board."""
    known = trainings()
    for protocol, unseen in (
        (OTHER_MODELS, [c for c in known if c.board != board or c.model == "ViT-base"]),
        (OTHER_BOARDS, [c for c in known if c.board == board]),
    ):
        changed = [replace(cell, value=2 * cell.value) if cell in unseen else cell for cell in known]
        before, after = values(predictions(known, toy)), values(predictions(changed, toy))
        mine = [c.name for c in known if c.board == board and c.model == "ViT-base"]
        assert mine and all(after[name, protocol] == before[name, protocol] for name in mine)


def test_what_the_cost_model_made_is_learnt_and_predicted_exactly() -> None:
    """Times that fractions of peak explain give these fractions back, and every protocol but the library is exact."""
    fractions = {"matmul": (0.5, 0.6), "conv": (0.2, 0.3), "depthwise": (0.002, 0.001)}

    def seconds(cell: Cell) -> float:
        flops = zip(OPERATOR_CLASSES, TOYS[cell.model], strict=True)
        return sum(
            320 * g * 1e9 / cell.peak * (1 / fractions[o][0] + (cell.what != HEAD_ONLY) * 2 / fractions[o][1])
            for o, g in flops
        )

    known = [replace(cell, value=seconds(cell)) for cell in trainings()]
    for operator, found in learnt(known, toy).items():
        assert found == pytest.approx(fractions[operator], rel=1e-6)
    for prediction in predictions(known, toy):
        if prediction.protocol != LIBRARY:
            assert prediction.value == pytest.approx(prediction.cell.value, rel=1e-6)


def test_rates_of_products_are_predicted_without_them() -> None:
    known = [cell for cell in validation.cells() if cell.artefact == GEMM]
    before = values(predictions(known))
    for held_out in known:
        after = values(predictions([replace(c, value=9 * c.value) if c == held_out else c for c in known]))
        for protocol in (validation.OTHER_MODES, OTHER_BOARDS):
            assert after[held_out.name, protocol] == before[held_out.name, protocol]
        reached = [key for key in before if before[key] != after[key]]
        assert not (held_out.excluded and reached), "what is excluded teaches nothing"
    # The middle of what AGX Orin (15W, 30W, 50W) and Orin NX reach of their peaks.
    (name,) = {c.name for c in known if (c.board, c.mode, c.what) == ("Orin Nano", "15W", "fp32")}
    reached_by_others = sorted([380 / 626.7, 715 / 1253.4, 1730 / 3342.3, 897 / 1880])
    assert before[name, OTHER_BOARDS] == pytest.approx(1280 * sum(reached_by_others[1:3]) / 2)


def test_what_is_not_known_has_a_reason() -> None:
    cells = [c for c in validation.cells() if not c.profile or c.model.startswith("MobileNetV3")]
    assert len(cells) == 10
    for prediction in predictions(cells, toy):
        assert prediction.value is None and prediction.reason
    alone = [cell for cell in trainings() if cell.model == "ViT-base"]
    assert {(p.protocol, p.value is None, bool(p.reason)) for p in predictions(alone, toy)} == {
        (LIBRARY, False, False),
        (OTHER_MODELS, True, True),
        (OTHER_BOARDS, False, False),
    }


def test_fitted_constants_name_cells_that_exist_and_meet_them() -> None:
    """A fraction means here what the cost model means by it: its own cell comes out again."""
    by_name = {cell.name: cell for cell in validation.cells()}
    fitted = {
        (name, cell)
        for name in devices()
        for constant in load_device(name).constants.values()
        for cell in constant.cells
        if cell.startswith("boards ")
    }
    assert {name for name, _ in fitted} == {"raspberry-pi-4b-4gb", "raspberry-pi-4b-8gb", "raspberry-pi-5-8gb"}
    assert all(cell in by_name for _, cell in fitted)
    known = [by_name[cell] for _, cell in fitted if by_name[cell].model in ("ResNet-18", "MobileNetV2-1.0")]
    for prediction in predictions([*dict.fromkeys(known)]):
        if prediction.protocol == LIBRARY:
            assert prediction.fitted
            assert prediction.value == pytest.approx(prediction.cell.value, rel=0.02)


@pytest.mark.parametrize("name", ["resnet-tiny", "mobilenet-v2-tiny"])
def test_a_model_in_one_piece_costs_what_it_costs_in_many(name: str) -> None:
    entry = models.entry(name)
    workload = Workload(name, "cifar10", 16, 16, seq_len=None, image_size=32, num_labels=10)
    family = {"resnet": "ResNetForImageClassification", "mobilenet-v2": "MobileNetV2ForImageClassification"}
    config = {key: value for key, value in entry.config.items() if key != "image_size"}
    piece, pieces = validation.whole(family[entry.family], config, workload), profile.count(workload)
    for direction in (FORWARD, BACKWARD):
        one, many = (costs.work(0, len(costs.units), direction) for costs in (piece, pieces))
        assert [(w.at(8), w.at(16)) for w in one] == [(w.at(8), w.at(16)) for w in many]


@pytest.mark.parametrize(
    ("model", "gflops"), [("ResNet-18", 29.6), ("ResNet-34", 32), ("ResNet-50", 24), ("MobileNetV2-1.0", 4.0)]
)
def test_counted_operations_are_those_that_published_rates_rest_on(model: str, gflops: float) -> None:
    """Three forward passes over the seconds on a Raspberry Pi 5: derived rates, in two or three digits."""
    (cell,) = (c for c in validation.cells() if (c.board, c.model) == (BOARDS[0], model) and c.what != HEAD_ONLY)
    costs = validation.work(model)
    assert costs is not None
    forward = costs.work(0, len(costs.units), FORWARD).flops(1)
    assert 3 * forward * 320 / cell.value / 1e9 == pytest.approx(gflops, rel=0.02)


def test_a_report_with_nothing_but_the_validation(tmp_path: Path) -> None:
    """The numbers are the same every time; an error figure has neither fitted nor excluded cells."""
    assert reproduce.requests(["validation"]) == []
    validation.write(tmp_path, toy)
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert "Validation on data never fitted" in page and "fitted" in page
    first = (tmp_path / validation.FILE).read_bytes()
    validation.write(tmp_path, toy)
    assert (tmp_path / validation.FILE).read_bytes() == first
    assert report.write(tmp_path).read_text(encoding="utf-8") == page
    frame = validation.load(tmp_path)
    assert frame is not None
    assert frame[frame["fitted"] | (frame["excluded"] != "")]["error"].isna().all()
    summary, *_ = validation.tables(frame)
    assert frame["error"].notna().sum() == summary.frame["cells"].sum() > 0
    assert summary.title in validation.text(tmp_path)


@pytest.mark.slow
def test_the_validation_can_be_reproduced(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["reproduce", "validation", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "Predictions of what others measured" in done.stdout
    frame = validation.load(tmp_path)
    assert frame is not None
    without = {model for model, value in zip(frame["model"], frame["predicted"].isna(), strict=True) if value}
    assert {"MobileNetV3-small", "MobileNetV3-large"} <= without
    assert not {"Swin-tiny", "ConvNeXt-tiny", "ViT-base", "ResNet-34"} & without
