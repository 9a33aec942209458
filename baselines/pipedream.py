"""PipeDream's planner (SOSP'19) on synchronous 1F1B: replicated stages whose slowest is fastest, for equal workers.

From the released optimizer, with one level of machines: `stages` is its dynamic program. A stage of m workers is said
to take (t + 4 (m-1)/m W/b) / m for each micro-batch: as if its replicas took micro-batches in turn, and summed
gradients after each of them. Here they share the rows of each micro-batch, equally, and sum gradients once a batch.

Assumed, where PipeDream knows but one kind of worker: a layer takes the mean of its times on the devices, each link is
as fast as the slowest, each memory as large as the smallest; stages take devices in rank order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import OrreryError
from harness.layer_tables import LayerTables
from harness.plan import Plan
from harness.schedules import Stage
from harness.search import Layout, balanced_groups, grouped_stages, plan_pipeline, too_few
from harness.workload import Workload

#: transfers: a stage is no faster than what it receives, and hands on. memory: stages whose stashed weights and
#: activations don't fit are none. Both are off unless asked for in the released optimizer, too.
OPTIONS: dict[str, object] = {"micro_batch_size": None, "transfers": False, "memory": False}


def plan(workload: Workload, costs: Costs, cluster: Cluster, options: Mapping[str, object]) -> Plan:
    """The dynamic program's stages for the micro-batch size with which they simulate fastest."""
    transfers, memory = (_truth(options, name) for name in ("transfers", "memory"))

    def layout(size: int) -> Layout:
        found = stages(workload, costs, cluster, size, transfers, memory)
        kept = in_flight(found)
        return found, lambda count: kept

    return plan_pipeline("pipedream", workload, costs, cluster, layout, options)


def stages(
    workload: Workload, costs: Costs, cluster: Cluster, rows: int, transfers: bool = False, memory: bool = False
) -> list[Stage]:
    """What PipeDream's dynamic program makes of micro-batches of `rows` rows.

    Where no stages fit by its account of `memory`, those are taken that need not: what they lack is for the simulator
    to say.
    """
    tables = LayerTables(costs, cluster, workload.optimizer)
    seconds = Seconds(tables, rows, transfers, memory)
    devices = len(cluster.devices)
    found = balanced_groups(seconds, tables.num_layers, devices)
    if found is None:
        found = balanced_groups(Seconds(tables, rows, transfers), tables.num_layers, devices)
    if found is None:
        raise too_few(rows, tables.num_layers, devices)
    return grouped_stages(costs, cluster, found)


class Seconds:
    """Of every range of layers [x, y) the seconds per micro-batch as a stage of `size` devices, `behind` behind it."""

    def __init__(self, tables: LayerTables, rows: int, transfers: bool = False, memory: bool = False) -> None:
        self.rows = rows
        total = np.add(*tables.mean_seconds(rows))
        rate = min(tables.cluster.bandwidth.values())
        crossing = np.add(*tables.boundary_bytes(rows)) / rate
        weights, trained = tables.weight_bytes
        self.compute = total[None, :] - total[:, None]
        self.compute[np.tril_indices(len(total))] = np.inf
        self.reduce = 2 * 2 * trained / rate
        self.transfers = np.maximum(crossing[:, None], crossing[None, :]) * transfers
        self.transfers[0] = 0.0  # what the first stage hands on counts for the next one only
        self.stashed, self.room = np.zeros_like(weights), min(tables.budgets)
        if memory:
            _, fixed, per_row = tables.memory
            self.stashed = weights + fixed + per_row * rows

    def __call__(self, size: int, behind: int) -> np.ndarray:
        if size > self.rows:
            return np.full_like(self.compute, np.inf)
        seconds = np.maximum(self.compute + (size - 1) / size * self.reduce, self.transfers) / size
        seconds[-(-behind // size) * self.stashed > self.room] = np.inf
        return seconds


def in_flight(made: Sequence[Stage]) -> list[int]:
    """Micro-batches that each stage keeps in flight: as many as there are devices from it on.

    In PipeDream each of m replicas keeps that number / m, rounded up (NUM_OPT_ACTIVE_MINIBATCHES at the first stage),
    of whole micro-batches. Where replicas share the rows of all, they have as many rows in flight with this number.
    """
    sizes = [len(stage.devices) for stage in made]
    return [sum(sizes[p:]) for p in range(len(sizes))]


def _truth(options: Mapping[str, object], name: str) -> bool:
    value = options[name]
    if not isinstance(value, bool):
        raise OrreryError(f"pipedream.{name} is {value!r}; it must be true or false.")
    return value
