"""What several processes have trained, put together and evaluated: as good as what one device trains, on the same."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import harness
from harness import datasets, evaluation, models, reference, runner
from harness.errors import Broken, OrreryError
from harness.experiment import one
from harness.models.layered import Layered
from harness.workload import Workload
from tests.testbeds.processes import own_folders

__all__ = ["own_folders"]

TESTBEDS = Path(__file__).parents[2] / "testbeds" / "environments"
needs_rights = pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="makes network namespaces")
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks workers")
RUN = {
    "dataset": "synthetic",
    "num_samples": 36,
    "batch_size": 16,
    "epochs": 2,
    "optimizer": "sgd-momentum",
    "testbed": "local-2",
    "mode": "emulated",
    "evaluate": True,
}
TEXT = {**RUN, "model": "bert-tiny", "seq_len": 16, "learning_rate": 0.05}
#: Batch norm over the few rows of the last batch magnifies rounding: in float32 as many digits are lost as there are.
IMAGES = {**RUN, "model": "resnet-tiny", "image_size": 32, "learning_rate": 0.01, "dtype": "float64"}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "replicas": ({**TEXT, "method": "eddl"}, {}),
    "stages": ({**TEXT, "method": "gpipe", "technique": "lora"}, {"micro_batch_size": 8}),
    "added modules": ({**TEXT, "method": "eddl", "technique": "adapters"}, {}),
    "stages, then a cache": (
        {**TEXT, "method": "pac", "technique": "parallel-adapters"},
        {"grouping": "1-1", "micro_batch_size": 8},
    ),
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


@linux
def test_what_is_evaluated_is_what_one_device_trains(
    own_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and buffers of the model that is put together, and its accuracy."""
    evaluated: dict[Workload, Layered] = {}
    evaluate = evaluation.evaluate

    def watched(workload: Workload, layered: Layered, data_dir: Path | None) -> float:
        evaluated[workload] = layered
        return evaluate(workload, layered, data_dir)

    monkeypatch.setattr(evaluation, "evaluate", watched)
    asked = {name: one(run, options) for name, (run, options) in RUNS.items()}
    with contextlib.closing(runner.sweep(list(asked.values()), tmp_path)) as outcomes:
        records = {outcome.request.config_hash: outcome.record for outcome in outcomes}
    for name, request in asked.items():
        record, workload = records[request.config_hash], request.workload
        assert (record.status, record.reason) == ("ok", None), name
        _, plan = runner.make_plan(request)
        wanted = reference.train(plan, workload, datasets.load(workload)).layered
        found = evaluated[workload]
        weights, theirs = (reference.state(layered.root, []) for layered in (found, wanted))
        assert weights.keys() == theirs.keys()
        assert reference.max_rel_error(weights, theirs, adaptive=False) < 1e-5, name
        for buffer, (key, other) in zip(found.root.buffers(), wanted.root.named_buffers(), strict=True):
            torch.testing.assert_close(buffer, other, rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")
        assert not any(module.training for module in found.root.modules())
        assert record.metric == pytest.approx(accuracy(wanted, workload)), name
    first, trained = models.build(asked["batch norm"].workload).root, evaluated[asked["batch norm"].workload].root
    assert not any(torch.equal(a, b) for a, b in zip(first.buffers(), trained.buffers(), strict=True))


@linux
def test_a_repeated_run_is_evaluated_and_others_are_not(own_folders: Path) -> None:
    run = {**TEXT, "method": "eddl", "num_samples": 16, "epochs": 1}
    assert harness.run(**run, repeats=2).metric is not None
    assert harness.run(**{**run, "evaluate": False}).metric is None
    assert harness.run(**{**run, "mode": "simulated"}).metric is None


@linux
def test_answers_are_those_of_the_unsharded_model(own_folders: Path) -> None:
    """By every way to share a request among processes; what is compared are the logits of every sample."""
    run = {**TEXT, "technique": "inference", "epochs": 1, "num_samples": 5, "batch_size": 2, "testbed": "local-3"}
    run = {**run, "evaluate": False, "verify": True}
    for method in ("galaxy", "megatron", "sequence-parallel", "eddl", "gpipe", "standalone"):
        record = harness.run(**run, method=method)
        assert (record.status, record.reason) == ("ok", None), method
        assert record.max_rel_error is not None, method
        assert record.max_rel_error < 1e-5, method
    assert harness.run(**{**run, "verify": False}, method="galaxy").max_rel_error is None
    fewer = harness.run(**{name: value for name, value in run.items() if name != "epochs"}, steps=2, method="galaxy")
    assert fewer.max_rel_error is not None, "only what was asked for is compared"


@linux
def test_generated_tokens_are_those_of_the_unsharded_model(own_folders: Path) -> None:
    """By every way to generate; what is compared are the logits of every token of every sample."""
    run = {**TEXT, "model": "gpt2-tiny", "technique": "inference", "epochs": 1, "num_samples": 3, "batch_size": 2}
    run = {**run, "evaluate": False, "verify": True, "testbed": "local-3", "new_tokens": 5}
    for method in ("galaxy", "megatron", "sequence-parallel", "standalone"):
        record = harness.run(**run, method=method)
        assert (record.status, record.reason) == ("ok", None), method
        assert record.max_rel_error is not None, method
        assert record.max_rel_error < 1e-5, method
        assert record.prefill_time_s is not None and record.time_per_token_s is not None
        assert record.latency_s == pytest.approx(record.prefill_time_s + 4 * record.time_per_token_s)
        simulated = harness.run(**{**run, "mode": "simulated"}, method=method)
        assert simulated.comm_bytes == record.comm_bytes, method


@needs_rights
@pytest.mark.parametrize("others", [(0.04,), (0.04, 0.01)])
def test_uneven_shares_over_shaped_links(others: tuple[float, ...], own_folders: Path) -> None:
    """On unequal devices answers are the unsharded model's, and bytes are those that the plan says."""
    text = (TESTBEDS / "emu-4-50mbit.toml").read_text().replace("count = 4\ncpu_share = 0.25", "cpu_share = 0.02")
    for share in others:
        text = text.replace("[link]\n", f'[[devices]]\nprofile = "this-machine"\ncpu_share = {share}\n\n[link]\n', 1)
    testbed = own_folders / f"unequal-{len(others)}.toml"
    testbed.write_text(text)
    run = {**TEXT, "model": "gpt2-tiny", "technique": "inference", "epochs": 1, "num_samples": 2, "batch_size": 1}
    run = {**run, "evaluate": False, "verify": True, "testbed": str(testbed), "seq_len": 65}
    for options in ({"overlap": True, "tiles": 2}, {"overlap": False}):
        record = harness.run(**run, method="galaxy", options=options)
        assert (record.status, record.reason) == ("ok", None)
        assert record.plan is not None and len(set(record.plan["heads"])) > 1  # type: ignore[arg-type]
        assert record.max_rel_error is not None and record.max_rel_error < 1e-5
        simulated = harness.run(**{**run, "mode": "simulated"}, method="galaxy", options=options)
        assert simulated.comm_bytes == record.comm_bytes


def test_wrong_and_missing_answers_are_noticed() -> None:
    load = Workload("bert-tiny", "synthetic", 5, 2, technique="inference", seq_len=16)
    layered, dataset = models.build(load), datasets.load(load)
    with torch.no_grad():
        logits = layered.run(0, len(layered.units), dataset.batch(range(5)))["logits"]
    given = dict(enumerate(logits.unsqueeze(1)))
    assert evaluation.max_rel_error(load, layered, dataset, given) < 1e-6
    wrong = {**given, 3: given[3] + 0.01 * logits.abs().max()}
    assert evaluation.max_rel_error(load, layered, dataset, wrong) == pytest.approx(0.01, rel=1e-3)
    del given[4]
    with pytest.raises(Broken, match="No device has answered 1 of 5 samples, 4 among them"):
        evaluation.max_rel_error(load, layered, dataset, given)


def test_what_can_not_be_evaluated_is_refused_before_it_runs() -> None:
    with pytest.raises(OrreryError, match="the technique inference trains nothing"):
        one({**TEXT, "method": "eddl", "technique": "inference", "epochs": 1}, {})
    with pytest.raises(OrreryError, match=r"digits has but one split\. Choose one of: mrpc, .*synthetic"):
        one({**IMAGES, "method": "eddl", "dataset": "digits"}, {})
    same = {"method": "eddl", "mode": "simulated"}
    assert one({**TEXT, **same}, {}).config_hash == one({**TEXT, **same, "evaluate": False}, {}).config_hash, (
        "without effect in simulated mode"
    )
