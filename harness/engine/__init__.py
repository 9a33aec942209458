"""The plan for real: torch tensors, threads and sockets do what the simulator does in virtual time."""

from __future__ import annotations

import time

import torch

from harness.engine.model_shard import ModelShard
from harness.engine.program import programs
from harness.engine.report import DeviceReport, Execution, execution
from harness.engine.worker import Worker
from harness.errors import OrreryError
from harness.models.layered import Layered
from harness.plan import Plan
from harness.samples import Dataset
from harness.workload import Workload

__all__ = ["DeviceReport", "Execution", "ModelShard", "Worker", "execute", "execution", "programs"]


def execute(plan: Plan, workload: Workload, layered: Layered, dataset: Dataset) -> Execution:
    """Run the plan of a single device in this process. `layered` is trained in place.

    Before the clock starts one iteration is rehearsed without its update: it warms up, and it is watched tensor
    by tensor for the memory columns. Raises OrreryError for a data set that is smaller than the workload says.
    """
    check_samples(workload, dataset)
    (device,) = plan.devices
    shard = ModelShard(layered, workload, plan, torch.device("cpu"))
    worker = Worker(device, plan, programs(plan, device), workload, shard, dataset)
    worker.start()
    try:
        memory = worker.rehearse()
        report = worker.run(time.perf_counter(), memory)
    finally:
        worker.stop()
    return execution(plan, [report], workload.training)


def check_samples(workload: Workload, dataset: Dataset) -> None:
    """Refuse a data set that is smaller than what was planned for."""
    if len(dataset) < workload.num_samples:
        raise OrreryError(
            f"The data set {workload.dataset} has {len(dataset)} training samples here, and the run was planned for "
            f"{workload.num_samples}. Pass --num-samples {len(dataset)}."
        )
