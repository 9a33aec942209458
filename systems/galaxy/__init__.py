"""Galaxy: a request's layers shared among devices, by width and by tokens in turn, with tiles that hide the transfers.

Ye et al., Galaxy: A Resource-Efficient Collaborative Edge AI System for In-situ Transformer Inference, INFOCOM 2024.
The planner's equations are assumed (see `systems.galaxy.planner`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import OrreryError, OutOfMemory, Unsupported, unknown_name
from harness.plan import Plan
from harness.search import fastest
from harness.sharded import (
    EQUAL,
    HYBRID,
    LEADER,
    SCHEMES,
    SEQUENCE,
    TENSOR,
    Shares,
    even_shares,
    known_embeddings,
    plan_sharded,
    shared_block,
    whole_tiles,
)
from harness.simulator import estimate
from harness.workload import Workload
from systems.galaxy.planner import Problem, Split, balanced, exact, heuristic, problem

PAPER, EXACT = "heuristic", "exact"
SPLITS = (EQUAL, PAPER, EXACT)
ALL = "all"
CHOICES = (ALL, "fastest")
#: `overlap`: transfers run tile by tile beside the products that they feed, or that feed them. `tiles`: pieces of each
#: device's tokens on their way round the ring. `split`: of heads and columns, by a "heuristic" that stands for the
#: paper's (assumed), the "exact" one, or "equal". `scheme`: "hybrid" as in the paper; "tensor" is Megatron's under this
#: planner. `embeddings`: with the "leader", who hands out what they make, or "everywhere". `choose`: that scheme on
#: "all" devices, as in the paper, or the "fastest" of all schemes on some or all of them, as simulated.
OPTIONS: dict[str, object] = {
    "overlap": True,
    "tiles": 1,
    "split": PAPER,
    "scheme": HYBRID,
    "embeddings": LEADER,
    "choose": ALL,
}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """The plan of the chosen split. Raises OutOfMemory where the weights fit nowhere, and says what is missing, and
    Unsupported for training."""
    overlap, tiles = options["overlap"], whole_tiles("galaxy", options)
    embeddings = known_embeddings("galaxy", options)
    if not isinstance(overlap, bool):
        raise OrreryError(f"galaxy.overlap is {overlap!r}; it must be true or false.")
    for key, allowed in (("split", SPLITS), ("scheme", (HYBRID, TENSOR)), ("choose", CHOICES)):
        if options[key] not in allowed:
            raise unknown_name(f"value of galaxy.{key}", str(options[key]), allowed)

    if costs.training:
        raise Unsupported(
            "Galaxy shares the layers of inference; megatron and sequence-parallel train with shared layers"
        )
    if options["choose"] != ALL and options["scheme"] != HYBRID:
        raise OrreryError("galaxy.choose=fastest tries all schemes. Leave galaxy.scheme away.")

    def candidate(devices: Sequence[str], scheme: str) -> Plan:
        def of(shares: Shares) -> Plan:
            hidden = overlap and scheme == HYBRID
            return plan_sharded("galaxy", workload, costs, devices, scheme, shares, hidden, tiles, embeddings)

        if scheme == SEQUENCE:
            return of(even_shares(costs, len(devices)))
        return _within_memory(workload, costs, cluster, devices, str(options["split"]), of)

    if options["choose"] == ALL:
        return fastest([partial(candidate, cluster.names, str(options["scheme"]))], costs, cluster)
    return fastest([partial(candidate, *which) for which in _alternatives(costs, cluster, workload)], costs, cluster)


def _alternatives(costs: Costs, cluster: Cluster, workload: Workload) -> Iterator[tuple[tuple[str, ...], str]]:
    """All schemes on all devices, then without those of least capacity, one fewer each time, in the cluster's order."""
    task = problem(costs, shared_block(costs), cluster.devices, workload.batch_size, [0] * len(cluster.devices))
    ranked = sorted(range(len(cluster.names)), key=lambda i: (-task.capacities[i], i))
    for count in range(len(ranked), 0, -1):
        devices = tuple(name for i, name in enumerate(cluster.names) if i in ranked[:count])
        for scheme in SCHEMES if count > 1 else (HYBRID,):
            yield devices, scheme


def _within_memory(
    workload: Workload,
    costs: Costs,
    cluster: Cluster,
    devices: Sequence[str],
    how: str,
    of: Callable[[Shares], Plan],
) -> Plan:
    """The plan of the split. What a device holds besides shared weights is what a plan is simulated to hold: first that
    of the balanced split, and then that of the one which fits beside it."""
    block, boards = shared_block(costs), [cluster.device(name) for name in devices]
    shares = even_shares(costs, len(devices))
    if how == EQUAL:
        return of(shares)
    task = problem(costs, block, boards, workload.batch_size, [0] * len(boards))
    found: Split | None = balanced(task)
    for _ in range(2):
        assert found is not None
        room = _room(of(_shares(found, shares)), costs, cluster, devices, task, found)
        task = problem(costs, block, boards, workload.batch_size, room)
        found = exact(task) if how == EXACT else heuristic(task) or exact(task)
        if found is None:
            missing = task.bytes - sum(max(0, r) for r in room)
            raise OutOfMemory(
                f"the group of {len(devices)} devices",
                task.bytes,
                task.bytes - max(1, missing),
                "for the shared weights of all layers, in whole heads and columns",
            )
    assert found is not None
    return of(_shares(found, shares))


def _shares(found: Split, even: Shares) -> Shares:
    heads, columns = found
    return Shares(tuple(heads), tuple(columns), even.tokens)


def _room(plan: Plan, costs: Costs, cluster: Cluster, devices: Sequence[str], task: Problem, found: Split) -> list[int]:
    """Bytes for shared weights on each device, beside what the plan has there."""
    peaks = estimate(plan, costs, cluster).peak_bytes
    shared = [a * task.head_bytes + b * task.column_bytes for a, b in zip(*found, strict=True)]
    return [cluster.device(name).memory_bytes - (peaks[name] - own) for name, own in zip(devices, shared, strict=True)]
