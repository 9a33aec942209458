"""Values that stay from round to round, on their way to devices that lack them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.plan import Action, Free, Phase, Recv, Send, Tensor, Value

Live = Mapping[str, tuple[Value, ...]]


def hand_out(name: str, before: Live, after: Live, tensors: Mapping[str, Tensor], sources: Sequence[str] = ()) -> Phase:
    """The phase in front of which the devices hold `before`, and after which they hold `after`.

    What a device lacks it gets from the one that has it and has the fewest bytes to send so far, the first of equals:
    so that devices send side by side; with `sources` from these alone, where one of them has it. What a device needs no
    longer it frees.
    """
    holders: dict[Value, list[str]] = {}
    for device, values in before.items():
        for value in values:
            holders.setdefault(value, []).append(device)
    sent = dict.fromkeys(before, 0)
    actions: dict[str, list[Action]] = {device: [] for device in before}
    for device, wanted in after.items():
        for value in wanted:
            if device not in holders[value]:
                allowed = [holder for holder in holders[value] if holder in sources] or holders[value]
                source = min(allowed, key=sent.__getitem__)
                sent[source] += tensors[value.name].bytes(value)
                actions[source].append(Send(value, device))
                actions[device].append(Recv(value, source))
    for device, values in before.items():
        if gone := tuple(value for value in values if value not in after[device]):
            actions[device].append(Free(gone))
    return moving(name, actions, before, after)


def moving(name: str, actions: Mapping[str, Sequence[Action]], before: Live, after: Live) -> Phase:
    """A phase that computes nothing of the model."""
    return Phase(
        name=name,
        micro_batches=(),
        shards={},
        actions={device: tuple(listed) for device, listed in actions.items()},
        live=before,
        leaves=after,
        training=False,
    )
