"""What planners of stages ask for, layer by layer: seconds of passes, and bytes of every range of layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from harness.cluster import Cluster
from harness.costs import DIRECTIONS, Costs
from harness.workload import OPTIMIZER_STATE_COPIES


class LayerTables:
    """Times of layers on the devices of a cluster, and their memory. `budgets`: bytes of each device, as it has them
    unless said otherwise.
    """

    def __init__(
        self, costs: Costs, cluster: Cluster, optimizer: str = "sgd", budgets: Sequence[float] | None = None
    ) -> None:
        self.costs, self.cluster = costs, cluster
        self.devices = cluster.devices
        self.budgets = [d.memory_bytes for d in self.devices] if budgets is None else list(budgets)
        self.copies = 1 + OPTIMIZER_STATE_COPIES[optimizer]
        self.num_layers = len(costs.layers)
        self._seconds: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
        self.kinds = [device.kind for device in self.devices]

    @cached_property
    def speeds(self) -> list[float]:
        """Rows per second of the whole model, of each device."""
        return [1.0 / float(sum(part[-1] for part in self.layer_seconds(d, 1))) for d in range(len(self.devices))]

    def layer_seconds(self, device: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """t_f and t_b of the first l layers of the model, l = 0 ... L, for `rows` rows."""
        key = (self.kinds[device], rows)
        if key not in self._seconds:
            each = (self.costs.layer_seconds(self.devices[device], direction, rows) for direction in DIRECTIONS)
            forward, backward = (np.concatenate(([0.0], np.cumsum(seconds))) for seconds in each)
            self._seconds[key] = forward, backward
        return self._seconds[key]

    @cached_property
    def memory(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bytes of every range of layers [x, y): those that stay, and those of one micro-batch, fixed and per row.

        As `harness.search.stage_bytes` counts them, range by range.
        """
        count = self.num_layers + 1
        stays, fixed, per_row = (np.zeros((count, count)) for _ in range(3))
        starts = [first for first, _ in self.costs.layers]
        for x in range(self.num_layers):
            parameters: set[str] = set()
            saves: set[str] = set()
            local: set[str] = set()
            standing = kept = kept_per_row = 0.0
            entering = {*self.costs.inputs, *self.costs.carried(starts[x])}
            for y in range(x, self.num_layers):
                for unit in self.costs.executed(*self.costs.layers[y]):
                    if unit.local and unit.name in local:
                        continue
                    local.add(unit.name)
                    for name in unit.parameters:
                        if name not in parameters:
                            parameters.add(name)
                            cost = self.costs.parameters[name]
                            standing += cost.bytes * (1 + self.copies * cost.trainable)
                    standing += unit.buffers_bytes
                    kept += unit.saved.fixed
                    kept_per_row += unit.saved.per_row
                    for name in unit.saves:
                        if name not in saves and (name not in entering or name in self.costs.carried(starts[x])):
                            saves.add(name)
                            tensor = self.costs.tensors[name]
                            if tensor.batchless:
                                kept += tensor.bytes(1)
                            else:
                                kept_per_row += tensor.bytes(1)
                stays[x, y + 1], fixed[x, y + 1], per_row[x, y + 1] = standing, kept, kept_per_row
        return stays, fixed, per_row

    def mean_seconds(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """As `layer_seconds`, on average over the devices: for planners that take them to be equal."""
        each = [self.layer_seconds(device, rows) for device in range(len(self.devices))]
        return np.mean([f for f, _ in each], axis=0), np.mean([b for _, b in each], axis=0)

    def boundary_bytes(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Bytes that cross the boundary in front of layer 0 ... L, forward and backward, for `rows` rows."""
        starts = [*(first for first, _ in self.costs.layers), len(self.costs.units)]
        crossing = [[self.costs.tensors[name] for name in self.costs.carried(start)] for start in starts]
        return (
            np.array([sum(t.bytes(rows) for t in tensors) for tensors in crossing], dtype=float),
            np.array([sum(t.bytes(rows) for t in tensors if t.needs_grad) for tensors in crossing], dtype=float),
        )

    @cached_property
    def weight_bytes(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of the weights of every range of layers [x, y), each once, and of those that are trained."""
        count = self.num_layers + 1
        held, trained = np.zeros((count, count)), np.zeros((count, count))
        for x in range(self.num_layers):
            seen: set[str] = set()
            for y, layer in enumerate(self.costs.layers[x:], x):
                new = [name for name in self.costs.parameters_of(*layer) if name not in seen]
                seen.update(new)
                costs = [self.costs.parameters[name] for name in new]
                held[x, y + 1] = held[x, y] + sum(cost.bytes for cost in costs)
                trained[x, y + 1] = trained[x, y] + sum(cost.bytes for cost in costs if cost.trainable)
        return held, trained

    def bytes(self, rows: int, in_flight: int) -> np.ndarray:
        """m_d of every range of layers [x, y), with so many micro-batches of `rows` rows in flight."""
        stays, fixed, per_row = self.memory
        return stays + in_flight * (fixed + per_row * rows)
