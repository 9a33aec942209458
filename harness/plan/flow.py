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
from harness.plan.collectives import broken_rule, expand
from harness.plan.graph import Allocation, Graph, InvalidPlan
from harness.plan.plan import Phase, Plan
from harness.plan.values import Tensor, Value

_QUEUE_INDEX = {name: index for index, name in enumerate(QUEUES)}
_COMPUTE, _OUT, _IN, _STORAGE = (_QUEUE_INDEX[q] for q in (COMPUTE, NIC_OUT, NIC_IN, STORAGE))
_START = -1  # stands for "since the iteration began" where a node is asked for


class _Held:
    """A value alive on a device: its memory, who made it, who touched it since."""

    __slots__ = ("allocations", "maker", "touched")

    def __init__(self, maker: int, allocations: Sequence[Allocation]) -> None:
        self.maker = maker
        self.allocations = allocations
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
        self.alive[value] = _Held(maker, (self._take(tensor.kind, size, maker, at_end),) if size else ())

    def _take(self, kind: str, nbytes: int, node: int, at_end: bool = False) -> Allocation:
        allocation = Allocation(self.index, kind, nbytes, node, at_end)
        self.graph.allocations.append(allocation)
        self._count(nbytes)
        return allocation

    def _release(self, value: Value) -> None:
        """The value is gone; its memory is given back when all that touched it has ended."""
        held = self.alive.pop(value)
        for allocation in held.allocations:
            allocation.released = tuple(held.touched)
            allocation.freed = value
            self._count(-allocation.nbytes)

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
            if whole.name == value.name and is_piece(value, whole):
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
                node = self._node(action, _COMPUTE, self._traffic(action))
                for value in action.reads:
                    self._link(self._find(value, action), node, value)
                if action.in_place:
                    if len(action.reads) > 1:
                        self._wait_for_all(action.reads[0], node)
                    self._take_over(action.reads[0], action.write, node, action)
                else:
                    self._write(action.write, node, action)
            case Load() | Store():
                node = self._node(action, _STORAGE, self.builder.size(action.value))
                for value in reads(action):
                    self._link(self._find(value, action), node, value)
                for value in writes(action):
                    self._write(value, node, action)
                    self.graph.loads.append(node)

    def _traffic(self, action: Combine) -> int:
        """The bytes that a combination writes, a square-sum reads; none where the result is in place already."""
        if action.op not in COMBINATIONS:
            raise self.fail(action, f"{action.op!r} is none of {', '.join(COMBINATIONS)}")
        if action.op != "square-sum":
            moves = not action.in_place or (action.op == "sum" and len(action.reads) > 1)
            return self.builder.size(action.write) if moves else 0
        if action.in_place or (width := self.builder.tensor(action.write).width) != 1:
            found = "the place of what it reads" if action.in_place else f"{width} elements"
            raise self.fail(action, f"a square-sum writes one number of its own, and {action.write} has {found}")
        return sum(map(self.builder.size, action.reads))

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
        nbytes += 2 * sum(map(size, action.kept))  # copied, and the copies are updated in place
        if strangers := set(action.kept) - set(action.reads):
            raise self.fail(action, f"{min(strangers, key=str)} is kept, and is not read")
        node = self._node(action, _COMPUTE, nbytes)
        for value in reads(action):
            self._link(self._find(value, action), node, value)
        for value in action.writes:
            before = value._replace(version=value.version - 1)
            if before in action.kept:
                self._write(value, node, action)
            else:
                self._take_over(before, value, node, action)

    def _wait_for_all(self, value: Value, node: int) -> None:
        """`node` changes what the value is made of: others, such as a transfer, must have done with it."""
        for other in self.alive[value].touched if value in self.alive else ():
            if other not in (_START, node):
                self.graph.then[other].append(node)
                self.graph.waits[node] += 1

    def _take_over(self, old: Value, new: Value, node: int, action: Action) -> None:
        """`new` takes over the memory of `old`, which is gone."""
        self._check_place(old, new, action)
        held = self.alive.pop(old)
        held.maker = node
        held.touched.append(node)
        self.alive[new] = held

    def _check_place(self, old: Value, new: Value, action: Action) -> None:
        if old not in self.alive:
            raise self.fail(action, f"{new} is to take the place of {old}, which is not there")
        if new in self.alive:
            raise self.fail(action, f"{new} is written twice")

    def _free(self, action: Free) -> None:
        for value in action.values:
            if value not in self.alive:
                raise self.fail(action, f"{value} is freed twice, or was never written")
            self._release(value)

    def _collective(self, action: Collective) -> None:
        """The expansion, with its pieces in a scope of their own. Its sums join no queue; those of a step take turns.

        An all-reduce replaces the parts in place. A reduce-scatter leaves its result in the memory of what arrives in
        its last step, and gives that of the parts back when the last of them is sent or summed. An all-gather takes
        the memory of the whole: of the member's own share when it is copied, of the rest when the first of it arrives.
        """
        if action.kind not in COLLECTIVES:
            raise self.fail(action, f"{action.kind!r} is none of {', '.join(COLLECTIVES)}")
        if self.name not in action.group:
            raise self.fail(action, f"{self.name} is not in the group {action.group}")
        if strangers := set(action.group) - set(self.builder.index):
            raise self.fail(action, f"{min(strangers)} of the group is no device of the phase")
        graph, builder, tensor = self.graph, self.builder, self.builder.tensor(action.value)
        extent = tensor.extent(action.axis)
        if broken := broken_rule(action, self.name, extent):
            raise self.fail(action, broken)
        held = self._find(action.value, action)
        gathers, n = action.kind == "all-gather", len(action.group)
        in_place = action.kind == "all-reduce" or (n == 1 and not gathers)
        lasting = 1 - n if action.kind == "reduce-scatter" else -n  # what arrives in this version lands in the result
        own = tensor.bytes(action.value) if gathers else 0
        made: list[Allocation] = []
        arrived: Allocation | None = None
        landed = False
        scope: dict[Value, int] = {}
        sent = last = maker = held.maker
        tiled, turn = action.tiles > 1, 0  # the version that the sum before belongs to
        for part in expand(action, self.name, extent):
            if isinstance(part, Send):
                sent = node = builder.transfer((self.index, builder.index[part.peer]), part, self)
                graph.then[scope[part.value]].append(node)
                graph.waits[node] += 1
            elif isinstance(part, Recv):
                node = builder.transfer((builder.index[part.peer], self.index), part, self)
                scope[part.value] = node
                if part.value.version != lasting:
                    arrived = self._take(tensor.kind, tensor.bytes(part.value), node)
                elif not (in_place or landed):
                    made.append(self._take(tensor.kind, tensor.bytes(action.result) - own, node))
                    landed = True
            else:
                assert isinstance(part, Combine)
                sums = part.op == "sum"
                node = builder.add(part, self.index, tensor.bytes(part.write) if sums or not part.in_place else 0)
                graph.unqueued.add(node)
                for value in part.reads or (action.value,):
                    source = scope.get(value, maker)
                    if source == _START:
                        graph.live_readers.append((node, self.index, value.name))
                    else:
                        graph.then[source].append(node)
                        graph.waits[node] += 1
                if tiled and not (part.in_place and not sums):
                    if part.write.version == turn:
                        graph.then[last].append(node)
                        graph.waits[node] += 1
                    turn = part.write.version
                scope[part.write] = last = node
                if arrived is not None:
                    arrived.released = (node,)
                    self._count(-arrived.nbytes)
                    arrived = None
                elif not part.in_place:
                    held.touched.append(node)
                    if not made:
                        made.append(self._take(tensor.kind, own, node))
        if in_place:
            self._take_over(action.value, action.result, last, action)
        elif gathers:
            if action.result in self.alive:
                raise self.fail(action, f"{action.result} is written twice")
            self.alive[action.result] = _Held(last, made)
        else:
            self._check_place(action.value, action.result, action)
            held.touched += (sent, last)
            self._release(action.value)
            self.alive[action.result] = _Held(last, made)
        self.alive[action.result].touched.append(sent)

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


def is_piece(piece: Value, whole: Value) -> bool:
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


def linked(phase: Phase, plan: Plan) -> Graph:
    """The graph of a phase of the plan, which is linked once: planner, validator and simulator look at the same one."""
    kept: tuple[Mapping[str, Tensor], tuple[str, ...], Graph] | None = phase.__dict__.get("_linked")
    if kept is None or kept[0] is not plan.tensors or kept[1] != plan.devices:
        kept = plan.tensors, plan.devices, link(phase, plan.tensors, plan.devices)
        phase.__dict__["_linked"] = kept
    return kept[2]
