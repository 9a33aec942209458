from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import harness
from harness import runner, store
from harness.errors import OrreryError
from harness.experiment import Request, expand, one
from harness.plan import serial
from harness.records import NOT_DETERMINISTIC, Record

ROOT = Path(__file__).resolve().parents[2]
TINY = {"model": "bert-tiny", "dataset": "mrpc", "steps": 4}


def request(**changed: Any) -> Request:
    return one({**TINY, "method": "eddl", "testbed": "pac-nano-4", **changed}, {})


def method_file(folder: Path, body: str) -> str:
    """A drop-in method that does `body` before it plans as EDDL does."""
    path = folder / "mine.py"
    path.write_text(
        "import time\nfrom baselines import eddl\nfrom harness.errors import OrreryError, OutOfMemory, Unsupported\n"
        f"OPTIONS = eddl.OPTIONS\ndef plan(workload, costs, cluster, options):\n    {body}\n"
        "    return eddl.plan(workload, costs, cluster, options)\n"
    )
    return str(path)


def test_metrics_agree_with_each_other_and_with_closed_forms() -> None:
    asked = request()
    costs, plan = runner.make_plan(asked)
    record = runner.run(asked)
    assert record.status == "ok" and record.reason is None
    assert record.total_time_s and record.compute_time_s and record.memory and record.energy and record.phases
    assert record.throughput_samples_per_s == 4 * 16 / record.total_time_s
    assert record.time_per_sample_s == record.total_time_s / (4 * 16)
    # A ring all-reduce of n devices sends 2 (n - 1) times the gradients over all links together.
    gradients = sum(parameter.bytes for parameter in costs.parameters.values() if parameter.trainable)
    assert record.comm_bytes == 4 * 2 * 3 * gradients == sum(phase.comm_bytes for phase in record.phases)
    assert record.micro_batch_size == max(plan.phases[0].micro_batches)
    assert record.num_devices == len(record.memory) == 4
    assert record.peak_memory_bytes == max(device.peak_bytes for device in record.memory.values())
    # Equal boards with equal shares compute equally long; the bubble is the rest.
    assert record.bubble_fraction == pytest.approx(1 - record.compute_time_s / record.total_time_s)
    parts = [part for device in record.energy.values() for part in device.model_dump().values()]
    assert record.energy_j == pytest.approx(sum(parts))


def test_clipping_is_in_the_record_and_in_the_bytes_sent() -> None:
    plain, clipped = (runner.run(request(clip_norm=norm)) for norm in (None, 0.5))
    assert (plain.clip_norm, clipped.clip_norm, clipped.status) == (None, 0.5, "ok")
    assert clipped.provenance.config_hash != plain.provenance.config_hash
    assert clipped.comm_bytes == (plain.comm_bytes or 0) + 4 * 2 * 3 * 4  # steps, twice round the ring, one float


def test_same_input_same_bytes_in_any_process(tmp_path: Path) -> None:
    """From Python here, and from the command line in processes whose sets are ordered differently."""
    here = harness.run(**TINY, method="gpipe", testbed="pac-nano-4", options={"micro_batch_size": 2})
    flags = "run --method gpipe --model bert-tiny --dataset mrpc --steps 4 --testbed pac-nano-4 --json"
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "harness", *flags.split(), "--set", "gpipe.micro_batch_size=2"]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        output = subprocess.run(
            [*command, "--out", seed], check=True, capture_output=True, cwd=tmp_path, env=environment
        )
        there = Record.model_validate_json(output.stdout)
        assert there.json_line() + "\n" == output.stdout.decode()
        excluded = set(NOT_DETERMINISTIC)
        assert there.model_dump_json(exclude=excluded) == here.model_dump_json(exclude=excluded)
        assert there.provenance.config_hash == here.provenance.config_hash


def test_a_saved_plan_gives_the_numbers_of_the_method_that_made_it(tmp_path: Path) -> None:
    asked = request(method="gpipe")
    path = tmp_path / "plan.json"
    path.write_text(serial.to_json(runner.make_plan(asked)[1]))
    again = runner.run(one({**TINY, "plan": str(path), "testbed": "pac-nano-4"}, {}))
    first = runner.run(asked)
    excluded = {*NOT_DETERMINISTIC, "method_options"}
    assert again.model_dump(exclude=excluded) == first.model_dump(exclude=excluded)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"testbed": "pac-nano-2"}, "uses device2, device3, and pac-nano-2 has device0, device1"),
        ({"model": "gpt2-tiny"}, r"cuts a model of \d+ units, and gpt2-tiny has \d+"),
        ({"steps": 5}, "processes 64 samples, and the workload has 80"),
    ],
)
def test_a_saved_plan_must_fit_the_question(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(serial.to_json(runner.make_plan(request(method="gpipe"))[1]))
    with pytest.raises(OrreryError, match=message):
        runner.run(one({**TINY, "plan": str(path), "testbed": "pac-nano-4", **changed}, {}))


def test_an_invalid_plan_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import dataclasses\nfrom baselines import eddl\nOPTIONS = eddl.OPTIONS\n"
        "def plan(workload, costs, cluster, options):\n"
        "    whole = eddl.plan(workload, costs, cluster, options)\n"
        "    (phase,) = whole.phases\n"
        "    actions = {**phase.actions, 'device0': phase.actions['device0'][1:]}\n"
        "    return dataclasses.replace(whole, phases=(dataclasses.replace(phase, actions=actions),))\n"
    )
    with pytest.raises(OrreryError, match=r"The plan of mine is not valid: .*device0"):
        runner.run(request(method=str(path)))


def test_out_of_memory_while_planning_is_a_row(tmp_path: Path) -> None:
    record = runner.run(
        request(method=method_file(tmp_path, "raise OutOfMemory('device2', 3 * 2**20, 2**20, 'weights')"))
    )
    assert (record.status, record.peak_memory_bytes, record.total_time_s) == ("oom", 3 * 2**20, None)
    assert record.reason == "device2 needs 3.0 MiB and has 1.0 MiB (2.0 MiB missing); weights"


def test_a_run_that_needs_more_than_a_device_has_is_a_row() -> None:
    """The plan is for large devices; then one of them turns out to be small."""
    asked = request()
    _, plan = runner.make_plan(asked)
    memory = runner.run(asked).memory
    assert memory is not None
    missing = {"device1": 1, "device3": 5}
    cluster = asked.testbed.cluster
    boards = [
        dataclasses.replace(d, memory_bytes=memory[d.name].peak_bytes - missing.get(d.name, 0)) for d in cluster.devices
    ]
    small = dataclasses.replace(asked.testbed, cluster=dataclasses.replace(cluster, devices=tuple(boards)))
    method = dataclasses.replace(asked.method, plan=lambda *_: plan)
    record = runner.run(dataclasses.replace(asked, method=method, testbed=small))
    assert record.status == "oom"
    assert record.reason is not None and record.reason.startswith("device3 needs")
    assert record.memory == memory
    assert record.peak_memory_bytes == max(device.peak_bytes for device in memory.values())
    assert record.plan is not None
    assert record.total_time_s is None and record.throughput_samples_per_s is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"method": "gpipe", "testbed": "pac-nano-8"}, "8 stages need as many layers, and the model has 6"),
        ({"mode": "real"}, "the testbed pac-nano-4 does not run in mode real, only in: simulated"),
        ({"model": "resnet-tiny"}, "resnet-tiny reads images and mrpc holds text"),
        ({"dataset": "digits"}, "bert-tiny reads text and digits holds images"),
        ({"model": "resnet-tiny", "dataset": "digits", "seq_len": 8}, "resnet-tiny reads images, so seq_len has no"),
        ({"image_size": 8}, "bert-tiny reads text, so image_size has no meaning for it"),
    ],
)
def test_impossible_combinations_are_rows(changed: dict[str, Any], reason: str) -> None:
    record = runner.run(request(**changed))
    assert record.status == "unsupported"
    assert record.reason is not None and reason in record.reason
    assert record.total_time_s is None


def test_what_breaks_is_a_row_with_the_traceback(tmp_path: Path) -> None:
    record = runner.run(request(method=method_file(tmp_path, "raise ZeroDivisionError('by zero')")))
    assert record.status == "failed"
    assert record.reason is not None and "ZeroDivisionError: by zero" in record.reason and "mine.py" in record.reason
    assert record.provenance.traceback is not None
    assert "mine.py" in record.provenance.traceback
    with pytest.raises(KeyboardInterrupt):
        runner.run(request(method=method_file(tmp_path, "raise KeyboardInterrupt")))


def test_bad_input_is_raised_alone_and_a_row_in_a_sweep(tmp_path: Path) -> None:
    bad = method_file(tmp_path, "raise OrreryError('No such folder.')")
    with pytest.raises(OrreryError, match="No such folder"):
        list(runner.sweep([request(method=bad)], tmp_path / "out"))
    assert list((tmp_path / "out" / "runs").iterdir()) == [], "nothing is written"
    outcomes = list(runner.sweep([request(method=bad), request()], tmp_path / "out"))
    assert [o.record.status for o in outcomes] == ["unsupported", "ok"]
    assert outcomes[0].record.reason == "No such folder."


def test_finished_runs_are_skipped_unless_forced(tmp_path: Path) -> None:
    run = {"method": ["eddl", "gpipe"], "testbed": "pac-nano-8"}
    requests = expand({"workload": TINY, "run": run}, "x")
    first = [outcome.record for outcome in runner.sweep(requests, tmp_path)]
    assert [record.status for record in first] == ["ok", "unsupported"]
    again = list(runner.sweep(requests, tmp_path))
    assert [outcome.skipped for outcome in again] == [True, False], "what was refused is asked again"
    assert again[0].record == first[0]
    assert [outcome.skipped for outcome in runner.sweep(requests, tmp_path, force=True)] == [False, False]


def test_each_record_is_on_disk_before_the_next_run_starts(tmp_path: Path) -> None:
    requests = expand({"workload": TINY, "run": {"method": "eddl", "testbed": ["pac-nano-1", "pac-nano-2"]}}, "x")
    for count, outcome in enumerate(runner.sweep(requests, tmp_path), start=1):
        assert store.load(store.run_path(tmp_path, outcome.request.config_hash)) == outcome.record
        assert len(list((tmp_path / "runs").iterdir())) == count


def test_killing_the_runner_loses_at_most_the_run_in_progress(tmp_path: Path) -> None:
    slow = method_file(tmp_path, "time.sleep(0.3)")
    experiment = tmp_path / "sweep.toml"
    experiment.write_text(
        '[workload]\nmodel = "bert-tiny"\nsteps = [1, 2, 3, 4, 5, 6]\n'
        f'[run]\nmethod = "{slow}"\ntestbed = "pac-nano-2"\n'
    )
    command = [sys.executable, "-m", "harness", "run", str(experiment), "--out", str(tmp_path / "out")]
    runs = tmp_path / "out" / "runs"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(runs.glob("*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    survived = {path: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert 2 <= len(survived) < 6
    assert all(record.status == "ok" for record in store.load_all(tmp_path / "out")), "each is whole"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.count("(done before)") == len(survived)
    assert len(store.load_all(tmp_path / "out")) == 6
    assert {path: path.stat().st_mtime_ns for path in survived} == survived
    assert (tmp_path / "out" / "runs.parquet").exists()


def test_repeats_of_a_real_run_have_a_spread_and_one_result() -> None:
    """A tiny ResNet on real digits in this process: times vary, losses don't."""
    asked = {
        "model": "resnet-tiny",
        "dataset": "digits",
        "method": "standalone",
        "testbed": "local-1",
        "mode": "emulated",
    }
    record = runner.run(one({**asked, "steps": 3, "repeats": 3}, {}))
    once = runner.run(one({**asked, "steps": 3}, {}))
    assert record.status == once.status == "ok"
    assert record.repeats == 3 and record.iqr is not None and record.iqr["total_time_s"] >= 0
    assert once.repeats == 1 and once.iqr is None
    assert record.losses is not None and len(record.losses) == 3
    assert record.losses == once.losses and record.loss == record.losses[-1]
    assert record.provenance.config_hash != once.provenance.config_hash
