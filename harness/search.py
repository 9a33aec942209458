"""What every planner shares: balanced cuts, and one search over micro-batch sizes under the memory budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from harness.cluster import Cluster
from harness.costs import BACKWARD, FORWARD, Costs
from harness.errors import OrreryError, OutOfMemory, Unsupported, unknown_name
from harness.plan import Phase, Plan
from harness.plan.values import Range
from harness.schedules import Pipeline, Stage, micro_batches
from harness.simulator import PICOSECONDS, demands, estimate
from harness.trace import Trace
from harness.workload import OPTIMIZER_STATE_COPIES, Workload

#: What straight stages are balanced by: the time of a pass on the device of each, that on the average device as if all
#: were equal, or the number of layers.
TIME, MEAN_TIME, LAYERS = CUTS = ("time", "mean-time", "layers")
#: The stages, and the warm-up count of each for a number of micro-batches.
Layout = tuple[Sequence[Stage], Callable[[int], Sequence[int]]]
#: Layers [x, y), by number, and how many devices have them.
Group = tuple[Range, int]


def balanced_cuts(
    costs: Costs,
    cluster: Cluster,
    devices: Sequence[str],
    rows: int,
    memory: Callable[[int, int, int], float] | None = None,
    by: str = TIME,
) -> list[Range] | None:
    """Contiguous layer ranges, one per device in order, whose slowest pass is as fast as possible.

    Exact: a dynamic program over (layers, devices) on the time of forward plus backward for `rows` rows; `by`
    "mean-time", on its average over the cluster; or, `by` "layers", on the number of the model's own layers, as
    `blocks` has them. Given `memory(stage, first unit, last unit)` in bytes, only stages that fit their device count;
    None when none do.
    Returns unit ranges. Raises Unsupported with fewer layers than devices.
    """
    layers = blocks(costs) if by == LAYERS else costs.layers
    if len(layers) < len(devices):
        raise Unsupported(f"{len(devices)} stages need as many layers, and the model has {len(layers)}")
    edges = [layers[0][0], *(last for _, last in layers)]
    directions = (FORWARD, BACKWARD) if costs.training else (FORWARD,)
    boards = {board.kind: board for board in cluster.devices}

    @cache
    def load(kind: str, first: int, last: int) -> float:
        if by == LAYERS:
            return float(last - first)
        timed = cluster.devices if by == MEAN_TIME else (boards[kind],)
        units = edges[first], edges[last]
        return sum(costs.seconds(b, *units, d, rows) for b in timed for d in directions) / len(timed)

    # slowest[l]: best slowest stage for the first l layers on the devices so far; cut[d][l]: where the last one begins.
    slowest = [0.0] + [float("inf")] * len(layers)
    cut: list[list[int]] = []
    for stage, device in enumerate(devices):
        board = cluster.device(device)
        following, begins = [float("inf")] * (len(layers) + 1), [0] * (len(layers) + 1)
        for last in range(1, len(layers) + 1):
            better: list[tuple[float, int]] = [(float("inf"), 0)]  # the longer the last stage, the better
            for first in range(last - 1, -1, -1):
                alone = load(board.kind, first, last)
                if max(slowest[first], alone) < better[-1][0]:
                    better.append((max(slowest[first], alone), first))
                if alone > better[-1][0]:
                    break
            # Longer ranges need more memory: what fits is asked of the best first, because it is slow to tell.
            following[last], begins[last] = next(
                (
                    (reached, first)
                    for reached, first in reversed(better[1:])
                    if memory is None or memory(stage, edges[first], edges[last]) <= board.memory_bytes
                ),
                better[0],
            )
        slowest = following
        cut.append(begins)
    if slowest[-1] == float("inf"):
        return None
    ranges: list[Range] = []
    last = len(layers)
    for begins in reversed(cut):
        ranges.append((edges[begins[last]], edges[last]))
        last = begins[last]
    return ranges[::-1]


def balanced_groups(seconds: Callable[[int, int], np.ndarray], num_layers: int, num_devices: int) -> list[Group] | None:
    """Layers [x, y) and number of devices of each stage, on all devices, whose slowest stage is as fast as possible.

    Exact: a dynamic program over (layers, devices). `seconds(size, behind)[x, y]` is the time of the layers [x, y) as a
    stage of `size` devices with `behind` devices in the stages behind it, infinite where it can't be one. Ties go to
    the stage that begins first, then to the smaller one. None: no such stages can be.
    """
    # slowest[n, y]: best slowest stage for the first y layers on n devices; chosen[n, y]: where the last one begins and
    # its size, as one number.
    slowest = np.full((num_devices + 1, num_layers + 1), np.inf)
    slowest[0, 0] = 0.0
    chosen = np.zeros(slowest.shape, dtype=int)
    for n in range(1, num_devices + 1):
        stages = np.stack([seconds(size, num_devices - n) for size in range(1, n + 1)], axis=1)  # [x, size, y]
        reached = np.maximum(slowest[:n][::-1].T[:, :, None], stages).reshape(-1, num_layers + 1)
        chosen[n] = reached.argmin(axis=0)
        slowest[n] = reached[chosen[n], np.arange(num_layers + 1)]
    if slowest[num_devices, num_layers] == np.inf:
        return None
    found: list[Group] = []
    n, last = num_devices, num_layers
    while n:
        first, size = divmod(int(chosen[n, last]), n)
        found.append(((first, last), size + 1))
        n, last = n - size - 1, first
    return found[::-1]


def grouped_stages(costs: Costs, cluster: Cluster, groups: Sequence[Group]) -> list[Stage]:
    """One stage per group, on devices in rank order, which share the rows of each micro-batch equally."""
    edges = [0, *accumulate(size for _, size in groups)]
    return [
        Stage((costs.layers[x][0], costs.layers[y - 1][1]), cluster.names[first:last], (1.0,) * (last - first))
        for ((x, y), _), (first, last) in zip(groups, pairwise(edges), strict=True)
    ]


def too_few(rows: int, layers: int, devices: int) -> Unsupported:
    """Why stages can't be made."""
    return Unsupported(
        f"micro-batches of {rows} rows and {layers} layers don't make stages of {devices} devices in all: each device "
        "needs a row, and each stage a layer"
    )


def blocks(costs: Costs) -> list[Range]:
    """Unit ranges of the layers that a model is said to have: with the embedding in front of one, or the head after."""
    ranges: list[Range] = []
    first = 0
    for begin, last in costs.layers:
        kinds = {unit.kind for unit in costs.units[begin:last]}
        if "embedding" in kinds:
            continue
        if "head" in kinds and ranges:
            ranges[-1] = ranges[-1][0], last
        else:
            ranges.append((first, last))
        first = last
    return ranges


def layer_stacks(costs: Costs) -> list[str]:
    """Of each layer the stack that it belongs to: "encoder" or "decoder", which the head joins; else all are one."""
    stacks: list[str] = []
    for first, _ in costs.layers:
        stack = costs.units[first].name.partition(".")[0]
        stacks.append(stack if stack in ("encoder", "decoder") else stacks[-1] if stacks else "")
    return stacks


def straight_stages(
    workload: Workload,
    costs: Costs,
    cluster: Cluster,
    rows: int,
    warmup: Callable[[int], Sequence[int]],
    whole_stacks: bool = False,
    cuts: object = TIME,
    copies: Sequence[int] = (),
) -> list[Stage]:
    """One stage per device in rank order, balanced by `cuts` among the cuts that fit the devices' memory.

    Where each stage has so many `copies` of what is trained, or of its gradients, what is in flight are whole batches.
    Where no cut seems to fit, the balanced one is taken: what it lacks is for the simulator to say. With `whole_stacks`
    a stage of several has layers of the encoder or of the decoder, as far as there are stages for both.
    """
    if cuts not in CUTS:
        raise unknown_name("way to cut the model", str(cuts), CUTS)
    count = len(micro_batches(workload.batch_size, rows))
    in_flight = [ahead if copies else min(ahead, count) for ahead in warmup(count)]
    versions = copies or [1] * len(in_flight)
    stacks = layer_stacks(costs)
    of_unit = [stack for (first, last), stack in zip(costs.layers, stacks, strict=True) for _ in range(first, last)]
    directions = (FORWARD, BACKWARD) if costs.training else (FORWARD,)
    whole = whole_stacks and 1 < len(set(stacks)) <= len(cluster.devices)

    def shape(stage: int, first: int, last: int) -> float:
        return float("inf") if whole and of_unit[first] != of_unit[last - 1] else 0.0

    def memory(stage: int, first: int, last: int) -> float:
        return shape(stage, first, last) or stage_bytes(
            costs, workload.optimizer, first, last, rows, in_flight[stage], versions[stage]
        )

    def generous(stage: int, first: int, last: int) -> float:
        """With what a pass makes on its way, as if that came on top of the most that is kept."""
        standing = memory(stage, first, last)
        if standing > cluster.devices[stage].memory_bytes:
            return standing
        return standing + max(costs.workspace(first, last, direction, rows) for direction in directions)

    def balanced(needed: Callable[[int, int, int], float]) -> list[Range] | None:
        return balanced_cuts(costs, cluster, cluster.names, rows, needed, str(cuts))

    found = balanced(shape)
    assert found is not None
    if any(generous(p, *units) > cluster.devices[p].memory_bytes for p, units in enumerate(found)):
        found = balanced(generous) or balanced(memory) or found
    return [Stage(units, (device,), (1,)) for units, device in zip(found, cluster.names, strict=True)]


def stage_bytes(
    costs: Costs, optimizer: str, first: int, last: int, rows: int, in_flight: int, versions: int = 1
) -> float:
    """Weights, of those that are trained so many `versions`, gradients, optimizer state, buffers, and what `in_flight`
    micro-batches of `rows` keep or hand on."""
    weights, trained = costs.weight_bytes(first, last)
    handed = [name for name in costs.carried(first) if name in costs.saves(first, last)]
    kept = costs.saved(first, last).at(rows) + sum(costs.tensors[name].bytes(rows) for name in handed)
    copies = versions + OPTIMIZER_STATE_COPIES[optimizer]
    return weights + copies * trained + costs.buffers_bytes(first, last) + in_flight * kept


def micro_batch_sizes(batch_size: int, asked: object = None) -> list[int]:
    """Powers of two up to the batch and the batch itself; or just the size that was asked for."""
    if asked is not None:
        if type(asked) is not int or not 1 <= asked <= batch_size:
            raise OrreryError(f"micro_batch_size is {asked!r}; it must be a whole number from 1 to {batch_size}.")
        return [asked]
    sizes = {batch_size}
    size = 1
    while size < batch_size:
        sizes.add(size)
        size *= 2
    return sorted(sizes, reverse=True)


@dataclass(frozen=True)
class Draft:
    """A plan that is made where it may be the fastest: the whole run takes at least `least_seconds()`."""

    least_seconds: Callable[[], float]
    made: Callable[[], Plan]


class Estimated(NamedTuple):
    """What the whole run takes, and the plan that does it."""

    seconds: float
    plan: Plan


def plan_pipeline(
    method: str,
    workload: Workload,
    costs: Costs,
    cluster: Cluster,
    layout: Callable[[int], Layout],
    options: Mapping[str, object],
    store: bool = False,
) -> Plan:
    """The fastest plan that fits among the micro-batch sizes: the same search for every method.

    `layout(micro-batch size)` is what the method decides. With `store` what the frozen part makes is stored.
    `options["micro_batch_size"]` fixes the size. Ties go to the larger micro-batch.
    Raises OutOfMemory when none fits: the worst device of the candidate that misses least.
    """
    sizes = micro_batch_sizes(workload.batch_size, options.get("micro_batch_size"))

    def candidate(size: int) -> Draft:
        stages, warmup = layout(size)
        clip = workload.clip_norm is not None
        pipeline = Pipeline(costs, tuple(stages), workload.optimizer, clip=clip, store=store)
        return Draft(
            partial(least_seconds, pipeline, workload, size, warmup, cluster),
            partial(_plan, method, workload, pipeline, size, warmup),
        )

    return fastest([partial(candidate, size) for size in sizes], costs, cluster)


def fastest(candidates: Sequence[Callable[[], Plan | Draft | Estimated]], costs: Costs, cluster: Cluster) -> Plan:
    """The plan that simulates fastest of those that fit, the first of equals.

    Raises OutOfMemory when none fits, for the one that misses least; Unsupported when no candidate can be made.
    """
    best: Estimated | None = None
    misses: list[OutOfMemory] = []
    reasons: list[Unsupported] = []
    for candidate in candidates:
        try:
            found = candidate()
            if isinstance(found, Draft):
                if best is not None and found.least_seconds() >= best.seconds:
                    continue
                found = found.made()
            if isinstance(found, Plan):
                found = estimated(found, costs, cluster)
        except OutOfMemory as miss:
            misses.append(miss)
        except Unsupported as reason:
            reasons.append(reason)
        else:
            if best is None or found.seconds < best.seconds:
                best = found
    if best is not None:
        return best.plan
    if misses:
        raise _least(misses)
    raise reasons[0]


def first_fitting(candidates: Iterable[Callable[[], Plan]], costs: Costs, cluster: Cluster) -> Estimated:
    """The first plan that fits. Raises OutOfMemory when none does, for the one that misses least."""
    misses: list[OutOfMemory] = []
    for candidate in candidates:
        try:
            return estimated(candidate(), costs, cluster)
        except OutOfMemory as miss:
            misses.append(miss)
    raise _least(misses)


def estimated(plan: Plan, costs: Costs, cluster: Cluster) -> Estimated:
    """The plan and its time. Raises OutOfMemory where it does not fit."""
    trace = estimate(plan, costs, cluster)
    excess = overflow(trace, cluster)
    if excess is not None:
        raise excess
    return Estimated(weighted_seconds(plan, trace), plan)


def _least(misses: Sequence[OutOfMemory]) -> OutOfMemory:
    return min(misses, key=_missing)


def _missing(miss: OutOfMemory) -> int:
    return miss.needed_bytes - miss.available_bytes


def overflow(trace: Trace, cluster: Cluster) -> OutOfMemory | None:
    """The device that misses most memory, if any does."""
    misses = [
        OutOfMemory(name, peak, cluster.device(name).memory_bytes)
        for name, peak in trace.peak_bytes.items()
        if peak > cluster.device(name).memory_bytes
    ]
    return max(misses, key=_missing, default=None)


def weighted_seconds(plan: Plan, trace: Trace) -> float:
    """Seconds of the whole run, from the last estimated iteration of each distinct phase."""
    distinct = list({id(phase): phase for phase in plan.phases}.values())
    seconds = {id(phase): seen.iteration_s[-1] for phase, seen in zip(distinct, trace.phases, strict=True)}
    return sum(seconds[id(phase)] * phase.repeat for phase in plan.phases)


def least_seconds(
    pipeline: Pipeline, workload: Workload, size: int, warmup: Callable[[int], Sequence[int]], cluster: Cluster
) -> float:
    """What `weighted_seconds` of the plan can't be less than, told from iterations of a single micro-batch.

    A device does its passes one after the other. In training they may begin when the last pass of the iteration before
    has ended: that is one of the first stage, to which the gradients of all others flow, and whose devices wait for
    each other's. What else that iteration does until its end, and this one thus may do before it is counted, is the
    update, and something of it is always under way: it takes no longer than all of it one after the other. Where that
    is not so, because a gradient stops on its way or results are stored, nothing is said.
    """
    costs = pipeline.costs
    flows = all(any(costs.tensors[name].needs_grad for name in costs.carried(s.units[0])) for s in pipeline.stages[1:])
    if costs.training and (pipeline.store or not flows):
        return 0.0
    runs = [(Counter(micro_batches(batch_size, size)), repeat) for batch_size, repeat in workload.batches()]
    counts = sorted({count for batches, _ in runs for count in batches})
    single = tuple(pipeline.phase((count,), warmup(1)) for count in counts)
    asked = dict(zip(counts, demands(_whole("", pipeline, single), costs, cluster), strict=True))
    rest = max(demand.rest for demand in asked.values())
    least = 0.0
    for batches, repeat in runs:
        passes = (
            sum(asked[count].passes[device] * times for count, times in batches.items()) for device in pipeline.devices
        )
        least += max(0, max(passes) - rest) / PICOSECONDS * repeat
    return least


def _plan(
    method: str, workload: Workload, pipeline: Pipeline, size: int, warmup: Callable[[int], Sequence[int]]
) -> Plan:
    built: dict[tuple[int, int], Phase] = {}
    phases: list[Phase] = []
    kind = "train" if pipeline.costs.training else "infer"
    for batch_size, repeat in workload.batches():
        if (batch_size, repeat) not in built:
            batches = micro_batches(batch_size, size)
            name = kind if batch_size == workload.batch_size else f"{kind} last batch"
            built[batch_size, repeat] = pipeline.phase(batches, warmup(len(batches)), name, repeat)
        phases.append(built[batch_size, repeat])
    about = summary(pipeline.costs, pipeline.stages, size, phases[0])
    return replace(_whole(method, pipeline, tuple(phases)), summary=dict(about))


def _whole(method: str, pipeline: Pipeline, phases: tuple[Phase, ...]) -> Plan:
    return Plan(method=method, num_units=len(pipeline.costs.units), tensors=pipeline.tensors, phases=phases)


def summary(costs: Costs, stages: Sequence[Stage], size: int, phase: Phase) -> Iterator[tuple[str, object]]:
    """What a record says of a pipeline with micro-batches of `size` rows."""
    yield "grouping", [len(stage.devices) for stage in stages]
    yield "devices", [list(stage.devices) for stage in stages]
    yield "layer_cuts", [layers_of(costs, stage.units) for stage in stages]
    yield "rows", [[high - low for low, high in stage.rows(phase.micro_batches[0])] for stage in stages]
    yield "micro_batch_size", size
    yield "num_micro_batches", len(phase.micro_batches)


def layers_of(costs: Costs, units: Range) -> list[int]:
    """The layers [first, last) of a unit range that is cut at layers."""
    starts = [first for first, _ in costs.layers]
    return [starts.index(units[0]), starts.index(units[1]) if units[1] < len(costs.units) else len(starts)]
