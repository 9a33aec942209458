"""What a device has of a snapshot, and the shard that it makes of that after a failure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from harness.engine.model_shard import ModelShard, Saved
from harness.engine.tensors import Bundle
from harness.plan import Plan, Value
from harness.replication import original

Payload = Tensor | Bundle | Saved | None


@dataclass(frozen=True)
class Snapshot:
    """The values of `plan` that hold a snapshot on this device, taken when so many rounds had `trained`."""

    plan: Plan
    trained: int
    values: Mapping[Value, Payload]


def restored(snapshot: Snapshot, names: Collection[str], shard: ModelShard, plan: Plan) -> ModelShard:
    """The shard for `plan` of the model of `shard`, in which the values of these names are as in the snapshot.

    `names` are those of the snapshot's plan. State of optimizers that is not among them is gone.
    """
    before = ModelShard(shard.layered, shard.workload, snapshot.plan, shard.device)
    kinds = {original(value.name): snapshot.plan.tensors[original(value.name)].kind for value in snapshot.values}
    found = {original(value.name): payload for value, payload in snapshot.values.items()}
    for name in sorted(names, key=lambda name: kinds[name] == "optimizer"):  # its weights come first
        content = found[name]
        assert isinstance(content, Bundle)
        before.take_over(name, kinds[name], content, snapshot.trained)
    after = ModelShard(shard.layered, shard.workload, plan, shard.device)
    after.inherit(before)
    return after
