"""What one device does in an iteration of a phase: its part of the graph that the simulator reads, too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from harness.plan.actions import COMPUTE, NIC_OUT, QUEUES, STORAGE, Action, Collective, Combine, Load, Recv, Send, Step
from harness.plan.flow import link
from harness.plan.graph import Graph, check_order
from harness.plan.plan import Phase, Plan
from harness.plan.values import Range, Value


@dataclass(frozen=True)
class Program:
    """The device's nodes of the phase's graph.

    `actions[node]`; a transfer that comes in is a `Recv`. `compute`, `sends` and `storage` are in list order,
    `receives[source]` in the order in which the source sends. `waits[node]`: how many of the device's nodes must have
    ended before; `then[node]`: those that wait for it. `unqueued` nodes join no queue: they run as soon as they may,
    `at_once` those that wait for nothing.
    `freed`: values that are let go, `holds[i]` is how many nodes must have ended before `freed[i]` is, `held_by[node]`
    are those that the node holds. `ahead`: nodes that must have ended before the next iteration begins: they make what
    it begins with, or bring what the peers have sent in this one. `nbytes[node]` of a transfer.
    `collectives[result]`; `lands[node]`: the result of which the transfer, or the copy, fills a part in place.
    `renewed`: the names of weights of which some versions have memory of their own.
    """

    device: str
    phase: Phase
    actions: dict[int, Action]
    compute: tuple[int, ...]
    sends: tuple[int, ...]
    storage: tuple[int, ...]
    receives: dict[str, tuple[int, ...]]
    unqueued: frozenset[int]
    at_once: tuple[int, ...]
    waits: dict[int, int]
    then: dict[int, tuple[int, ...]]
    freed: tuple[Value, ...]
    holds: tuple[int, ...]
    held_by: dict[int, tuple[int, ...]]
    ahead: frozenset[int]
    nbytes: dict[int, int]
    collectives: dict[Value, Collective]
    lands: dict[int, Value]
    renewed: frozenset[str]

    @property
    def loads(self) -> list[Value]:
        return [action.value for node in self.storage if isinstance(action := self.actions[node], Load)]


def programs(plan: Plan, device: str) -> list[Program]:
    """One for each phase of the plan, in order; phases that are one object share one."""
    made: dict[int, Program] = {}
    for phase in plan.phases:
        if id(phase) not in made:
            graph = link(phase, plan.tensors, plan.devices)
            check_order(graph, f"phase {phase.name!r}")
            made[id(phase)] = program(graph, phase, device)
    return [made[id(phase)] for phase in plan.phases]


class Held(NamedTuple):
    """What a device has of the model: units [first, last), of those in `widths` some channels, and of the biases that
    are added to sums over the width some."""

    first: int
    last: int
    widths: Mapping[int, Range]
    biases: frozenset[str]


def held(plan: Plan, device: str) -> Held:
    """What the device runs, frozen weights and all; no units where the plan has cached phases only."""
    running = [p for p in plan.phases if device in p.shards and not p.cached]
    first, last = zip(*(p.shards[device].units for p in running), strict=True) if running else ((0,), (0,))
    values = {value for p in running for value in p.live.get(device, ()) if plan.tensors[value.name].kind == "weights"}
    widths = {int(v.name.partition("@")[2].partition(":")[0]): v.width for v in values if v.width is not None}
    biases = frozenset(v.name.removeprefix("weights:") for v in values)
    return Held(min(first), max(last), widths, biases)


def peers(mine: Sequence[Program]) -> tuple[set[str], set[str]]:
    """Whom the device sends to, and who sends to it."""
    outgoing = {action.peer for p in mine for node in p.sends if isinstance(action := p.actions[node], Send)}
    return outgoing, {source for p in mine for source in p.receives}


def rows_of(phase: Phase, value: Value, sample_ids: Sequence[int]) -> Sequence[int]:
    """The samples of a value's rows, of those of an iteration."""
    assert value.rows is not None
    first = sum(phase.micro_batches[: value.micro_batch])
    return sample_ids[first + value.rows[0] : first + value.rows[1]]


def program(graph: Graph, phase: Phase, device: str) -> Program:
    me = graph.devices.index(device)
    sends = tuple(_queue(graph, me, NIC_OUT))
    receives = {
        name: nodes
        for index, name in enumerate(graph.devices)
        if (nodes := tuple(node for node in _queue(graph, index, NIC_OUT) if graph.peer[node] == me))
    }
    own = {node for node in range(len(graph)) if graph.device[node] == me}
    arriving = {node: source for source, nodes in receives.items() for node in nodes}
    actions: dict[int, Action] = {node: graph.actions[node] for node in own}
    for node, source in arriving.items():
        sent = graph.actions[node]
        assert isinstance(sent, Send)
        actions[node] = Recv(sent.value, source)
    waits: dict[int, int] = dict.fromkeys(actions, 0)
    then: dict[int, list[int]] = defaultdict(list)
    for node in actions:
        for follower in graph.then[node]:
            if follower in own:
                then[node].append(follower)
                waits[follower] += 1
    freed = [*_freed(graph, me), *_pieces(actions, then)]
    held_by: dict[int, list[int]] = defaultdict(list)
    for index, (_, holders) in enumerate(freed):
        for node in holders:
            held_by[node].append(index)
    return Program(
        device=device,
        phase=phase,
        actions=actions,
        compute=tuple(_queue(graph, me, COMPUTE)),
        storage=tuple(_queue(graph, me, STORAGE)),
        sends=sends,
        receives=receives,
        unqueued=frozenset(graph.unqueued & own),
        at_once=tuple(node for node in sorted(graph.unqueued & own) if not waits[node]),
        waits=waits,
        then={node: tuple(followers) for node, followers in then.items()},
        freed=tuple(value for value, _ in freed),
        holds=tuple(len(holders) for _, holders in freed),
        held_by={node: tuple(indices) for node, indices in held_by.items()},
        ahead=frozenset({*arriving, *(node for (index, _), node in graph.live_writers.items() if index == me)}),
        nbytes={node: graph.nbytes[node] for node in (*sends, *arriving)},
        collectives={a.result: a for a in phase.actions[device] if isinstance(a, Collective)},
        lands=dict(_lands(actions, then)),
        renewed=frozenset(_renewed(phase.actions[device], phase.live.get(device, ()))),
    )


def _renewed(actions: Sequence[Action], live: Sequence[Value]) -> Iterator[str]:
    weights = {value.name for value in live}
    for action in actions:
        if isinstance(action, Step):
            yield from (value.name for value in action.kept)
        elif isinstance(action, Combine) and action.write.name in weights:
            yield action.write.name


def _queue(graph: Graph, device: int, queue: str) -> Iterator[int]:
    """The nodes of a queue that works in list order."""
    node = graph.begins.get(len(QUEUES) * device + QUEUES.index(queue))
    while node is not None:
        yield node
        node = graph.behind[node][0] if graph.behind[node] else None


def _freed(graph: Graph, device: int) -> Iterator[tuple[Value, set[int]]]:
    for allocation in graph.allocations:
        if allocation.device == device and allocation.freed is not None:
            assert allocation.released is not None
            yield allocation.freed, {node for node in allocation.released if node >= 0}


def _pieces(actions: Mapping[int, Action], then: Mapping[int, Sequence[int]]) -> Iterator[tuple[Value, set[int]]]:
    """The pieces of collectives (whose versions are negative): they go when the last node that reads them has ended."""
    for node, action in actions.items():
        made = action.value if isinstance(action, Recv) else action.write if isinstance(action, Combine) else None
        if made is not None and made.version < 0:
            yield made, {node, *then.get(node, ())}


def _lands(actions: Mapping[int, Action], then: Mapping[int, Sequence[int]]) -> Iterator[tuple[int, Value]]:
    """Who brings a complete piece to the concatenation that ends a collective: there it is in place already."""
    for node, action in actions.items():
        if isinstance(action, Recv) or (isinstance(action, Combine) and action.op == "slice" and not action.in_place):
            for follower in then.get(node, ()):
                after = actions[follower]
                if isinstance(after, Combine) and after.op == "concat" and after.in_place:
                    yield node, after.write
