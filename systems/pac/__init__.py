"""PAC (Pluto and Charon): hybrid data and pipeline parallelism, parallel adapters, cached activations.

The first epoch trains under the planner's hybrid plan and stores what the frozen backbone computes for each sample.
Then the trained weights and those activations are handed out, and further epochs train what is beside the backbone, by
data parallelism, from the cache (sections 4 and 5).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import OrreryError, Unsupported
from harness.plan import Plan
from harness.schedules import Stage, micro_batches
from harness.search import Layout, fastest, layer_stacks, plan_pipeline
from harness.workload import Workload
from systems.pac.cache import from_kept_cache, with_cache
from systems.pac.planner import EVEN, SHARES, SPEED, Profile, Split, best_split

EQUATIONS, SIMULATION = CHOICES = ("equations", "simulation")
#: `micro_batch_size`: of the first epoch. `shares`: of a micro-batch's rows within a group, "even" as in the paper, or
#: by "speed". `grouping`: devices per stage, as in "2-1-1", instead of the planner's choice. `whole_stacks`: a stage of
#: several holds layers of the encoder or of the decoder, as in the authors' code; the paper's equations know no such
#: rule. `choose`: the number of stages by "equations" 4 to 6 as in the paper, or by "simulation" of the plans of all.
#: `cache`: epochs after the first read what the backbone makes. `kept_cache`: all epochs do, from what an earlier run
#: has left in --cache-dir; then `micro_batch_size` is theirs.
OPTIONS: dict[str, object] = {
    "micro_batch_size": None,
    "shares": EVEN,
    "grouping": None,
    "whole_stacks": False,
    "choose": EQUATIONS,
    "cache": True,
    "kept_cache": False,
}
VARIANTS = {"shares": [EVEN, SPEED]}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """The hybrid plan of equations 2 to 6, for the micro-batch size with which it is fastest."""
    caches = _caches(workload, costs, options["cache"], options["kept_cache"])
    shares, grouping = options["shares"], _grouping(options["grouping"], cluster)
    if shares not in SHARES:
        raise OrreryError(f"pac.shares is {shares!r}; it must be one of {', '.join(SHARES)}.")
    if options["choose"] not in CHOICES:
        raise OrreryError(f"pac.choose is {options['choose']!r}; it must be one of {', '.join(CHOICES)}.")
    together = _together(costs) if options["whole_stacks"] else None
    profile = Profile(costs, cluster, workload.optimizer, str(shares), together=together)
    boundless = Profile(
        costs, cluster, workload.optimizer, str(shares), [np.inf] * len(cluster.devices), together=together
    )

    def layout(size: int, num_stages: int | None = None) -> Layout:
        count = len(micro_batches(workload.batch_size, size))
        found = best_split(profile, size, count, grouping, num_stages) or best_split(
            boundless, size, count, grouping, num_stages
        )
        if found is None:
            raise Unsupported(
                f"micro-batches of {size} rows and {len(costs.layers)} layers don't make stages of "
                f"{options['grouping'] or f'{len(cluster.devices)} devices in all'}: each device needs a row, and each "
                "stage a layer"
            )
        return stages(profile, found), lambda count: [len(found.groups) - p for p in range(len(found.groups))]

    everybody = profile.weights(0, len(cluster.devices))
    if options["kept_cache"]:
        return from_kept_cache(workload, costs, cluster, everybody, options["micro_batch_size"])
    asked = replace(workload, epochs=1) if caches else workload

    def hybrid(num_stages: int | None = None) -> Plan:
        found = partial(layout, num_stages=num_stages)
        return plan_pipeline("pac", asked, costs, cluster, found, options, store=caches)

    if options["choose"] == EQUATIONS:
        first = hybrid()
    else:
        first = fastest([partial(hybrid, count + 1) for count in range(len(cluster.devices))], costs, cluster)
    return with_cache(first, workload, costs, cluster, everybody) if caches else first


def _caches(workload: Workload, costs: Costs, asked: object, kept: object) -> bool:
    """Whether epochs will read from the cache."""
    for name, value in (("cache", asked), ("kept_cache", kept)):
        if type(value) is not bool:
            raise OrreryError(f"pac.{name} is {value!r}; it must be true or false.")
    if kept and not (asked and costs.training):
        raise OrreryError("pac.kept_cache trains from a cache: set pac.cache to true, and choose parallel-adapters.")
    if not kept and (not asked or not costs.training or workload.steps is not None or workload.epochs == 1):
        return False
    if workload.technique != "parallel-adapters":
        raise Unsupported(
            f"the technique {workload.technique} changes what the backbone makes, so nothing of it can be cached: "
            "choose parallel-adapters, or set pac.cache to false"
        )
    return True


def stages(profile: Profile, found: Split) -> list[Stage]:
    """The split as stages of the pipeline."""
    names, layers = profile.cluster.names, profile.costs.layers
    made = []
    for (x, y), (first, last) in zip(found.layers, found.devices(), strict=True):
        units = layers[x][0], layers[y - 1][1]
        made.append(Stage(units, names[first:last], tuple(profile.weights(first, last))))
    return made


def _grouping(asked: object, cluster: Cluster) -> Sequence[int] | None:
    """The numbers of "2-1-1"; a single stage may be a plain number."""
    if asked is None:
        return None
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", str(asked)):
        raise OrreryError(f"pac.grouping is {asked!r}; it must be the number of devices in each stage, as in '2-1-1'.")
    sizes = [int(size) for size in str(asked).split("-")]
    if sum(sizes) != len(cluster.devices):
        found = f"pac.grouping is {asked!r}, {sum(sizes)} devices"
        raise OrreryError(f"{found}, and {cluster.name} has {len(cluster.devices)}.")
    return sizes


def _together(costs: Costs) -> np.ndarray:
    """Which ranges of layers [x, y) lie in one stack."""
    stacks = layer_stacks(costs)
    count = len(stacks) + 1
    together = np.ones((count, count), dtype=bool)
    for x in range(len(stacks)):
        for y in range(x + 1, count):
            together[x, y] = len(set(stacks[x:y])) == 1
    return together
