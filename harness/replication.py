"""Snapshots of what is trained, with copies on other devices: what a run goes back to when a device is lost.

After every `period` rounds each device copies its trained weights, their optimizer state and its buffers, and sends the
copy to its backup, if it has one. A snapshot counts from the moment when every device has all that it is to have: that
is the start of the phase that follows, in which the snapshot before is let go. Two of them take turns, so that one is
whole at any moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from harness.moves import moving
from harness.plan import Action, Combine, Commit, Free, Phase, Plan, Recv, Send, Tensor, Value

REPLICATE, COMMIT = "replicate", "commit"


def replicated(
    plan: Plan,
    backups: Mapping[str, str],
    period: int,
    series: int = 0,
    standing: Mapping[str, Sequence[Value]] | None = None,
) -> Plan:
    """The plan, whose phases all train with the same shards, with a snapshot in front and after every `period` rounds
    but the last ones.

    backups: device -> the device that keeps a copy of its snapshot; none for a device whose peers hold the same.
    series: a number for the snapshots of this plan, another one than in the plans before. `standing`: of each device
    the values of a snapshot that still counts, of a plan before: then there is none in front.
    """
    maker = _Snapshots(plan, backups, series, standing or {})
    phases: list[Phase] = []
    left = period if standing else 0
    for phase in plan.phases:
        todo = phase.repeat
        while todo:
            if not left:
                phases += maker.taken()
                left = period
            count = min(todo, left)
            phases.append(maker.beside(phase, count))
            todo, left = todo - count, left - count
    return replace(plan, tensors={**plan.tensors, **maker.tensors}, phases=tuple(phases))


def snapshot_of(plan: Plan, phase: Phase) -> dict[str, tuple[Value, ...]]:
    """Of each device the values of the snapshot that it has after the phase."""
    return {
        device: tuple(value for value in phase.leaves_of(device) if plan.tensors[value.name].kind == "snapshots")
        for device in plan.devices
    }


def original(name: str) -> str:
    """The name of the value that a snapshot is of."""
    return name.partition(":")[2]


class _Snapshots:
    """Makes the phases around a plan's snapshots, each once."""

    def __init__(
        self, plan: Plan, backups: Mapping[str, str], series: int, standing: Mapping[str, Sequence[Value]]
    ) -> None:
        self.plan, self.backups = plan, backups
        self.live = plan.phases[0].live
        self.held = {device: tuple(self._trained(device)) for device in plan.devices}
        self.kept = {device: tuple(standing.get(device, ())) for device in plan.devices}
        #: The snapshots that take turns are of an even and an odd number.
        self.number, self.series = 0, series
        self.tensors: dict[str, Tensor] = {}
        self._beside: dict[tuple[int, int, tuple[Value, ...]], Phase] = {}
        self._taken: dict[tuple[int, tuple[Value, ...]], tuple[Phase, Phase]] = {}

    def _trained(self, device: str) -> Iterator[Value]:
        tensors = self.plan.tensors
        for value in self.live[device]:
            trained = "gradients" + value.name.removeprefix("weights") in tensors
            if trained or tensors[value.name].kind in ("optimizer", "buffers"):
                yield value

    def _name(self, value: Value) -> Value:
        name = f"snapshot-{self.series}-{self.number % 2}:{value.name}"
        tensor = self.plan.tensors[value.name]
        self.tensors[name] = replace(tensor, kind="snapshots")
        return Value(name)

    def beside(self, phase: Phase, count: int) -> Phase:
        """So many rounds of the phase while the snapshot lies beside."""
        key = (id(phase), count, tuple(chain(*self.kept.values())))
        if key not in self._beside:
            live = {device: (*values, *self.kept[device]) for device, values in phase.live.items()}
            self._beside[key] = replace(phase, live=live, repeat=count)
        return self._beside[key]

    def taken(self) -> tuple[Phase, Phase]:
        """Take the next snapshot, and let go of the one before."""
        key = (self.number % 2, tuple(chain(*self.kept.values())))
        if key not in self._taken:
            self._taken[key] = self._take()
        taken = self._taken[key]
        self.kept = {
            device: tuple(v for v in taken[1].leaves_of(device) if v not in self.live[device]) for device in self.live
        }
        self.number += 1
        return taken

    def _take(self) -> tuple[Phase, Phase]:
        actions: dict[str, list[Action]] = {device: [] for device in self.held}
        made: dict[str, list[Value]] = {device: [] for device in self.held}
        for device, values in self.held.items():
            for value in values:
                copy = self._name(value)
                actions[device].append(Combine("slice", (value,), copy))
                made[device].append(copy)
        for device, backup in self.backups.items():
            for value in self.held[device]:
                if value not in self.held[backup]:  # tied weights are the same on both
                    copy = self._name(value)
                    actions[device].append(Send(copy, backup))
                    actions[backup].append(Recv(copy, device))
                    made[backup].append(copy)
        before = {device: (*values, *self.kept[device]) for device, values in self.live.items()}
        both = {device: (*values, *made[device]) for device, values in before.items()}
        after = {device: (*values, *made[device]) for device, values in self.live.items()}
        gone: dict[str, list[Action]] = {
            device: [Commit(), *([Free(kept)] if kept else [])] for device, kept in self.kept.items()
        }
        return (
            moving(REPLICATE, actions, before, both),
            moving(COMMIT, gone, both, after),
        )
