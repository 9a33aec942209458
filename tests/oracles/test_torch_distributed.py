"""Our engine against torch's own distributed trainers, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from baselines import eddl, gpipe, pipedream_1f1b
from harness import datasets, models, profile, reference, samples
from harness.plan import Plan
from harness.workload import Workload
from tests.harness.engine.devices import run_devices
from tests.harness.toys import cluster
from tests.oracles.rank import RANKS, Task

ROOT = Path(__file__).parents[2]
GLUE = ROOT.parent / "shared" / "data" / "glue"
SECONDS = 120
MICRO_BATCHES = 4
WORKLOAD = Workload(
    "bert-tiny",
    "mrpc" if GLUE.is_dir() else "synthetic",
    num_samples=80,
    batch_size=16,
    steps=5,
    seq_len=32,
    dropout=0.0,
    optimizer="sgd-momentum",
    learning_rate=0.05,
)


@cache
def planned(method: ModuleType) -> Plan:
    size = WORKLOAD.batch_size if method is eddl else WORKLOAD.batch_size // MICRO_BATCHES
    options = {**method.OPTIONS, "micro_batch_size": size}
    return method.plan(WORKLOAD, profile.count(WORKLOAD), cluster(RANKS, memory_bandwidth=1e10), options)


def cut(method: ModuleType) -> tuple[int, str, list[int]]:
    """Where the method's second stage begins, and what it is handed: name, tokens and width."""
    costs = profile.count(WORKLOAD)
    first, _ = planned(method).phases[0].shards["device1"].units
    (name,) = costs.carried(first)
    return first, name, [costs.tensors[name].tokens, costs.tensors[name].width]


@pytest.fixture(scope="module")
def trained_by_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what both ranks made, by every trainer."""
    folder = tmp_path_factory.mktemp("torch")
    order = datasets.sample_order(WORKLOAD.num_samples, 0, WORKLOAD.seed)
    batches = [list(order[i : i + WORKLOAD.batch_size]) for i in range(0, len(order), WORKLOAD.batch_size)]
    cuts = {"gpipe": cut(gpipe), "pipedream-1f1b": cut(pipedream_1f1b)}
    task = Task(asdict(WORKLOAD), batches, MICRO_BATCHES, cuts)
    (folder / "task.json").write_text(json.dumps(asdict(task)))
    samples.save(datasets.load(WORKLOAD, GLUE), folder / "samples.safetensors")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.oracles.rank", str(rank), str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(10)
    assert [rank.returncode for rank in ranks] == [0] * RANKS, "\n".join(said)
    return folder


@pytest.mark.parametrize("method", [eddl, gpipe, pipedream_1f1b], ids=["ddp", "gpipe", "1f1b"])
def test_we_train_what_torch_trains(method: ModuleType, trained_by_torch: Path, tmp_path: Path) -> None:
    """Real text where it is there; the same samples on the same ranks, five steps with momentum."""
    plan = planned(method)
    theirs = [load_file(trained_by_torch / f"{plan.method}-{rank}.safetensors") for rank in range(RANKS)]
    ours = run_devices(plan, WORKLOAD, tmp_path, GLUE)
    for rank, device in enumerate(plan.devices):
        assert ours.reports[device].losses == pytest.approx(theirs[rank]["losses"].tolist(), abs=1e-5)
    total = sum(rank["losses"] for rank in theirs)
    assert ours.execution.losses == pytest.approx(total.tolist(), abs=1e-5) and len(total) == 5
    for rank, device in zip(theirs, plan.devices, strict=True):
        weights = {name: tensor for name, tensor in ours.state[device].items() if "/" not in name}
        assert weights and reference.max_rel_error(weights, rank, adaptive=False) <= 1e-5
    untrained = reference.state(models.build(WORKLOAD).root, [])
    assert reference.max_rel_error(untrained, theirs[-1], adaptive=False) > 1e-3
