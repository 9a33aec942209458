"""HetPipe (ATC 2020): virtual workers of unequal devices, pipelines inside, a parameter server and waves across.

Confirmed, by the paper's abstract and a thesis of its group: virtual workers that process mini-batches in a pipeline,
data parallelism among them, Wave Synchronous Parallel, a wave of s_local + 1 mini-batches, clocks, and aggregated
updates to a parameter server. Assumed, as remembered of the paper: what lies between these words (`harness.waves`);
the policies by which virtual workers are formed, here without nodes, for which kinds of devices stand; a clock
distance of 0 by default. Ours: where the server is; stages in rank order; and of the divisors of the number of
devices the number of virtual workers that simulates fastest, which may be one of all devices, with nobody to wait
for. Left out: the policy between the two, hybrid distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.cluster import Cluster
from harness.costs import BACKWARD, FORWARD, Costs
from harness.errors import OrreryError, unknown_name
from harness.plan import Plan
from harness.waves import plan_waves
from harness.workload import Workload

#: "ED", equal distribution: each virtual worker gets as much of every kind of device as the others. "NP", node
#: partition: devices of a kind stay together.
POLICIES = EQUAL, PARTITION = ("ED", "NP")
#: virtual_workers: how many. clock_distance: waves that a virtual worker may be ahead of the slowest one.
#: batches_per_flush: mini-batches of all, between which pipelines do not drain.
OPTIONS: dict[str, object] = {
    "virtual_workers": None,
    "policy": EQUAL,
    "clock_distance": 0,
    "batches_per_flush": 128,
}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """Cuts balanced by profiled time among those that fit; a mini-batch is a batch of the workload, whole."""
    if options["policy"] not in POLICIES:
        raise unknown_name("policy", str(options["policy"]), POLICIES)
    total = len(cluster.devices)
    counts = [count for count in range(1, total + 1) if total % count == 0]
    if options["virtual_workers"] is not None:
        counts = [_whole("virtual_workers", options, 1, total)]
    ranked = sorted(cluster.names, key=lambda name: _seconds(workload, costs, cluster, name))
    return plan_waves(
        "hetpipe",
        workload,
        costs,
        cluster,
        [virtual_workers(ranked, cluster.names, count, str(options["policy"])) for count in counts],
        _whole("clock_distance", options, 0, 10**6),
        _whole("batches_per_flush", options, 1, 10**9),
    )


def virtual_workers(ranked: Sequence[str], order: Sequence[str], count: int, policy: str) -> list[list[str]]:
    """`count` groups of devices, which are `ranked` by their speed; each in the given order."""
    groups: list[list[str]] = [[] for _ in range(count)]
    for place, name in enumerate(ranked):
        turn, seat = divmod(place, count)
        if policy == PARTITION:
            groups[place * count // len(ranked)].append(name)
        else:  # there and back, so that who chose last chooses first
            groups[seat if turn % 2 == 0 else count - 1 - seat].append(name)
    return [sorted(group, key=order.index) for group in groups]


def _seconds(workload: Workload, costs: Costs, cluster: Cluster, name: str) -> float:
    """Of the device for a mini-batch, all units."""
    device, units = cluster.device(name), len(costs.units)
    return sum(costs.seconds(device, 0, units, way, workload.batch_size) for way in (FORWARD, BACKWARD))


def _whole(option: str, options: Mapping[str, object], least: int, most: int) -> int:
    value = options[option]
    if type(value) is not int or not least <= value <= most:
        raise OrreryError(f"hetpipe.{option} is {value!r}; it must be a whole number from {least} to {most}.")
    return value
