"""Runs that are killed, worker or all of it, and go on: to the very losses and weights of those that never were."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import runner, store
from harness.costs import Costs
from harness.engine import Execution
from harness.entries import HEADER_BYTES
from harness.errors import OrreryError
from harness.experiment import Request, one
from harness.fleet.coordinator import Lost
from harness.fleet.job import trained
from harness.plan import Plan
from harness.records import Record
from harness.resume import COMMITTED, Journal
from testbeds import emulated, library
from tests.testbeds.processes import family, lives, nothing_left, own_folders, wait_for, worker

__all__ = ["own_folders"]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc"),
    pytest.mark.usefixtures("own_folders"),
]
ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"model": "bert-tiny", "dataset": "synthetic", "num_samples": 64, "batch_size": 8, "seq_len": 16, "epochs": 5}
#: In float64: which cuts and micro-batches are fastest, and so how sums are rounded, is for this machine to say, and
#: AdamW divides small gradients by their own size.
EXACT = {"optimizer": "adamw", "dtype": "float64"}
TEXT = {**SHAPE, **EXACT, "dropout": 0.1, "testbed": "local-2", "mode": "emulated"}
PAC = {**TEXT, "method": "pac", "technique": "parallel-adapters"}
GROUPING = {"grouping": "1-1", "micro_batch_size": 4}
ABOUT = {"config_hash": "c0ffee", "code_digest": "beef"}


@dataclass(frozen=True)
class Question:
    """A run on the open testbed, and what it gives if nobody disturbs it."""

    emulation: Any
    plan: Plan
    request: Request
    costs: Costs
    wanted: Execution
    weights: Mapping[str, Mapping[str, Tensor]]

    def run(self, journal: Journal | None = None, cache_dir: Path | None = None) -> Execution:
        found: Execution = self.emulation.execute(
            self.plan, self.request.workload, self.costs, verify=True, cache_dir=cache_dir, journal=journal
        )
        return found

    def killed(self, journal: Journal, when: Callable[[], object]) -> None:
        """Run until it is time to kill a worker."""

        def kill() -> None:
            assert wait_for(when, 60)
            os.kill(worker(os.getpid(), 1) or 0, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        with pytest.raises(Lost, match="device1: its worker was killed by SIGKILL"):
            self.run(journal)
        thread.join(60)

    def check(self, found: Execution) -> None:
        """Equal to the bit."""
        assert found.losses == self.wanted.losses
        assert found.max_rel_error == self.wanted.max_rel_error
        for device, tensors in self.weights.items():
            again = trained(self.emulation.folder, device)
            assert again.keys() == tensors.keys()
            assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.fixture(scope="module")
def testbed(own_folders: Path) -> Iterator[Any]:
    with nothing_left(own_folders), emulated.opened(library.load("local-2")) as execute:
        yield execute.__self__  # type: ignore[attr-defined]


def question(testbed: Any, asked: Mapping[str, Any], options: Mapping[str, object]) -> Question:
    request = one(asked, options)
    costs, plan = runner.make_plan(request)
    wanted = testbed.execute(plan, request.workload, costs, verify=True)
    assert wanted.max_rel_error < 1e-5 and wanted.resumed_after_epoch is None
    weights = {device: trained(testbed.folder, device) for device in plan.devices}
    return Question(testbed, plan, request, costs, wanted, weights)


@pytest.fixture(scope="module")
def cached(testbed: Any) -> Question:
    return question(testbed, PAC, GROUPING)


def epochs(folder: Path) -> int:
    """How many count."""
    try:
        return int(json.loads((folder / COMMITTED).read_text())["epochs"])
    except FileNotFoundError:
        return 0


def entries(journal: Journal, device: str) -> list[Path]:
    return sorted((journal.cache / device).glob("*.bin"))


# A worker is killed


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_cached_run_goes_on(after: int, cached: Question, tmp_path: Path) -> None:
    """In its first epoch, when that has just been over and all is handed out, and in later ones."""
    journal = Journal(tmp_path / "state", ABOUT)
    cached.killed(journal, lambda: epochs(journal.folder) == after if after else entries(journal, "device1"))
    done = epochs(journal.folder)
    assert after <= done < 5 and all(entries(journal, device) for device in cached.plan.devices)
    found = cached.run(journal)
    cached.check(found)
    assert found.resumed_after_epoch == (done or None)
    assert "recomputed_cache_entries" not in (found.emulation or {})
    if done >= 2:
        for device, kinds in found.trace.memory_bytes.items():
            assert kinds["weights"] < 0.3 * cached.wanted.trace.memory_bytes[device]["weights"]
            assert {phase.name for phase in found.trace.phases} == {"cached epoch"}


def test_what_was_damaged_meanwhile_is_made_again(cached: Question, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state", ABOUT)
    cached.killed(journal, lambda: epochs(journal.folder) == 2)
    changed, cut, emptied, *_ = entries(journal, "device0")
    content = bytearray(changed.read_bytes())
    content[HEADER_BYTES + 77] ^= 1
    changed.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[: HEADER_BYTES + 50_000])
    emptied.write_bytes(b"")
    found = cached.run(journal)
    assert found.losses == pytest.approx(cached.wanted.losses, rel=1e-5)
    about: Any = found.emulation
    assert about["recomputed_cache_entries"].keys() == {"device0"}
    assert about["recomputed_cache_entries"]["device0"] > 32, "one, many, and all that the device needs"


def test_a_cache_that_lacks_something_is_refused(cached: Question, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state", ABOUT)
    cached.killed(journal, lambda: epochs(journal.folder) == 2)
    name = entries(journal, "device0")[0].stem
    entries(journal, "device0")[0].unlink()
    with pytest.raises(OrreryError, match=rf"has no {name} of 32 of the 32 samples that the device needs"):
        cached.run(journal)


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({**TEXT, "method": "gpipe"}, {"micro_batch_size": 4}),
        pytest.param(
            {**TEXT, "method": "eddl", "optimizer": "sgd-momentum", "clip_norm": 1.0}, {}, marks=pytest.mark.slow
        ),
    ],
    ids=["gpipe", "eddl"],
)
def test_other_methods_go_on(
    asked: Mapping[str, Any], options: Mapping[str, object], testbed: Any, tmp_path: Path
) -> None:
    asked = {**asked, "num_samples": 36}
    plain, journal = question(testbed, asked, options), Journal(tmp_path / "state", ABOUT)
    plain.killed(journal, lambda: epochs(journal.folder) == 2)
    found = plain.run(journal)
    plain.check(found)
    assert found.resumed_after_epoch is not None and found.resumed_after_epoch >= 2
    left = 2 * (5 - found.resumed_after_epoch)
    assert len(found.trace.phases) == left, "times are of what was left"


def test_a_run_does_not_go_on_with_what_it_was_not_of(cached: Question, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state", ABOUT)
    cached.killed(journal, lambda: epochs(journal.folder) == 1)
    for key, noun in (("weights", "initial weights"), ("samples", "data")):
        path = journal.folder / COMMITTED
        stored = json.loads(path.read_text())
        path.write_text(json.dumps({**stored, "about": {**stored["about"], key: "0"}}))
        message = f"was of another {noun}: 0 there, [0-9a-f]+ now, so it can't go on after epoch"
        with pytest.raises(OrreryError, match=message):
            cached.run(Journal(journal.folder, ABOUT))
        path.write_text(json.dumps(stored))


# Caches that are kept


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param(
            {"model": "distilbert-tiny"},
            "another model: bert-tiny there, distilbert-tiny in this run",
            marks=pytest.mark.slow,
        ),
        ({"seed": 1}, "another digest of the backbone's weights: [0-9a-f]+ there, [0-9a-f]+ in this run"),
        ({"num_samples": 56}, "other samples, by another tokenizer or of other data: it has 64 with the digest"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_name(
    changed: Mapping[str, Any], message: str, cached: Question, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kept = tmp_path_factory.getbasetemp() / "kept"
    if not kept.exists():
        cached.check(cached.run(cache_dir=kept))
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    request = one({**PAC, **changed}, GROUPING)
    costs, plan = runner.make_plan(request)
    with pytest.raises(OrreryError, match=rf"The activation cache in {kept}/device\d is of {message}") as caught:
        cached.emulation.execute(plan, request.workload, costs, cache_dir=kept)
    assert "Name another folder with --cache-dir, or remove" in str(caught.value)
    assert before == {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}, "it is left alone"


def test_a_kept_cache_serves_another_run_from_its_first_epoch_on(cached: Question, tmp_path: Path) -> None:
    cached.check(cached.run(cache_dir=tmp_path / "kept"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.bin")}
    cached.check(cached.run(cache_dir=tmp_path / "kept"))
    assert times == {path: path.stat().st_mtime_ns for path in times}, "what is there is not written again"
    size = cached.plan.summary["cached_micro_batch_size"]
    asked = {**PAC, "learning_rate": 0.003, "cache_dir": str(tmp_path / "kept"), "verify": True}
    request = one(asked, {"kept_cache": True, "micro_batch_size": size})
    costs, plan = runner.make_plan(request)
    found = cached.emulation.execute(plan, request.workload, costs, verify=True, cache_dir=request.cache_dir)
    assert found.max_rel_error < 1e-5 and found.losses != cached.wanted.losses
    assert {phase.name for phase in found.trace.phases} == {"cached epoch"}
    for device, kinds in found.trace.memory_bytes.items():
        assert kinds["weights"] < 0.3 * cached.wanted.trace.memory_bytes[device]["weights"]


# All of it is killed


def test_the_same_command_goes_on(cached: Question, own_folders: Path, tmp_path: Path) -> None:
    out, state = tmp_path / "out", store.state_path(tmp_path / "out", cached.request.config_hash)
    temporary = own_folders / "another runner's"
    temporary.mkdir()
    words = [w for key, value in PAC.items() for w in (f"--{key.replace('_', '-')}", str(value))]
    words += [w for name, value in GROUPING.items() for w in ("--set", f"pac.{name}={value}")]
    command = [sys.executable, "-m", "harness", "run", "--json", "--resume", "--out", str(out), *words]
    how: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, "TMPDIR": str(temporary)}}
    process = subprocess.Popen(command, **how, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert wait_for(lambda: epochs(state) >= 2 or process.poll() is not None, 120)
        all_of_it = family(process.pid)
    finally:
        process.kill()
        process.communicate(timeout=15)
    assert wait_for(lambda: not any(map(lives, all_of_it)), 5)
    done = epochs(state)
    assert 2 <= done < 5 and not list((out / "runs").glob("*.json"))
    again = subprocess.run(command, **how, capture_output=True, timeout=120)
    assert again.returncode == 0, again.stderr.decode()
    record = Record.model_validate_json(again.stdout)
    assert record.status == "ok" and record.resumed_after_epoch == done and record.total_time_s is None
    seconds = sum(phase.time_s for phase in record.phases or ())
    assert record.throughput_samples_per_s == pytest.approx((5 - done) * 64 / seconds)
    assert f"samples/s since it was resumed after epoch {done}" in again.stderr.decode()
    assert not (out / "resume").exists(), "the run is over"
    assert list(temporary.iterdir()) == []
    assert record.losses == list(cached.wanted.losses)


def test_what_can_not_go_on_is_refused(tmp_path: Path) -> None:
    asked = {**TEXT, "method": "gpipe"}
    for changed, message in (
        ({"repeats": 3}, "asks for 3 repeats, whose times are compared"),
        ({"technique": "inference", "optimizer": "sgd"}, "trains nothing"),
    ):
        with pytest.raises(OrreryError, match=message):
            list(runner.sweep([one({**asked, **changed}, {})], tmp_path, resume=True))
    with pytest.raises(OrreryError, match="--force begins anew and --resume goes on"):
        list(runner.sweep([one(asked, {})], tmp_path, force=True, resume=True))
    (outcome,) = runner.sweep([one({**asked, "mode": "simulated"}, {})], tmp_path, resume=True)
    assert outcome.record.status == "ok" and not (tmp_path / "resume").exists()
