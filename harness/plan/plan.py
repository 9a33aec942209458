"""Phases and the plan that lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from harness.costs import Costs
from harness.plan.actions import Action, Commit
from harness.plan.values import Range, Tensor, Value


@dataclass(frozen=True)
class Shard:
    """What a device holds during a phase: unit ranges, and of each micro-batch the rows it works on.

    `micro_batch_rows[m]` is the row range of micro-batch m; devices with the same units are declared replicas.
    """

    units: Range
    micro_batch_rows: tuple[Range, ...]


@dataclass(frozen=True)
class Phase:
    """One iteration's action list per device, done `repeat` times.

    `live` are the values per device that exist when an iteration begins: weights, optimizer state, buffers. When it
    ends, `leaves` are there, by default the same, whatever their versions: the next iteration, or phase, begins with
    them. Without `training` an iteration is one request, which begins when the one before has ended on every device.
    Without shards nothing is computed: values are moved, of the samples of the first epoch's batches in their order.
    Where it is `cached`, the units are those of `Costs.cached`: what the frozen part made is loaded. Where it is
    `decoding`, they are those of `Costs.decoding`, and an iteration makes one more token of the request of the last
    phase that is not: it begins, as in training, on every device when that is done with the one before.
    `micro_batches` are row counts; `tied` are the groups of devices that
    hold copies of one parameter (its gradient's value name -> devices).
    An iteration trains with one batch, of all micro-batches together. Where they are `mini_batches`, each is a batch of
    its own, in the order of the data, with an update of its own: an iteration begins and ends with an empty pipeline.
    """

    name: str
    micro_batches: tuple[int, ...]
    shards: Mapping[str, Shard]
    actions: Mapping[str, tuple[Action, ...]]
    live: Mapping[str, tuple[Value, ...]]
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    repeat: int = 1
    training: bool = True
    leaves: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    cached: bool = False
    decoding: bool = False
    mini_batches: bool = False

    def leaves_of(self, device: str) -> tuple[Value, ...]:
        return self.leaves.get(device, self.live.get(device, ()))

    def chain(self, costs: Costs) -> Costs:
        """Of the workload's costs those of the units that the phase runs."""
        if self.decoding:
            assert costs.decoding is not None, "only what generates tokens decodes"
            return costs.decoding
        return costs.cached if self.cached else costs

    @property
    def is_request(self) -> bool:
        """Whether an iteration is a request of its own, or begins one."""
        return not self.training and not self.decoding

    @property
    def commits(self) -> bool:
        """Whether it begins when a snapshot is whole on all devices, which from then on counts."""
        return not self.shards and any(isinstance(a, Commit) for actions in self.actions.values() for a in actions)

    @property
    def batch_size(self) -> int:
        return sum(self.micro_batches)

    @cached_property
    def updates(self) -> tuple[range, ...]:
        """The micro-batches of each update of an iteration, in order."""
        numbers = range(len(self.micro_batches))
        return tuple(range(m, m + 1) for m in numbers) if self.mini_batches else (numbers,)

    def update_of(self, micro_batch: int) -> int:
        """The number of the update to which a micro-batch belongs."""
        return micro_batch if self.mini_batches else 0

    @cached_property
    def update_rows(self) -> tuple[int, ...]:
        """The rows of each update."""
        return tuple(sum(self.micro_batches[m] for m in update) for update in self.updates)


@dataclass(frozen=True)
class Plan:
    """A method's whole answer: tensors by name, phases in order, and a one-line summary for people.

    `method` made it; `summary` holds grouping, layer cuts and shares, for the record.
    One `Phase` object may stand at several places of `phases`.
    """

    method: str
    num_units: int
    tensors: Mapping[str, Tensor]
    phases: tuple[Phase, ...]
    summary: Mapping[str, object] = field(default_factory=dict)

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(self.phases[0].actions)

    def bytes(self, value: Value) -> int:
        return self.tensors[value.name].bytes(value)
