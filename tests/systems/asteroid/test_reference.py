"""Sizes of models, and what data parallelism must at least send, as derived from public definitions (`asteroid.csv`),
beside what is counted and simulated here."""

from __future__ import annotations

import csv
from importlib.resources import files

import pytest

from baselines import eddl
from harness import profile
from harness.costs import Costs
from harness.simulator import simulate
from harness.workload import Workload
from tests.harness.toys import cluster

with files("results").joinpath("reference").joinpath("asteroid.csv").open(encoding="utf-8", newline="") as file:
    ROWS = list(csv.DictReader(file))
MODELS = {
    "EfficientNet-B1": "efficientnet-b1",
    "MobileNetV2": "mobilenet-v2",
    "ResNet50": "resnet-50",
    "Bert-small": "bert-small",
}
SIZES = [row for row in ROWS if row["artefact"] == "model_size"]
FLOORS = [row for row in ROWS if row["artefact"] == "ring_allreduce_floor"]


def workload(model: str, labels: int) -> Workload:
    shape = {"seq_len": 16} if model == "bert-small" else {"seq_len": None, "image_size": 32}
    return Workload(model, "synthetic", num_samples=8, batch_size=8, num_labels=labels, **shape)  # type: ignore[arg-type]


def counted(model: str, labels: int) -> Costs:
    return profile.count(workload(model, labels))


@pytest.mark.parametrize("row", SIZES, ids=lambda row: f"{row['model']} {row['metric']} {row['note'][:15]}")
def test_models_are_as_large_as_their_definitions_say(row: dict[str, str]) -> None:
    """Bert-small's head here has no pooler in front, and buffers of batch norms are no parameters."""
    labels = (
        1000
        if "1000-class" in row["note"]
        else int(row["note"].partition("-class")[0])
        if "-class" in row["note"]
        else 2
    )
    costs = counted(MODELS[row["model"]], labels)
    numel = sum(p.numel for p in costs.parameters.values())
    found = numel / 1e6 if row["metric"] == "parameters" else 4 * numel / 1e6
    assert found == pytest.approx(float(row["value"]), rel=0.01)


@pytest.mark.parametrize("row", FLOORS, ids=lambda row: f"{row['model']}-{row['devices']}-{row['bandwidth_mbps']}")
def test_no_round_of_data_parallelism_is_shorter_than_its_floor(row: dict[str, str]) -> None:
    """2(N-1)/N of the weights over the link: of devices that compute in no time the round takes just that."""
    model, devices, rate = MODELS[row["model"]], int(row["devices"]), float(row["bandwidth_mbps"]) * 1e6 / 8
    load, costs = (
        workload(model, 1000 if model != "bert-small" else 2),
        counted(model, 1000 if model != "bert-small" else 2),
    )
    boards = cluster(devices, bandwidth=rate, speeds=(1e9,) * devices)
    plan = eddl.plan(load, costs, boards, {**eddl.OPTIONS, "micro_batch_size": 8})
    floor = 2 * (devices - 1) / devices * 4 * sum(p.numel for p in costs.parameters.values()) / rate
    assert simulate(plan, costs, boards).total_s == pytest.approx(floor, rel=1e-3)
    assert floor == pytest.approx(float(row["value"]), rel=0.05)  # of two digits
