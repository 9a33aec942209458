"""What follows PAC's first epoch: weights and cached activations are handed out, then the side network trains alone.

Section 5.1: every device gets all trained weights, and of the cache what belongs to the rows that it will train on.
From then on devices are replicas that read from the cache; the frozen weights are released.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import Unsupported
from harness.moves import hand_out
from harness.plan import Action, Free, Load, Phase, Plan, Recv, Send, Store, Value
from harness.plan.values import Range
from harness.schedules import Pipeline, Stage, micro_batches
from harness.search import fastest, micro_batch_sizes
from harness.workload import Workload


def with_cache(first: Plan, workload: Workload, costs: Costs, cluster: Cluster, shares: Sequence[float]) -> Plan:
    """The plan of the first epoch, which stores, and of all further ones, which load.

    The size of micro-batch is the one with which handing out and cached epochs together are fastest: where it is that
    of the first epoch, and one group did all of it, nothing has to be handed out. Raises OutOfMemory when none fits.
    """
    later = replace(workload, epochs=workload.epochs - 1)
    sizes = micro_batch_sizes(workload.batch_size)
    candidates = [partial(_cached, first, later, costs, cluster, shares, size) for size in sizes]
    plan = fastest(candidates, costs, cluster)
    return replace(plan, phases=(*first.phases, *plan.phases), summary={**first.summary, **_size(plan)})


def from_kept_cache(
    workload: Workload, costs: Costs, cluster: Cluster, shares: Sequence[float], micro_batch_size: object
) -> Plan:
    """The plan whose epochs all load what an earlier run has stored: no device ever has the frozen weights.

    Of each batch a device needs the rows that it had then, which `micro_batch_size` and `shares` decide.
    """
    stage = Stage((0, len(costs.units)), cluster.names, tuple(shares))
    clip = workload.clip_norm is not None
    whole = Pipeline(costs, (stage,), workload.optimizer, clip=clip).tensors
    frozen = {name: tensor for name, tensor in whole.items() if name.startswith("frozen@")}  # what weights@ are without
    pipeline = Pipeline(costs.cached, (stage,), workload.optimizer, clip=clip)

    def candidate(size: int) -> Plan:
        tensors = {**frozen, **pipeline.tensors}
        return Plan("pac", len(costs.units), tensors, tuple(_epochs(pipeline, workload, size)))

    sizes = micro_batch_sizes(workload.batch_size, micro_batch_size)
    plan = fastest([partial(candidate, size) for size in sizes], costs, cluster)
    rows = [high - low for low, high in stage.rows(plan.phases[0].micro_batches[0])]
    devices = list(cluster.names)
    return replace(plan, summary={"grouping": [len(devices)], "devices": [devices], "rows": [rows], **_size(plan)})


def _size(plan: Plan) -> dict[str, object]:
    """For the summary: the size of micro-batch of the cached epochs."""
    return {"cached_micro_batch_size": next(phase for phase in plan.phases if phase.cached).micro_batches[0]}


def _cached(first: Plan, later: Workload, costs: Costs, cluster: Cluster, shares: Sequence[float], size: int) -> Plan:
    """What comes after the first epoch, with all tensors of both."""
    regions = tuple(sorted({shard.units for shard in first.phases[0].shards.values()}))
    apart = tuple(name.removeprefix("weights:") for name in first.tensors if name.startswith("weights:"))
    stage = Stage((0, len(costs.units)), cluster.names, tuple(shares))
    pipeline = Pipeline(
        costs.cached, (stage,), later.optimizer, clip=later.clip_norm is not None, regions=regions, apart=apart
    )
    trained = list(_epochs(pipeline, later, size))
    epochs = {phase.batch_size: phase for phase in trained}
    moved = (_hand_out_cache(phase, epochs[phase.batch_size]) for phase in first.phases)
    tensors = {**first.tensors, **pipeline.tensors}
    # Each device gets the trained weights that it lacks, and their optimizer's state, and releases the frozen ones.
    weights = hand_out("hand out weights", first.phases[-1].live, trained[0].live, tensors)
    return replace(first, tensors=tensors, phases=(weights, *filter(None, moved), *trained))


def _epochs(pipeline: Pipeline, workload: Workload, size: int) -> Iterator[Phase]:
    """The workload's epochs from the cache, in micro-batches of this size."""
    if any(tensor.kind == "buffers" and name != "norm" for name, tensor in pipeline.tensors.items()):
        raise Unsupported("buffers beside the backbone can't be handed out")
    made: dict[tuple[int, int], Phase] = {}
    for batch_size, repeat in workload.batches():
        if (batch_size, repeat) not in made:
            batches = micro_batches(batch_size, size)
            made[batch_size, repeat] = pipeline.phase(batches, [1], "cached epoch", repeat)
        yield made[batch_size, repeat]


def _hand_out_cache(before: Phase, after: Phase) -> Phase | None:
    """Of each batch of the first epoch, what devices have stored goes to those that will train on it.

    None where every device has stored just what it will need.
    """
    actions: dict[str, list[Action]] = {device: [] for device in before.actions}
    starts = [0, *accumulate(before.micro_batches)]
    wanted = {device: list(_rows(after, device)) for device in before.actions}
    for m, start in enumerate(starts[:-1]):
        for device, listed in before.actions.items():
            low, high = before.shards[device].micro_batch_rows[m]
            away = [
                (peer, (max(low, a - start), min(high, b - start)))
                for peer, ranges in wanted.items()
                if peer != device
                for a, b in ranges
                if max(low, a - start) < min(high, b - start)
            ]
            if not away:
                continue
            names = [a.value.name for a in listed if isinstance(a, Store) and a.value.micro_batch == m]
            for name in names:
                whole = Value(name, m, (low, high))
                actions[device].append(Load(whole))
                for peer, rows in away:
                    piece = Value(name, m, rows)
                    actions[device].append(Send(piece, peer))
                    actions[peer] += (Recv(piece, device), Store(piece), Free((piece,)))
                actions[device].append(Free((whole,)))
    if not any(actions.values()):
        return None
    return Phase(
        name="hand out cache",
        micro_batches=before.micro_batches,
        shards={},
        actions={device: tuple(listed) for device, listed in actions.items()},
        live=after.live,
        repeat=before.repeat,
        training=False,  # batch by batch: what arrives faster than it is stored must not pile up
    )


def _rows(phase: Phase, device: str) -> Iterator[Range]:
    """Rows of the batch that the device trains on."""
    starts = [0, *accumulate(phase.micro_batches)]
    for start, (low, high) in zip(starts, phase.shards[device].micro_batch_rows, strict=False):
        if low < high:
            yield start + low, start + high
