"""One iteration of a phase as a graph: who waits for whom, and when memory is taken and given back."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.plan.actions import Action, Load, Send, Store
from harness.plan.values import Value


class InvalidPlan(Exception):
    """The plan breaks a rule of the action set; the message names the device, the action and the rule."""


@dataclass(slots=True)
class Allocation:
    """Bytes of one kind on one device: from the start (or end) of `taken` to the last end among `released`.

    Node -1 is the start of the iteration; `released` None: beyond its end. `freed`: the value that is gone then.
    """

    device: int
    kind: str
    nbytes: int
    taken: int
    at_end: bool = False
    released: tuple[int, ...] | None = None
    freed: Value | None = None


@dataclass
class Graph:
    """Nodes are actions; a transfer is one node of two devices. Queue number = len(QUEUES) * device + queue.

    `then[n]`: nodes that wait for n's result (a transfer's data arrives a latency after its queue is free);
    `behind[n]`: nodes that follow n in a queue. `waits[n]`: how many nodes n waits for.
    `begins[q]`: first node of queue q, `ends[q]`: its last; `receiving`: queues that take what comes first;
    `unqueued`: nodes of no queue, which start when what they wait for is there; `loads`: those that read from storage.
    `live_readers`: (node, device, value name) that wait for a value carried into the iteration;
    `live_writers[device, name]`: the node that leaves it for the next one.
    `high_water[device]`: most bytes alive if the device took its actions one at a time, in list order.
    """

    devices: tuple[str, ...]
    actions: list[Action] = field(default_factory=list)
    device: list[int] = field(default_factory=list)
    peer: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    then: list[list[int]] = field(default_factory=list)
    behind: list[list[int]] = field(default_factory=list)
    waits: list[int] = field(default_factory=list)
    begins: dict[int, int] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    receiving: set[int] = field(default_factory=set)
    unqueued: set[int] = field(default_factory=set)
    loads: list[int] = field(default_factory=list)
    live_readers: list[tuple[int, int, str]] = field(default_factory=list)
    live_writers: dict[tuple[int, str], int] = field(default_factory=dict)
    allocations: list[Allocation] = field(default_factory=list)
    makes_gradients: set[int] = field(default_factory=set)
    high_water: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.actions)


def check_order(graph: Graph, phase: str) -> list[int]:
    """Every node can run some time, in the order returned; else name the heads of the queues that wait for each other.

    Raises InvalidPlan.
    """
    waits = graph.waits.copy()
    ready = [node for node, count in enumerate(waits) if count == 0]
    order: list[int] = []
    while ready:
        node = ready.pop()
        order.append(node)
        for follower in graph.then[node]:
            waits[follower] -= 1
            if not waits[follower]:
                ready.append(follower)
        for follower in graph.behind[node]:
            waits[follower] -= 1
            if not waits[follower]:
                ready.append(follower)
    if len(order) == len(graph):
        return order
    stuck = [node for node, count in enumerate(waits) if count > 0]
    examples = []
    for node in stuck[:4]:
        action, device = graph.actions[node], graph.devices[graph.device[node]]
        what = str(action.value) if isinstance(action, (Send, Load, Store)) else type(action).__name__.lower()
        peer = f" -> {graph.devices[graph.peer[node]]}" if graph.peer[node] >= 0 else ""
        examples.append(f"{device}{peer}: {type(action).__name__.lower()} {what}")
    raise InvalidPlan(f"{phase}: deadlock: {len(stuck)} actions wait for each other, first {'; '.join(examples)}")
