"""Metrics on traces whose numbers are known by hand."""

from __future__ import annotations

import statistics

import pytest

from harness.cluster import Cluster, Device
from harness.measure import measure, repeated
from harness.trace import Peak, PhaseTrace, Trace
from harness.workload import Workload


def cluster(idle_w: float | None = 2.0) -> Cluster:
    boards = tuple(Device(name, "board", {}, 0.0, 1000, 1e9, idle_w=idle_w, load_w=5.0) for name in ("d0", "d1"))
    return Cluster("two", boards, {"d0": 1e6, "d1": 1e6})


def trace(total_s: float = 10.0) -> Trace:
    return Trace(
        mode="simulated",
        devices=("d0", "d1"),
        total_s=total_s,
        events=(),
        phases=(PhaseTrace("train", 4, 0.0, total_s, 300, (), 12.0, {"d1": Peak(90, {"weights": 60})}),),
        busy_s={"d0": {"compute": 8.0, "nic-out": 1.0, "nic-in": 1.5}, "d1": {"compute": 4.0, "nic-out": 0.5}},
        link_bytes={("d0", "d1"): 100, ("d1", "d0"): 200},
        peak_bytes={"d0": 70, "d1": 90},
        memory_bytes={"d0": {"weights": 30, "activations": 50}, "d1": {"weights": 90}},
    )


TRAINING = Workload("m", "d", num_samples=20, batch_size=5, epochs=2)


def test_training_metrics() -> None:
    found = measure(trace(), TRAINING, cluster())
    assert found["time_per_sample_s"] == 10 / 40
    assert found["throughput_samples_per_s"] == 40 / 10
    assert found["device_time_per_sample_s"] == (8 + 4) / 40
    assert found["latency_s"] is None
    (phase,) = found["phases"]
    peaks = phase.pop("memory")["d1"]
    assert phase == {"name": "train", "repeat": 4, "time_s": 10.0, "comm_bytes": 300, "computing_s": 12.0}
    assert (peaks["peak_bytes"], peaks["weights_bytes"], peaks["activations_bytes"]) == (90, 60, 0)
    assert found["comm_bytes"] == 300
    assert found["comm_time_s"] == 1.5
    assert found["compute_time_s"] == 8.0
    assert found["bubble_fraction"] == 1 - 12 / 20
    assert found["peak_memory_bytes"] == 90
    assert found["memory"]["d0"]["peak_bytes"] == 70
    assert found["memory"]["d0"]["activations_bytes"] == 50
    assert found["memory"]["d1"]["cache_bytes"] == 0


def test_latency_of_inference_is_per_request() -> None:
    serving = Workload("m", "d", num_samples=20, batch_size=5, technique="inference")
    assert measure(trace(), serving, cluster())["latency_s"] == 10 / 4


def test_energy_is_gross_and_net_and_adds_up_over_devices() -> None:
    found = measure(trace(), TRAINING, cluster())
    assert found["energy_net_of_idle_j"] == (5 - 2) * (8 + 4)
    assert found["energy_per_sample_j"] == found["energy_j"] / (20 * 2)
    assert found["energy_j"] == 2 * 10 * 2 + found["energy_net_of_idle_j"]
    assert sum(sum(parts.values()) for parts in found["energy"].values()) == found["energy_j"]
    assert "energy_j" not in measure(trace(), TRAINING, cluster(idle_w=None))


def test_repeats_give_the_median_of_each_phase_of_a_recovery() -> None:
    transfers, replans, totals = [1.0, 5.0, 3.0], [0.4, 0.1, 0.2], [10.0, 30.0, 20.0]
    runs = [
        {"total_time_s": total, "recovery": [{"device": "d0", "replan_s": replan, "transfer_s": transfer}]}
        for total, replan, transfer in zip(totals, replans, transfers, strict=True)
    ]
    (recovery,) = repeated(runs)["recovery"]
    assert recovery == {
        "device": "d0",
        "replan_s": 0.2,
        "transfer_s": 3.0,
        "iqr": {"replan_s": pytest.approx(0.15), "transfer_s": 2.0},
    }


def test_repeats_give_medians_and_interquartile_ranges() -> None:
    totals = [10.0, 14.0, 11.0, 30.0, 12.0]
    merged = repeated([measure(trace(total), TRAINING, cluster()) for total in totals])
    assert merged["repeats"] == 5
    assert merged["total_time_s"] == statistics.median(totals) == 12.0
    assert merged["iqr"]["total_time_s"] == 14.0 - 11.0
    assert merged["throughput_samples_per_s"] == pytest.approx(40 / 12)
    assert merged["iqr"]["compute_time_s"] == 0
    assert "latency_s" not in merged["iqr"]
    assert merged["phases"][0]["time_s"] == 12.0


def test_one_run_has_no_spread() -> None:
    one = measure(trace(), TRAINING, cluster())
    assert repeated([one]) == one
