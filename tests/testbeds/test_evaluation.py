"""What several processes have trained, put together and evaluated: as good as what one device trains, on the same."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import harness
from harness import datasets, models, reference, runner
from harness.errors import OrreryError
from harness.experiment import Request, one
from harness.models.layered import Layered
from harness.workload import Workload
from tests.testbeds.processes import own_folders

__all__ = ["own_folders"]

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks workers")
RUN = {
    "dataset": "synthetic",
    "num_samples": 48,
    "batch_size": 16,
    "epochs": 3,
    "optimizer": "adamw",
    "testbed": "local-2",
    "mode": "emulated",
    "evaluate": True,
}
TEXT = {**RUN, "model": "bert-tiny", "seq_len": 16, "learning_rate": 2e-3}
IMAGES = {**RUN, "model": "resnet-tiny", "image_size": 32, "learning_rate": 1e-2}
BESIDE = {"technique": "parallel-adapters", "learning_rate": 1e-2}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "replicas": ({**TEXT, "method": "eddl"}, {}),
    "stages": ({**TEXT, "method": "gpipe", "technique": "lora", "learning_rate": 1e-2}, {"micro_batch_size": 8}),
    "added modules": ({**TEXT, "method": "eddl", "technique": "adapters", "learning_rate": 1e-2}, {}),
    "stages, then a cache": ({**TEXT, **BESIDE, "method": "pac"}, {"grouping": "1-1", "micro_batch_size": 8}),
    "batch norm": ({**IMAGES, "method": "eddl"}, {"micro_batch_size": 16}),
}


def accuracy(layered: Layered, workload: Workload) -> float:
    """On the validation split, in one batch, in points."""
    layered.root.eval()
    validation = datasets.load(workload, split="validation")
    batch = validation.batch(range(len(validation)))
    with torch.no_grad():
        found = layered.run(0, len(layered.units), batch)["logits"].argmax(-1) == batch["labels"]
    return 100 * found.double().mean().item()


def expected(asked: Request) -> float:
    """Of the plan, trained on one device."""
    _, plan = runner.make_plan(asked)
    return accuracy(reference.train(plan, asked.workload, datasets.load(asked.workload)).layered, asked.workload)


@linux
def test_the_metric_is_that_of_the_same_training_on_one_device(own_folders: Path, tmp_path: Path) -> None:
    asked = {name: one(run, options) for name, (run, options) in RUNS.items()}
    untrained = accuracy(models.build(asked["replicas"].workload), asked["replicas"].workload)
    with contextlib.closing(runner.sweep(list(asked.values()), tmp_path)) as outcomes:
        found = {outcome.request.config_hash: outcome.record for outcome in outcomes}
    for name, request in asked.items():
        record = found[request.config_hash]
        assert (record.status, record.reason) == ("ok", None), name
        assert record.metric == pytest.approx(expected(request)), name
    assert found[asked["replicas"].config_hash].metric > max(untrained, 60)


@linux
def test_a_repeated_run_is_evaluated_and_others_are_not(own_folders: Path) -> None:
    run = {**TEXT, "method": "eddl", "epochs": 1}
    assert harness.run(**run, repeats=2).metric is not None
    assert harness.run(**{**run, "evaluate": False}).metric is None
    assert harness.run(**{**run, "mode": "simulated"}).metric is None


def test_what_can_not_be_evaluated_is_refused_before_it_runs() -> None:
    with pytest.raises(OrreryError, match="the technique inference trains nothing"):
        one({**TEXT, "method": "eddl", "technique": "inference", "epochs": 1}, {})
    with pytest.raises(OrreryError, match=r"digits has but one split\. Choose one of: mrpc, .*synthetic"):
        one({**IMAGES, "method": "eddl", "dataset": "digits"}, {})
    same = {"method": "eddl", "mode": "simulated"}
    assert one({**TEXT, **same}, {}).config_hash == one({**TEXT, **same, "evaluate": False}, {}).config_hash, (
        "without effect in simulated mode"
    )
