"""Adapters of real runs: what several processes have trained together is one file, and on a plain model it computes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import harness
from harness import adapters, datasets, models, reference, runner
from harness.errors import Broken, OrreryError
from harness.experiment import expand, one
from harness.fleet.job import trained_parameters
from harness.workload import Workload
from tests.testbeds.processes import nothing_left, own_folders

__all__ = ["own_folders"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
RUN = {
    "model": "bert-tiny",
    "dataset": "synthetic",
    "num_samples": 16,
    "batch_size": 8,
    "seq_len": 16,
    "steps": 3,
    "method": "gpipe",
    "testbed": "local-2",
    "mode": "emulated",
    "learning_rate": 0.1,
    "dropout": 0.1,
}
PRUNED = {"gate": True, "dropped": "0", "init": "pruning"}
CASES = {
    "lora": {"technique": "lora", "technique_options": {"rank": 4}},
    "adapters": {"technique": "adapters", "model": "t5-tiny"},
    "parallel-adapters": {"technique": "parallel-adapters", "technique_options": PRUNED},
    "cached": {"technique": "parallel-adapters", "method": "pac", "model": "bart-tiny", "steps": None, "epochs": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_run_has_trained_computes_on_a_plain_model(case: str, own_folders: Path, tmp_path: Path) -> None:
    """As the model does that is trained on one device by plain autograd."""
    asked = {**RUN, **CASES[case]}
    path = tmp_path / "adapter.safetensors"
    with nothing_left(own_folders):
        record = harness.run(**asked, save_adapter=str(path))
    assert (record.status, record.reason) == ("ok", None)
    about, _ = adapters.read(path)
    assert about["config_hash"] == record.provenance.config_hash

    options = asked.pop("technique_options", None)
    request = one(asked, {}, options)
    _, plan = runner.make_plan(request)
    data = datasets.load(request.workload)
    wanted = reference.train(plan, request.workload, data).layered
    new = models.build(request.workload).root
    theirs = models.build(replace(request.workload, technique="full", technique_options=None)).root
    frozen = {n.replace(".base_layer", ""): p for n, p in new.named_parameters() if not p.requires_grad}
    theirs.load_state_dict(frozen, strict=False)
    batch = data.batch(range(8))
    with torch.no_grad():
        before = wanted_logits(models.build(request.workload), batch)
        logits = wanted_logits(wanted, batch)
        tuned = adapters.attach(getattr(theirs, "backbone", theirs), path).eval()
        found = tuned(**{name: tensor for name, tensor in batch.items() if name in wanted.inputs}).logits
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
    assert (before - logits).abs().max() > 1e-3, "training has changed something"


def wanted_logits(layered: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    layered.root.eval()
    made: torch.Tensor = layered.run(0, len(layered.units), batch)["logits"]
    return made


def test_a_stored_run_is_done_again_for_a_file_that_is_not_there(own_folders: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    asked = {**RUN, "technique": "lora", "steps": 1}

    def skipped(**changed: object) -> bool:
        (outcome,) = runner.sweep([one({**asked, **changed}, {})], tmp_path / "out")
        assert outcome.record.status == "ok"
        return outcome.skipped

    with nothing_left(own_folders):
        assert [skipped(), skipped(), skipped(save_adapter=str(path)), skipped(save_adapter=str(path))] == [
            *(False, True, False, True)
        ]
        assert not skipped(save_adapter=str(path), seed=1), "the file is that of another run"
        assert not skipped(save_adapter=str(path))


def test_every_trained_parameter_is_saved_by_somebody(tmp_path: Path) -> None:
    load = Workload("bert-tiny", "synthetic", num_samples=8, batch_size=4, seq_len=8, technique="lora")
    parameters = {n: p.detach() for n, p in models.build(load).root.named_parameters()}
    wanted = {n for n, p in models.build(load, "meta").root.named_parameters() if p.requires_grad}
    halves = [dict(list(parameters.items())[part]) for part in (slice(0, 60), slice(40, None))]
    for device, half in zip(("a", "b"), halves, strict=True):
        save_file(half, tmp_path / f"trained-{device}.safetensors")
    assert trained_parameters(load, tmp_path, ["a", "b"]).keys() == wanted
    with pytest.raises(Broken, match=r"Devices have not saved .*, which was to be trained"):
        trained_parameters(load, tmp_path, ["a"])


WRONG = {
    "save_adapter saves what a technique adds to a model, and full adds nothing": {"technique": "full"},
    "and inference adds nothing": {"technique": "inference"},
    "mode simulated trains nothing. Give mode emulated": {"mode": "simulated"},
    "which is a folder": {"save_adapter": "."},
    "which is no folder": {"save_adapter": "nowhere/adapter.safetensors"},
    "names one file for 2 runs": {"method": ["gpipe", "eddl"]},
}


@pytest.mark.parametrize(("message", "changed"), WRONG.items())
def test_what_can_not_be_saved_is_refused_before_anything_runs(message: str, changed: dict[str, Any]) -> None:
    asked = {"technique": "lora", "save_adapter": "adapter.safetensors", **changed}
    workload = {"model": "bert-tiny", "dataset": "synthetic", "technique": asked.pop("technique")}
    run = {"method": "gpipe", "testbed": "local-2", "mode": "emulated", **asked}
    with pytest.raises(OrreryError, match=message):
        expand({"workload": workload, "run": run}, "the test")
