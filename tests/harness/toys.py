"""Chains of equal units whose costs are round numbers, so that closed forms can be written down."""

from __future__ import annotations

import math

from harness.cluster import OPERATOR_CLASSES, Cluster, Device
from harness.costs import Affine, Costs, ParameterCost, TensorCost, UnitCost, Work

#: Bytes that every unit keeps per row, and the width of the hidden tensor (float32, so 4 bytes each).
SAVED, WIDTH = 1000, 16


def chain(
    num_layers: int,
    forward_flops: float = 1e9,
    backward_flops: float = 2e9,
    parameters: int = 840,
    width: int = WIDTH,
    tied: bool = False,
    training: bool = True,
) -> Costs:
    """One unit per layer, each handing one hidden tensor on. `tied`: the last layer uses the first one's weight too."""
    units, tensors = [], {"x": TensorCost(1, 1, 8, needs_grad=False)}
    weights = {f"w{i}": ParameterCost(parameters, 4, trainable=training) for i in range(num_layers)}
    for i in range(num_layers):
        tensors[f"h{i}"] = TensorCost(1, width, 4, needs_grad=training)
        held = (f"w{i}", "w0") if tied and i == num_layers - 1 and i else (f"w{i}",)
        units.append(
            UnitCost(
                name=f"unit{i}",
                layer=i,
                kind="mlp",
                reads=(f"h{i - 1}" if i else "x",),
                writes=(f"h{i}",),
                forward=Work(matmul=Affine(0, forward_flops)),
                backward=Work(matmul=Affine(0, backward_flops if training else 0)),
                saved=Affine(0, SAVED if training else 0),
                saves=(f"h{i - 1}",) if i and training else (),
                forward_workspace=Affine(),
                backward_workspace=Affine(),
                parameters=held,
            )
        )
    return Costs("toy", tuple(units), (), tensors, weights, ("x",), training)


def cluster(
    count: int,
    bandwidth: float = 1e6,
    latency_s: float = 0.0,
    duplex: str = "full",
    memory_bandwidth: float = math.inf,
    speeds: tuple[float, ...] = (),
    memory_bytes: int = 10**12,
) -> Cluster:
    """Devices of 1 GFLOP/s (times their speed); instantaneous memory unless a bandwidth is given."""
    devices = tuple(
        Device(
            name=f"device{i}",
            profile="toy",
            rates=dict.fromkeys(OPERATOR_CLASSES, (1e9 * speed, 1e9 * speed)),
            kernel_overhead_s=0.0,
            memory_bytes=memory_bytes,
            memory_bandwidth=memory_bandwidth,
            storage_read=1e6,
            storage_write=5e5,
        )
        for i, speed in enumerate(speeds or (1.0,) * count)
    )
    return Cluster("toy", devices, {d.name: bandwidth for d in devices}, latency_s, duplex)
