"""Batteries that last, and that don't: by hand, and as rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness import runner
from harness.batteries import first_empty
from harness.cluster import Cluster
from harness.errors import OrreryError
from harness.experiment import one
from harness.plan import Plan
from harness.schedules import Pipeline, Stage
from harness.simulator import simulate
from tests.harness import toys

ENVIRONMENT = """
description = "Two boards, the second one on a battery"
modes = ["simulated"]
[[devices]]
profile = "jetson-nano-10w"
[[devices]]
profile = "jetson-nano-10w"
battery_j = {battery_j}
[link]
medium = "ethernet"
duplex = "full"
nominal_mbit_per_s = {{ value = 100, provenance = "definition", source = "test" }}
tcp_efficiency = {{ value = 0.94, provenance = "derived", source = "test" }}
latency_s = {{ value = 0, provenance = "definition", source = "test" }}
"""


def alone(battery_j: float | None) -> tuple[Plan, Cluster]:
    """One device, 10 iterations of 2 rows: 2 x 3 s of computing each at 5 W, and no transfers."""
    pipeline = Pipeline(toys.chain(1), (Stage((0, 1), ("device0",), (1,)),))
    phases = (pipeline.phase((1, 1), [1], repeat=4), pipeline.phase((1, 1), [1], repeat=6))
    boards = toys.cluster(1)
    (device,) = boards.devices
    with_battery = replace(device, idle_w=2.0, load_w=5.0, battery_j=battery_j)
    return Plan("test", 1, pipeline.tensors, phases), replace(boards, devices=(with_battery,))


@pytest.mark.parametrize(("battery_j", "at_s", "samples"), [(1, 0.2, 0), (30, 6, 2), (150, 30, 10), (299, 59.8, 18)])
def test_when_it_is_empty_by_hand(battery_j: float, at_s: float, samples: int) -> None:
    plan, boards = alone(battery_j)
    empty = first_empty(simulate(plan, toys.chain(1), boards), plan, boards)
    assert empty is not None
    assert (empty.device, empty.battery_j) == ("device0", battery_j)
    assert empty.needed_j == pytest.approx(300)
    assert empty.at_s == pytest.approx(at_s)
    assert empty.samples == samples


@pytest.mark.parametrize("battery_j", [300.0, 1e6, None])
def test_what_lasts_is_no_matter(battery_j: float | None) -> None:
    plan, boards = alone(battery_j)
    assert first_empty(simulate(plan, toys.chain(1), boards), plan, boards) is None


def run(folder: Path, battery_j: float, **asked: object):
    path = folder / "mine.toml"
    path.write_text(ENVIRONMENT.format(battery_j=battery_j))
    tiny = {"model": "bert-tiny", "dataset": "mrpc", "steps": 4, "method": "eddl"}
    return runner.run(one({**tiny, "testbed": str(path), **asked}, {}))


def test_a_battery_that_does_not_last_is_a_row_with_its_reason(tmp_path: Path) -> None:
    lasting = run(tmp_path, 1e6)
    assert lasting.status == "ok" and lasting.energy is not None and lasting.total_time_s is not None
    needed = sum(lasting.energy["device1"].model_dump().values())
    failed = run(tmp_path, needed / 2)
    assert (failed.status, failed.total_time_s, failed.energy_j) == ("failed", None, None)
    assert failed.provenance.traceback is None
    assert failed.reason == (
        f"the battery of device1 holds {needed / 2:.6g} J and the run takes {needed:.6g} J of it: it is empty after "
        f"{lasting.total_time_s / 2:.6g} s and 32 samples"
    )
    assert failed.provenance.config_hash != lasting.provenance.config_hash


def test_a_battery_of_a_device_without_a_part_is_no_matter(tmp_path: Path) -> None:
    assert run(tmp_path, 1e-3, method="standalone").status == "ok"


def test_batteries_of_a_run_whose_devices_change_can_t_be_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(ENVIRONMENT.format(battery_j=1e6))
    asked = {"model": "bert-tiny", "dataset": "mrpc", "steps": 4, "method": "asteroid", "testbed": str(path)}
    record = runner.run(one({**asked, "inject": "crash device0 at step 2"}, {"replication_period": 1}))
    assert record.status == "unsupported"
    assert "whether batteries last" in (record.reason or "")


def test_processes_of_this_machine_have_no_battery(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(ENVIRONMENT.format(battery_j=1).replace("jetson-nano-10w", "this-machine"))
    with pytest.raises(OrreryError, match=r"devices\[1\].battery_j is of no use: this-machine lacks idle_w and load_w"):
        runner.run(one({"model": "bert-tiny", "steps": 4, "method": "eddl", "testbed": str(path)}, {}))
