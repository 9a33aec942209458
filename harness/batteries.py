"""Batteries in virtual time: which device runs dry first, when, and how far the run has come by then."""

from __future__ import annotations

from harness.cluster import Cluster
from harness.errors import BatteryEmpty
from harness.plan import Plan
from harness.power import energy_of
from harness.trace import Trace


def first_empty(trace: Trace, plan: Plan, cluster: Cluster) -> BatteryEmpty | None:
    """The first device whose modelled energy over the simulated run is more than its battery holds, if any's is.

    Within a phase of the plan its power counts as even, and of its repeats those are done that are over.
    """
    found = [empty for name in trace.devices if (empty := _empty(name, trace, plan, cluster)) is not None]
    return min(found, key=lambda empty: empty.at_s, default=None)


def _empty(name: str, trace: Trace, plan: Plan, cluster: Cluster) -> BatteryEmpty | None:
    device = cluster.device(name)
    whole = energy_of(device, trace.total_s, trace.busy_s[name], trace.link_bytes)
    if device.battery_j is None or whole is None or whole.gross_j <= device.battery_j:
        return None
    left_j, at_s, samples = device.battery_j, 0.0, 0
    for phase, seen in zip(plan.phases, trace.phases, strict=True):
        used = energy_of(device, seen.time_s, seen.busy_s[name], seen.link_bytes)
        assert used is not None, "its powers are known"
        share = min(1.0, left_j / used.gross_j) if used.gross_j else 1.0
        at_s += share * seen.time_s
        if phase.shards and not phase.decoding:
            samples += phase.batch_size * int(share * phase.repeat)
        if share < 1:
            break
        left_j -= used.gross_j
    return BatteryEmpty(name, whole.gross_j, device.battery_j, at_s, samples)
