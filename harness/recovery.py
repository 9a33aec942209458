"""After a failure, or where devices come and go: what is left to do, by whom, and with what."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from harness.cluster import Cluster
from harness.costs import Costs
from harness.faults import JOIN, LEAVE, Fault
from harness.moves import hand_out
from harness.plan import Plan, Tensor, Value
from harness.plan.values import Range
from harness.replication import original, replicated, snapshot_of
from harness.schedules import Pipeline, Stage, gradients_of, micro_batches
from harness.search import summary
from harness.workload import Workload

MOVE, COLLECT, REDISTRIBUTE = "move", "collect", "redistribute"
#: The device that has the most of what is to be collected, the first of equals.
FULLEST = "fullest"


@dataclass(frozen=True)
class Change:
    """Devices that are gone, have joined, or are not as fast any more, since the snapshot that counts.

    `plan` took that snapshot on the devices `before`, when so many rounds had `trained`, of which `began` were over
    before the plan; None: there is no snapshot. `lost` and `joined` are devices, `series` is how many plans the run has
    had.
    """

    lost: tuple[str, ...]
    plan: Plan | None
    trained: int
    series: int
    before: Cluster
    began: int = 0
    joined: tuple[str, ...] = ()

    @cached_property
    def standing(self) -> dict[str, tuple[Value, ...]]:
        """Of each device the values of the snapshot."""
        assert self.plan is not None
        trained = self.began
        for phase in self.plan.phases:
            if phase.commits and trained == self.trained:
                return snapshot_of(self.plan, phase)
            trained += phase.repeat if phase.shards else 0
        raise ValueError(f"the plan takes no snapshot after {self.trained} rounds")

    @property
    def snapshot_tensors(self) -> dict[str, Tensor]:
        assert self.plan is not None
        return {name: tensor for name, tensor in self.plan.tensors.items() if tensor.kind == "snapshots"}


class Membership:
    """The devices that take part in a run, and how fast they are as far as one knows; what has changed since the
    snapshot that counts, and the plan that took it.

    `testbed` has all devices that ever take part. `absent`: those of it that are not there in the beginning.
    """

    def __init__(self, testbed: Cluster, absent: Collection[str] = ()) -> None:
        self._testbed = testbed
        #: Of each device how many times as long it takes as in the testbed.
        self.slowness = dict.fromkeys(testbed.names, 1.0)
        self._present = [name for name in testbed.names if name not in absent]
        self._series = self._began = self._trained = 0
        self._plan: Plan | None = None
        self._before = self.cluster
        self._lost: tuple[str, ...] = ()
        self._joined: tuple[str, ...] = ()

    @property
    def cluster(self) -> Cluster:
        """The devices that take part now, as fast as they are known to be."""
        devices = tuple(d.slowed(self.slowness[d.name]) for d in self._testbed.devices if d.name in self._present)
        return replace(self._testbed, devices=devices)

    def lost(self, device: str, plan: Plan, began: int, agreed: int | None) -> Change:
        """`device` is lost under `plan`, in front of which `began` rounds were over. `agreed`: the rounds of its last
        snapshot; None: it has taken none yet, so that the run goes back to the one that it went back to before."""
        if agreed is not None:
            self._agree(plan, began, agreed)
        return self._changed((device,))

    def turned(
        self,
        plan: Plan,
        began: int,
        agreed: int,
        due: Sequence[Fault],
        slowness: Mapping[str, float],
    ) -> Change:
        """With the snapshot that the plan has just taken, devices leave and join, as is due, and some take so many
        times as long as one knew."""
        self._agree(plan, began, agreed)
        self.slowness = {device: known * slowness.get(device, 1.0) for device, known in self.slowness.items()}
        left, joined = (tuple(fault.device for fault in due if fault.kind == kind) for kind in (LEAVE, JOIN))
        self.slowness |= dict.fromkeys(joined, 1.0)
        return self._changed(left, joined)

    def _agree(self, plan: Plan, began: int, agreed: int) -> None:
        self._plan, self._began, self._trained, self._before = plan, began, agreed, self.cluster
        self._lost = self._joined = ()

    def _changed(self, lost: Sequence[str], joined: Sequence[str] = ()) -> Change:
        self._series += 1
        self._present = [name for name in (*self._present, *joined) if name not in lost]
        self._lost = (*self._lost, *lost)
        self._joined = tuple(name for name in (*self._joined, *joined) if name not in self._lost)
        return Change(self._lost, self._plan, self._trained, self._series, self._before, self._began, self._joined)


@dataclass(frozen=True)
class Resumed:
    """The plan for the rounds that are left. `restore`: of each device the values, as the plan of the snapshot names
    them, that are to be as in the snapshot when it begins."""

    plan: Plan
    restore: Mapping[str, tuple[str, ...]]


def stages_of(plan: Plan) -> list[Stage]:
    """The stages of the plan's first phase that trains."""
    phase = next(phase for phase in plan.phases if phase.shards)
    groups: dict[Range, list[str]] = {}
    for device, shard in phase.shards.items():
        groups.setdefault(shard.units, []).append(device)
    rows = {device: shard.micro_batch_rows[0] for device, shard in phase.shards.items()}
    return [
        Stage(units, tuple(devices), tuple(float(rows[d][1] - rows[d][0]) for d in devices))
        for units, devices in sorted(groups.items())
    ]


def left_over(workload: Workload, trained: int) -> list[tuple[int, int]]:
    """`workload.batches()` without the first rounds."""
    found: list[tuple[int, int]] = []
    for size, repeat in workload.batches():
        done = min(trained, repeat)
        trained -= done
        if repeat > done:
            found.append((size, repeat - done))
    return found


def resumed(
    method: str,
    workload: Workload,
    costs: Costs,
    change: Change,
    stages: Sequence[Stage],
    micro_batch_size: int,
    warmup: Sequence[int],
    restorers: Mapping[Range, str],
    backups: Mapping[str, str],
    period: int,
    collector: str | None = None,
) -> Resumed:
    """The rounds that are left on these stages, after what each device lacks has come to it.

    restorers: units of a stage of which nobody is left -> the device that has the copy of its snapshot. It and those
    that held a stage are where values come from. `backups` and `period`: of the snapshots that follow. A
    `collector`, a device or the FULLEST of them, has all values come to it first, and then hands them out.
    """
    assert change.plan is not None
    before = stages_of(change.plan)
    devices = tuple(device for stage in stages for device in stage.devices)
    holdings = {device: [stage.units for stage in before if device in stage.devices] for device in devices}
    for units, device in restorers.items():
        holdings[device].append(units)
    pipeline = Pipeline(
        costs,
        tuple(stages),
        workload.optimizer,
        clip=workload.clip_norm is not None,
        regions=_regions([*before, *stages]),
    )
    phases = tuple(
        pipeline.phase(micro_batches(size, micro_batch_size), warmup, repeat=repeat)
        for size, repeat in left_over(workload, change.trained)
    )
    tensors = {**change.snapshot_tensors, **pipeline.tensors}
    standing = {device: change.standing.get(device, ()) for device in devices}
    live = phases[0].live
    values = list(dict.fromkeys(value for held in live.values() for value in held))
    held: dict[str, tuple[Value, ...]] = {}
    for device in devices:
        own = [v for v in values if _holds(costs, holdings[device], v.name)]
        frozen = [v for v in live[device] if v not in own and not _trained(v, tensors)]  # of these all have the file
        held[device] = (*own, *frozen, *standing[device])
    after = {device: (*live[device], *standing[device]) for device in devices}
    if collector is not None:
        trained = [value for value in values if _trained(value, tensors)]
        has = {device: sum(tensors[v.name].bytes(v) for v in trained if v in held[device]) for device in devices}
        one = max(devices, key=has.__getitem__) if collector == FULLEST else collector
        gathered = {**held, one: tuple(dict.fromkeys((*held[one], *trained)))}
        moves = [
            hand_out(COLLECT, held, gathered, tensors),
            hand_out(REDISTRIBUTE, gathered, after, tensors, (one,)),
        ]
    else:
        moves = [hand_out(MOVE, held, after, tensors)]
    restore = {
        device: tuple(
            original(value.name) for value in standing[device] if _holds(costs, holdings[device], original(value.name))
        )
        for device in devices
    }
    about = dict(summary(costs, stages, micro_batch_size, phases[0]))
    rest = Plan(method, len(costs.units), tensors, phases, about)
    again = replicated(rest, backups, period, change.series, standing)
    return Resumed(replace(again, phases=(*moves, *again.phases)), restore)


def _regions(stages: Sequence[Stage]) -> tuple[Range, ...]:
    """What the cuts of all of these leave in one piece."""
    return tuple(pairwise(sorted({edge for stage in stages for edge in stage.units})))


def _holds(costs: Costs, holdings: Sequence[Range], name: str) -> bool:
    """Whether who holds these units has the weights, state or buffers of that name."""
    _, at, place = name.partition("@")
    if at:
        first, last = map(int, place.split(":"))
        return any(low <= first and last <= high for low, high in holdings)
    parameter = name.partition(":")[2]
    return any(parameter in costs.parameters_of(*units) for units in holdings)


def _trained(value: Value, tensors: Mapping[str, Tensor]) -> bool:
    """Whether it changes with the rounds."""
    if tensors[value.name].kind != "weights":
        return True
    return gradients_of(value.name) in tensors
