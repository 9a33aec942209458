"""Distribution: the weights go to the devices that take part, once, before the run."""

from __future__ import annotations

from typing import NamedTuple

from harness import power
from harness.cluster import Cluster
from harness.plan import Plan
from harness.plan.actions import NIC_IN, NIC_OUT


class Distribution(NamedTuple):
    """Of the weights, once."""

    seconds: float
    joules: float | None


def distribution(plan: Plan, cluster: Cluster) -> Distribution:
    """Every device gets its first phase's weights from the cluster's first device, one after the other; all of them
    are idle meanwhile but for the network."""
    source, first = cluster.names[0], next(phase for phase in plan.phases if phase.shards)
    seconds = 0.0
    busy: dict[str, dict[str, float]] = {name: {} for name in (source, *plan.devices)}
    moved: dict[tuple[str, str], int] = {}
    for name in plan.devices:
        weights = {v for v in first.live.get(name, ()) if plan.tensors[v.name].kind == "weights"}
        nbytes = sum(plan.tensors[value.name].bytes(value) for value in weights)
        if name != source and nbytes:
            link = cluster.link(source, name)
            seconds += nbytes / link.bandwidth + link.latency_s
            busy[name][NIC_IN] = nbytes / link.bandwidth
            busy[source][NIC_OUT] = busy[source].get(NIC_OUT, 0.0) + nbytes / link.bandwidth
            moved[source, name] = nbytes
    used = [power.energy_of(cluster.device(name), seconds, busy[name], moved) for name in busy] if seconds else []
    if any(energy is None for energy in used):
        return Distribution(seconds, None)
    return Distribution(seconds, sum(energy.gross_j for energy in used if energy is not None))
