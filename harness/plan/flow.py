"""From action lists to the graph of an iteration.

Validator and simulator both read this graph; whatever can't be linked is an invalid plan, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from harness.plan.actions import (
    COLLECTIVES,
    COMBINATIONS,
    COMPUTE,
    NIC_IN,
    NIC_OUT,
    QUEUES,
    STORAGE,
    Action,
    Collective,
    Combine,
    Commit,
    Compute,
    Free,
    Load,
    Recv,
    Send,
    Step,
    Store,
    reads,
    writes,
)
from harness.plan.collectives import expand
from harness.plan.graph import Allocation, Graph, InvalidPlan
from harness.plan.plan import Phase
from harness.plan.values import Tensor, Value

_QUEUE_INDEX = {name: index for index, name in enumerate(QUEUES)}
_COMPUTE, _OUT, _IN, _STORAGE = (_QUEUE_INDEX[q] for q in (COMPUTE, NIC_OUT, NIC_IN, STORAGE))
_START = -1  # stands for "since the iteration began" where a node is asked for


class _Held:
    """A value alive on a device: its allocation, who made it, who touched it since."""

    __slots__ = ("allocation", "maker", "touched")

    def __init__(self, maker: int, allocation: Allocation | None) -> None:
        self.maker = maker
        self.allocation = allocation
        self.touched = [maker]


class _Device:
    """Walks the action list of one device and adds its nodes to the graph."""

    def __init__(self, builder: _Builder, index: int, name: str, phase: Phase) -> None:
        self.builder, self.graph, self.index, self.name = builder, builder.graph, index, name
        self.alive: dict[Value, _Held] = {}
        self.leaves = sorted(value.name for value in phase.leaves_of(name))
        self.bytes = self.most_bytes = 0
        for value in phase.live.get(name, ()):
            self._hold(value, _START)

    def fail(self, action: Action, rule: str) -> InvalidPlan:
        return InvalidPlan(f"{self.builder.phase}: {self.name}: {type(action).__name__.lower()}: {rule}")

    def _hold(self, value: Value, maker: int, at_end: bool = False, nbytes: int | None = None) -> None:
        tensor = self.builder.tensor(value)
        size = tensor.bytes(value) if nbytes is None else nbytes
        allocation = None
        if size:
            allocation = Allocation(self.index, tensor.kind, size, maker, at_end)
            self.graph.allocations.append(allocation)
            self._count(size)
        self.alive[value] = _Held(maker, allocation)

    def _count(self, nbytes: int) -> None:
        self.bytes += nbytes
        if self.bytes > self.most_bytes:
            self.most_bytes = self.bytes

    def _find(self, value: Value, action: Action) -> _Held:
        """The held value that is `value`, or that it is a piece of."""
        held = self.alive.get(value)
        if held is not None:
            return held
        for whole, held in self.alive.items():
            if whole.name == value.name and _is_piece(value, whole):
                return held
        raise self.fail(action, f"{value} is read before it is written, or after it is freed")

    def _link(self, held: _Held, node: int, value: Value) -> None:
        """`node` waits for the maker of a held value, unless the queue they share says so already."""
        graph, maker = self.graph, held.maker
        held.touched.append(node)
        if maker == _START:
            graph.live_readers.append((node, self.index, value.name))
        elif maker != node:
            graph.then[maker].append(node)
            graph.waits[node] += 1

    def _node(self, action: Action, queue: int, nbytes: int = 0) -> int:
        node = self.builder.add(action, self.index, nbytes)
        self.builder.enqueue(node, len(QUEUES) * self.index + queue)
        return node

    def walk(self, action: Action) -> None:
        match action:
            case Collective():
                self._collective(action)
            case Send() | Recv():
                self._transfer(action)
            case Free():
                self._free(action)
            case Commit():
                pass
            case Step():
                self._step(action)
            case Compute():
                self._compute(action)
            case Combine():
                if action.op not in COMBINATIONS:
                    raise self.fail(action, f"{action.op!r} is none of {', '.join(COMBINATIONS)}")
                node = self._node(action, _COMPUTE, 0 if action.in_place else self.builder.size(action.write))
                for value in action.reads:
                    self._link(self._find(value, action), node, value)
                if action.in_place:
                    self._take_over(action.reads[0], action.write, node, action)
                else:
                    self._write(action.write, node, action)
            case Load() | Store():
                node = self._node(action, _STORAGE, self.builder.size(action.value))
                for value in reads(action):
                    self._link(self._find(value, action), node, value)
                for value in writes(action):
                    self._write(value, node, action)

    def _write(self, value: Value, node: int, action: Action, nbytes: int | None = None, at_end: bool = False) -> None:
        if value in self.alive:
            raise self.fail(action, f"{value} is written twice")
        self._hold(value, node, at_end, nbytes)

    def _compute(self, action: Compute) -> None:
        node = self._node(action, _COMPUTE)
        for value in reads(action):
            self._link(self._find(value, action), node, value)
        for value in action.writes:
            self._write(value, node, action)
        for value in action.accumulates:
            held = self.alive.get(value)
            if held is None:
                self._hold(value, node, at_end=True)
                self.graph.makes_gradients.add(node)
            else:
                held.maker = node
                held.touched.append(node)

    def _transfer(self, action: Send | Recv) -> None:
        sending = isinstance(action, Send)
        try:
            peer = self.builder.index[action.peer]
        except KeyError:
            raise self.fail(action, f"the peer {action.peer} is no device of the phase") from None
        ends = (self.index, peer) if sending else (peer, self.index)
        node = self.builder.transfer(ends, action, self)
        if sending:
            self._link(self._find(action.value, action), node, action.value)
        else:
            self._write(action.value, node, action)

    def _step(self, action: Step) -> None:
        size = self.builder.size
        # Read the gradient, read and write the weights, read and write the optimizer's state.
        nbytes = sum(map(size, action.gradients)) + sum(map(size, action.reads)) + sum(map(size, action.writes))
        node = self._node(action, _COMPUTE, nbytes)
        for value in reads(action):
            self._link(self._find(value, action), node, value)
        for value in action.writes:
            self._take_over(value._replace(version=value.version - 1), value, node, action)

    def _take_over(self, old: Value, new: Value, node: int, action: Action) -> None:
        """`new` takes over the memory of `old`, which is gone."""
        if old not in self.alive:
            raise self.fail(action, f"{new} is to take the place of {old}, which is not there")
        if new in self.alive:
            raise self.fail(action, f"{new} is written twice")
        held = self.alive.pop(old)
        held.maker = node
        held.touched.append(node)
        self.alive[new] = held

    def _free(self, action: Free) -> None:
        for value in action.values:
            if value not in self.alive:
                raise self.fail(action, f"{value} is freed twice, or was never written")
            held = self.alive.pop(value)
            if held.allocation is not None:
                held.allocation.released = tuple(held.touched)
                self._count(-held.allocation.nbytes)

    def _collective(self, action: Collective) -> None:
        """The expansion, with its chunks in a scope of their own; the sum replaces the parts in place."""
        if action.kind not in COLLECTIVES:
            raise self.fail(action, f"{action.kind!r} is none of {', '.join(COLLECTIVES)}")
        if self.name not in action.group:
            raise self.fail(action, f"{self.name} is not in the group {action.group}")
        if strangers := set(action.group) - set(self.builder.index):
            raise self.fail(action, f"{min(strangers)} of the group is no device of the phase")
        maker = self._find(action.value, action).maker
        scope: dict[Value, int] = {}
        graph, builder, complete = self.graph, self.builder, -len(action.group)
        tensor = builder.tensor(action.value)
        arrived: Allocation | None = None
        last = maker
        for part in expand(action, self.name, tensor.width):
            if isinstance(part, Send):
                node = builder.transfer((self.index, builder.index[part.peer]), part, self)
                graph.then[scope[part.value]].append(node)
                graph.waits[node] += 1
            elif isinstance(part, Recv):
                node = builder.transfer((builder.index[part.peer], self.index), part, self)
                scope[part.value] = node
                if part.value.version != complete:  # a part to be added; complete chunks land in place
                    arrived = Allocation(self.index, tensor.kind, tensor.bytes(part.value), node)
                    graph.allocations.append(arrived)
                    self._count(arrived.nbytes)
            else:
                assert isinstance(part, Combine)
                node = builder.add(part, self.index, tensor.bytes(part.write) if part.op == "sum" else 0)
                graph.unqueued.add(node)
                for value in part.reads:
                    source = scope.get(value, maker)
                    if source == _START:
                        graph.live_readers.append((node, self.index, value.name))
                    else:
                        graph.then[source].append(node)
                        graph.waits[node] += 1
                scope[part.write] = last = node
                if arrived is not None and part.op == "sum":
                    arrived.released = (node,)
                    self._count(-arrived.nbytes)
                    arrived = None
        self._take_over(action.value, action.result, last, action)

    def finish(self) -> None:
        """What is alive at the end must be what the phase leaves, whatever the versions."""
        found = sorted(value.name for value in self.alive)
        if found != self.leaves:
            surplus, gone = Counter(found) - Counter(self.leaves), Counter(self.leaves) - Counter(found)
            problem = f"{min(surplus)} is never freed" if surplus else f"{min(gone)} does not outlive the iteration"
            raise InvalidPlan(f"{self.builder.phase}: {self.name}: {problem}")
        for value, held in self.alive.items():
            if held.maker != _START:
                self.graph.live_writers[self.index, value.name] = held.maker


class _Builder:
    def __init__(self, phase: Phase, tensors: Mapping[str, Tensor], devices: tuple[str, ...]) -> None:
        self.phase, self.tensors = f"phase {phase.name!r}", tensors
        self.graph = Graph(devices)
        self.index = {name: i for i, name in enumerate(self.graph.devices)}
        self.halves: dict[tuple[tuple[int, int], Value], tuple[int, bool]] = {}

    def tensor(self, value: Value) -> Tensor:
        try:
            return self.tensors[value.name]
        except KeyError:
            raise InvalidPlan(f"{self.phase}: the value {value} has no entry among the plan's tensors") from None

    def size(self, value: Value) -> int:
        return self.tensor(value).bytes(value)

    def add(self, action: Action, device: int, nbytes: int) -> int:
        graph = self.graph
        graph.actions.append(action)
        graph.device.append(device)
        graph.peer.append(-1)
        graph.nbytes.append(nbytes)
        graph.then.append([])
        graph.behind.append([])
        graph.waits.append(0)
        return len(graph.actions) - 1

    def enqueue(self, node: int, queue: int) -> None:
        graph = self.graph
        previous = graph.ends.get(queue)
        if previous is None:
            graph.begins[queue] = node
        else:
            graph.behind[previous].append(node)
            graph.waits[node] += 1
        graph.ends[queue] = node

    def transfer(self, ends: tuple[int, int], action: Send | Recv, side: _Device) -> int:
        """The node of a transfer: made by the end that is seen first, completed by the other."""
        key = (ends, action.value)
        sending = isinstance(action, Send)
        half = self.halves.pop(key, None)
        if half is None:
            sent = action if isinstance(action, Send) else Send(action.value, self.graph.devices[ends[1]])
            node = self.add(sent, ends[0], self.size(action.value))
            self.graph.peer[node] = ends[1]
            self.halves[key] = (node, sending)
        else:
            node, seen_send = half
            if seen_send == sending:
                verb = "sent" if sending else "received"
                raise side.fail(action, f"{action.value} is {verb} twice without its other end")
        if sending:
            self.enqueue(node, len(QUEUES) * ends[0] + _OUT)
        else:
            self.graph.receiving.add(len(QUEUES) * ends[1] + _IN)
        return node

    def check_pairs(self) -> None:
        for ((src, dst), value), (_, sent) in self.halves.items():
            a, b = self.graph.devices[src], self.graph.devices[dst]
            raise InvalidPlan(
                f"{self.phase}: {a} sends {value} to {b}, which never receives it"
                if sent
                else f"{self.phase}: {b} receives {value} from {a}, which never sends it"
            )


def _is_piece(piece: Value, whole: Value) -> bool:
    """The same tensor, micro-batch and version, and every range of the piece within the whole's."""
    if (piece.micro_batch, piece.version) != (whole.micro_batch, whole.version):
        return False
    ranges = ((piece.rows, whole.rows), (piece.tokens, whole.tokens), (piece.width, whole.width))
    return all(b is None or (a is not None and b[0] <= a[0] and a[1] <= b[1]) for a, b in ranges)


def link(phase: Phase, tensors: Mapping[str, Tensor], devices: Sequence[str]) -> Graph:
    """The graph of one iteration, devices numbered as in `devices`, which are the phase's in any order.

    Raises InvalidPlan with the reason when the actions can't be linked; `check_order` finds what would deadlock.
    """
    if set(devices) != set(phase.actions):
        raise InvalidPlan(f"phase {phase.name!r} has the devices {sorted(phase.actions)}, the plan {sorted(devices)}")
    builder = _Builder(phase, tensors, tuple(devices))
    for index, name in enumerate(devices):
        device = _Device(builder, index, name, phase)
        for action in phase.actions[name]:
            device.walk(action)
        device.finish()
        builder.graph.high_water.append(device.most_bytes)
    builder.check_pairs()
    return builder.graph
