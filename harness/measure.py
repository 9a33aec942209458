"""From a trace to the measured fields of a record. One definition of every metric, for every mode."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from harness import power
from harness.cluster import Cluster
from harness.plan.actions import COMPUTE, NIC_IN, NIC_OUT
from harness.plan.values import KINDS
from harness.trace import Trace
from harness.workload import Workload

#: Measured numbers that vary between repeats of a run: the record gives the median and the interquartile range.
REPEATED = (
    "total_time_s",
    "time_per_sample_s",
    "device_time_per_sample_s",
    "throughput_samples_per_s",
    "latency_s",
    "prefill_time_s",
    "time_per_token_s",
    "comm_time_s",
    "compute_time_s",
    "bubble_fraction",
    "energy_j",
    "energy_net_of_idle_j",
    "energy_per_sample_j",
)


def measure(trace: Trace, workload: Workload, cluster: Cluster, epochs_before: int = 0) -> dict[str, Any]:
    """Record fields of one run: times, where they went, bytes, memory and energy.

    Of a run that was killed and went on, `epochs_before` were not seen: all is of the rest, and there is no total time.

    `device_time_per_sample_s`: compute-queue seconds of all devices over samples (PAC, Figure 8).
    `comm_time_s`: the busiest single network queue, so that sending and receiving at once counts once.
    `bubble_fraction`: 1 - mean over devices of (compute-queue seconds / total time): waiting for others and
    for transfers alike. With equal stages and free transfers it is (p-1)/(m+p-1) for GPipe and 1F1B.
    """
    requests = sum(repeat for _, repeat in workload.batches())
    samples, total = workload.total_samples - epochs_before * workload.num_samples, trace.total_s
    computing = [trace.busy_s[device].get(COMPUTE, 0.0) for device in trace.devices]
    networking = [trace.busy_s[device].get(queue, 0.0) for device in trace.devices for queue in (NIC_OUT, NIC_IN)]
    return {
        "total_time_s": None if epochs_before else total,
        "time_per_sample_s": total / samples,
        "device_time_per_sample_s": sum(computing) / samples,
        "throughput_samples_per_s": samples / total,
        "latency_s": None if workload.training else total / requests,
        **({} if workload.new_tokens is None else _generation(trace, requests)),
        "phases": [
            {
                "name": phase.name,
                "repeat": phase.repeat,
                "time_s": phase.time_s,
                "comm_bytes": phase.comm_bytes,
                "computing_s": phase.computing_s,
                "memory": {device: _of_device(peak.nbytes, peak.kinds) for device, peak in phase.memory.items()}
                or None,
            }
            for phase in trace.phases
        ],
        "comm_bytes": trace.comm_bytes,
        "comm_time_s": max(networking),
        "compute_time_s": max(computing),
        "bubble_fraction": 1 - sum(computing) / len(computing) / total,
        **memory(trace),
        **energy(trace, cluster, samples),
    }


def recovered(whole_s: float, recoveries: Sequence[Mapping[str, object]], workload: Workload) -> dict[str, Any]:
    """Record fields of a run that lost devices and went on: what only the whole run says, and none of what its trace,
    which begins after the last failure, does not say of all of it."""
    samples = workload.total_samples
    return {
        "total_time_s": whole_s,
        "time_per_sample_s": whole_s / samples,
        "throughput_samples_per_s": samples / whole_s,
        "device_time_per_sample_s": None,
        "peak_memory_bytes": None,
        "memory": None,
        "energy_j": None,
        "energy_net_of_idle_j": None,
        "energy_per_sample_j": None,
        "energy_source": None,
        "energy": None,
        "recovery": [dict(recovery) for recovery in recoveries],
    }


def _generation(trace: Trace, requests: int) -> dict[str, float | None]:
    """How long a request takes up to its first new token, and every further token of it."""
    tokens = sum(phase.repeat for phase in trace.phases if phase.decoding)
    decoding = sum(phase.time_s for phase in trace.phases if phase.decoding)
    return {
        "prefill_time_s": sum(phase.time_s for phase in trace.phases if not phase.decoding) / requests,
        "time_per_token_s": decoding / tokens if tokens else None,
    }


def memory(trace: Trace) -> dict[str, Any]:
    """Record fields of the memory ledger. True of a run that does not fit, too."""
    return {
        "peak_memory_bytes": max(trace.peak_bytes[device] for device in trace.devices),
        "memory": {
            device: {
                **_of_device(trace.peak_bytes[device], trace.memory_bytes[device]),
                "process_peak_bytes": trace.process_peak_bytes.get(device),
            }
            for device in trace.devices
        },
    }


def _of_device(peak_bytes: int, kinds: Mapping[str, int]) -> dict[str, int]:
    return {"peak_bytes": peak_bytes, **{f"{kind}_bytes": kinds.get(kind, 0) for kind in KINDS}}


def energy(trace: Trace, cluster: Cluster, samples: int) -> dict[str, Any]:
    """Record fields of the modelled energy; none where a device's power is unknown."""
    modelled = power.energy(trace, cluster)
    if modelled is None:
        return {}
    return {
        "energy_j": modelled.gross_j,
        "energy_net_of_idle_j": modelled.net_of_idle_j,
        "energy_per_sample_j": modelled.gross_j / samples,
        "energy_source": modelled.source,
        "energy": {device: dataclasses.asdict(parts) for device, parts in modelled.devices.items()},
    }


def repeated(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several measurements of the same run as one: median and interquartile range of each number in `REPEATED`.

    What has parts (phases, memory, energy per device) is that of the run whose total time is the (lower) median. Each
    number of a recovery is the median of all.
    """
    totals = [run["total_time_s"] for run in runs]
    merged: dict[str, Any] = dict(runs[totals.index(statistics.median_low(totals))])
    if len(runs) == 1:
        return merged
    recoveries = [run.get("recovery") or [] for run in runs]
    if merged.get("recovery") and len({len(of_run) for of_run in recoveries}) == 1:
        merged["recovery"] = [_typical(each) for each in zip(*recoveries, strict=True)]
    iqr: dict[str, float] = {}
    for name in REPEATED:
        values = [run[name] for run in runs if run.get(name) is not None]
        if values:
            low, merged[name], high = statistics.quantiles(values, n=4, method="inclusive")
            iqr[name] = high - low
    return {**merged, "iqr": iqr, "repeats": len(runs)}


def _typical(recoveries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One recovery as it went in several runs: the median of each number that all of them have, and how far its
    quartiles are apart."""
    merged, iqr = dict(recoveries[0]), dict[str, float]()
    for name in (name for name, value in merged.items() if isinstance(value, float)):
        values = [recovery[name] for recovery in recoveries]
        if None not in values:
            low, merged[name], high = statistics.quantiles(values, n=4, method="inclusive")
            iqr[name] = high - low
    return {**merged, "iqr": iqr}
