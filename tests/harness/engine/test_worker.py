"""What goes wrong on one of several devices: it is said where, on all of them, and nothing stays behind."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baselines import eddl, gpipe
from harness import datasets, models, profile
from harness.engine import ModelShard, Worker, programs
from harness.errors import OrreryError
from harness.plan import Plan
from harness.plan.actions import COMPUTE
from harness.schedules import Pipeline, Stage
from harness.simulator import own_seconds, simulate
from harness.transport import Frame, PeerLost, Transport, TransportError
from harness.workload import Workload
from tests.harness.engine.devices import Outcome, outcomes, run_devices
from tests.harness.toys import cluster

TEXT = Workload("bert-tiny", "synthetic", num_samples=16, batch_size=8, epochs=50, seq_len=16, dropout=0.1)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    assert not left, f"these threads were left: {left}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def planned(method: object, workload: Workload, num_devices: int, micro_batch_size: int) -> Plan:
    options = {**method.OPTIONS, "micro_batch_size": micro_batch_size}
    return method.plan(workload, profile.count(workload), cluster(num_devices, memory_bandwidth=1e10), options)


def replicated(workload: Workload) -> Plan:
    """Two stages of two devices."""
    costs = profile.count(workload)
    cut, count = costs.layers[3][0], len(costs.units)
    stages = (
        Stage((0, cut), ("device0", "device1"), (3, 1)),
        Stage((cut, count), ("device2", "device3"), (1, 2)),
    )
    pipeline = Pipeline(costs, stages)
    return Plan("by-hand", count, pipeline.tensors, (pipeline.phase((2,) * 4, (3, 1), repeat=100),))


# Plans for something else


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"num_labels": 3}, r"weights@\d+:\d+ has \d+ elements, and in bert-tiny it has \d+\. Plan again"),
        (
            {"seq_len": 24},
            r"device0 has 12288 bytes of layer\.1\.hidden#0\[r0:3\] for device1, and the plan says 18432\. Plan",
        ),
        ({"model": "distilbert-tiny"}, r"weights@\d+:\d+ has \d+ elements, and in bert-tiny it has \d+\. Plan again"),
    ],
    ids=["labels", "length", "model"],
)
def test_a_plan_for_another_model_is_refused(other: dict[str, object], text: str, folder: Path) -> None:
    plan = planned(gpipe, replace(TEXT, **other), 2, 3)
    with pytest.raises(OrreryError, match=text):
        run_devices(plan, TEXT, folder)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((4, 2), "device1 got 16384 bytes from device0 for .*, which has 8192 in the plan. Both must run"),
        ((2, 8), "device1 got 8192 bytes from device0 for .*, which has 32768 in the plan. Both must run"),
    ],
)
def test_devices_with_different_plans_stop_each_other(sizes: tuple[int, int], text: str, folder: Path) -> None:
    plans = {f"device{i}": planned(gpipe, TEXT, 2, size) for i, size in enumerate(sizes)}
    found = outcomes(plans, TEXT, folder)
    assert isinstance(found["device1"].error, TransportError) and not isinstance(found["device1"].error, PeerLost)
    with pytest.raises(TransportError, match=text):
        raise found["device1"].error
    assert isinstance(found["device0"].error, PeerLost) and "device1" in str(found["device0"].error)


# A device among strangers


@contextmanager
def beside_a_stranger(workload: Workload, micro_batch_size: int) -> Iterator[tuple[Worker, Transport, Plan]]:
    """device1, the second of two stages, and the transport of device0, on which nobody works."""
    plan = planned(gpipe, workload, 2, micro_batch_size)
    secret = secrets.token_bytes(32)
    ours, theirs = Transport("device1", secret, 1), Transport("device0", secret, 1)
    mine = programs(plan, "device1")
    shard = ModelShard(models.build(workload), workload, plan, torch.device("cpu"))
    worker = Worker("device1", plan, mine, workload, shard, datasets.load(workload), ours)
    at = {"device1": ours.listen("127.0.0.1"), "device0": theirs.listen("127.0.0.1")}
    other = threading.Thread(target=theirs.connect, args=({"device1": at["device1"]}, {"device1"}, 10))
    overdue = threading.Timer(20, worker.stop)
    try:
        other.start()
        ours.connect({"device0": at["device0"]}, {"device0"}, 10)
        other.join(10)
        worker.start()
        overdue.start()
        yield worker, theirs, plan
    finally:
        overdue.cancel()
        theirs.close()
        worker.stop()
        for thread in (other, overdue):
            if thread.ident is not None:
                thread.join(10)


def send(stranger: Transport, iteration: int, tag: int, extents: tuple[int, ...]) -> None:
    x = torch.zeros(extents)
    frame = Frame(1, iteration, tag, "float32", extents, x.nbytes)
    stranger.send("device1", frame, [memoryview(x.numpy()).cast("B")])


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ([(0, 1)], "device1 got frame 1 of iteration 0 from device0, and expects frame 0 of 2 of iteration 0"),
        ([(0, 0), (0, 0)], "device1 got frame 0 of iteration 0 from device0, and expects frame 1 of 2 of iteration 0"),
        ([(0, 0), (1, 0)], "device1 got frame 0 of iteration 1 from device0, and expects frame 1 of 2 of iteration 0"),
        ([(0, 0), (0, 1), (0, 2)], "frame 2 of iteration 0 from device0, and expects frame 2 of 2 of iteration [01]"),
    ],
    ids=["late", "again", "left out", "one too many"],
)
def test_frames_out_of_order_are_refused(frames: list[tuple[int, int]], text: str) -> None:
    with beside_a_stranger(TEXT, 4) as (worker, stranger, _):
        for iteration, tag in frames:
            send(stranger, iteration, tag, (4, 16, 64))
        with pytest.raises(TransportError, match=text + ".* Both must run the same plan"):
            worker.rehearse()
            worker.run(time.perf_counter(), {})


def test_a_worker_that_waits_can_be_stopped() -> None:
    with beside_a_stranger(TEXT, 4) as (worker, _, _):
        soon = threading.Timer(0.2, worker.stop)
        soon.start()
        with pytest.raises(TransportError, match="device1 has stopped"):
            worker.rehearse()
        soon.join(10)
        worker.stop()  # once more does no harm


def test_an_error_of_its_own_ends_a_worker() -> None:
    """Its sending thread waits for what will never be made."""
    with beside_a_stranger(TEXT, 4) as (worker, stranger, _):
        send(stranger, 0, 0, (4, 16, 32))  # half as wide
        with pytest.raises(TransportError, match=r"device1 got 8192 bytes from device0 for layer\.1\.hidden"):
            worker.rehearse()


# Death


class Died(Exception):
    """The process of a device has ended; the kernel closes its connections."""


def dying(plan: Plan, victim: str, folder: Path) -> tuple[dict[str, Outcome], float]:
    """The devices' outcomes when one dies after its third iteration, and the most seconds that another one lived on."""
    died: list[float] = []

    def progress(device: str, number: int, transport: Transport) -> None:
        if device == victim and number == 3:
            died.append(time.perf_counter())
            transport.close()
            raise Died

    found = outcomes(dict.fromkeys(plan.devices, plan), TEXT, folder, progress=progress)
    return found, max(outcome.ended_s for outcome in found.values()) - died[0]


@pytest.mark.parametrize("victim", ["device0", "device1", "device3"])
def test_when_a_device_dies_all_others_say_so_at_once(victim: str, folder: Path) -> None:
    found, seconds = dying(replicated(TEXT), victim, folder)
    assert isinstance(found.pop(victim).error, Died)
    assert len(found) == 3 and seconds < 2
    for device, outcome in found.items():
        assert isinstance(outcome.error, PeerLost) and outcome.report is None
        assert f"{device} lost device" in str(outcome.error)
    assert any(f"lost {victim}" in str(outcome.error) for outcome in found.values())


def test_a_death_is_noticed_around_a_ring(folder: Path) -> None:
    """device0 of four neither sends to device2 nor hears from it, but its neighbours end, too."""
    found, seconds = dying(planned(eddl, TEXT, 4, 8), "device2", folder)
    assert all(isinstance(found[device].error, PeerLost) for device in ("device0", "device1", "device3"))
    assert seconds < 2


# Devices that are played


def test_a_paced_device_takes_the_time_of_the_one_that_it_plays(folder: Path) -> None:
    """Of very slow ones, so that only their times count: the simulator's, and the same training."""
    text = replace(TEXT, epochs=1)
    costs, slow = profile.count(text), cluster(2, bandwidth=1e9, memory_bandwidth=1e10, speeds=(0.2, 0.1))
    plan = gpipe.plan(text, costs, slow, {**gpipe.OPTIONS, "micro_batch_size": 4})
    paced = run_devices(plan, text, folder, pace=own_seconds(plan, costs, slow))
    simulated, trace = simulate(plan, costs, slow), paced.execution.trace
    assert trace.total_s == pytest.approx(simulated.total_s, rel=0.1)
    for device in plan.devices:
        assert trace.busy_s[device][COMPUTE] == pytest.approx(simulated.busy_s[device][COMPUTE], rel=0.05)
        assert paced.reports[device].late_s < 0.05 * simulated.busy_s[device][COMPUTE]
    assert paced.execution.losses == run_devices(plan, text, folder).execution.losses


def test_a_device_that_can_not_keep_pace_is_refused_before_the_run(folder: Path) -> None:
    text = replace(TEXT, epochs=1)
    plan, costs = planned(gpipe, text, 2, 4), profile.count(text)
    pace = own_seconds(plan, costs, cluster(2, memory_bandwidth=1e15, speeds=(1e6, 1e6)))
    with pytest.raises(OrreryError, match=r"device\d computed for .* s in the iteration before the run, \d+% longer"):
        run_devices(plan, text, folder, pace=pace)
