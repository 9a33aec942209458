"""Does every update come to every copy of the weights, once? Followed through a round of mini-batches without running.

Weights are known by the mini-batches whose updates are in them. Those called `weights...` are what a device computes
with; those called `global...`, if there are any, are a parameter server's, to which gradients are pushed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from harness.costs import BACKWARD
from harness.plan.actions import Action, Collective, Combine, Commit, Compute, Recv, Send, Step
from harness.plan.graph import InvalidPlan
from harness.plan.plan import Phase, Plan
from harness.plan.values import Range, Value

#: What a gradient holds: (units, mini-batch, rows) -> how many times it was added.
Gradient = Counter[tuple[Range, int, Range]]
#: What weights hold: bit m is set where the update of mini-batch m is in them.
Weights = int
LOCAL, SERVED = "weights", "global"


#: Of a device and a mini-batch: the trained weights of its forward pass, by name.
Computed = dict[tuple[str, int], dict[str, Weights]]


def follow_updates(phase: Phase, plan: Plan) -> Computed:
    """Check a round of mini-batches, and tell with which weights each was computed.

    A step adds the whole gradient of a mini-batch, the next one in order. With a parameter server, and an optimizer
    without state, order does not matter: then it may be any, or several, each for the first time. In the end every copy
    has every update. Raises InvalidPlan.
    """
    return _Follower(phase, plan).follow()


class _Follower:
    def __init__(self, phase: Phase, plan: Plan) -> None:
        self.phase, self.plan = phase, plan
        self.gradients: dict[str, dict[Value, Gradient]] = {device: {} for device in phase.actions}
        self.weights: dict[str, dict[Value, Weights]] = {
            device: {value: 0 for value in phase.live.get(device, ()) if self._kind(value) == "weights"}
            for device in phase.actions
        }
        self.newest = {device: {value.name: value for value in held} for device, held in self.weights.items()}
        self.sent: dict[tuple[str, str, Value], Gradient | Weights] = {}
        self.waiting: dict[Collective, set[str]] = defaultdict(set)
        self.wanted = self._wanted()
        self.served = any(name.startswith(SERVED) for held in self.newest.values() for name in held)
        self.computed: Computed = {}

    def _kind(self, value: Value) -> str:
        return self.plan.tensors[value.name].kind

    def _gradient_of(self, weights: str) -> str:
        return "gradients" + weights.removeprefix(LOCAL).removeprefix(SERVED)

    def _trained(self, device: str) -> list[str]:
        """The weights that the device begins with, as far as they are trained."""
        names = (value.name for value in self.phase.live.get(device, ()) if self._kind(value) == "weights")
        return [name for name in names if self._gradient_of(name) in self.plan.tensors]

    def _wanted(self) -> dict[str, list[Gradient]]:
        """Of each gradient and mini-batch: the rows of each device that computes with the weights, once."""
        wanted: dict[str, list[Gradient]] = defaultdict(lambda: [Counter() for _ in self.phase.micro_batches])
        for device, shard in self.phase.shards.items():
            for name in self._trained(device):
                if name.startswith(LOCAL):
                    for m, rows in enumerate(shard.micro_batch_rows):
                        if rows[0] < rows[1]:
                            wanted[self._gradient_of(name)][m][shard.units, m, rows] = 1
        return wanted

    def _fail(self, device: str, rule: str) -> InvalidPlan:
        return InvalidPlan(f"phase {self.phase.name!r}: {device}: {rule}")

    def follow(self) -> Computed:
        position = dict.fromkeys(self.phase.actions, 0)
        progress = True
        while progress:
            progress = False
            for device, actions in self.phase.actions.items():
                while position[device] < len(actions) and self._done(device, actions[position[device]]):
                    position[device] += 1
                    progress = True
        for device, actions in self.phase.actions.items():
            if position[device] < len(actions):
                raise self._stuck(device, actions[position[device]])
        everything = (1 << len(self.phase.micro_batches)) - 1
        for device, actions in self.phase.actions.items():
            for name in self._trained(device):
                if missing := everything & ~self.weights[device][self.newest[device][name]]:
                    raise self._fail(device, f"in the end {name} lacks the update of mini-batch {lowest(missing)}")
            if sum(isinstance(action, Commit) for action in actions) != 1:
                raise self._fail(device, "a round of training has one commit")
        return self.computed

    def _stuck(self, device: str, action: Action) -> InvalidPlan:
        if isinstance(action, Collective):
            absent = ", ".join(sorted(set(action.group) - self.waiting[action]))
            return self._fail(
                device, f"{action.kind} of {action.value} waits for {absent}, which never joins with the same group"
            )
        assert isinstance(action, Recv)
        return self._fail(device, f"{action.value} is not sent by {action.peer} before it waits for this device")

    def _done(self, device: str, action: Action) -> bool:
        """Follow the action, unless it waits for other devices."""
        match action:
            case Collective() if self._kind(action.value) == "gradients":
                return self._reduce(device, action)
            case Compute():
                self._compute(device, action)
            case Combine() if self._kind(action.write) == "gradients":
                self._sum(device, action)
            case Combine() if self._kind(action.write) == "weights":
                self._pull(device, action)
            case Step():
                self._step(device, action)
            case Send() if self._kind(action.value) in ("gradients", "weights"):
                held: Mapping[Value, Gradient | Weights] = {**self.gradients[device], **self.weights[device]}
                self.sent[device, action.peer, action.value] = held[action.value]
            case Recv() if self._kind(action.value) in ("gradients", "weights"):
                content = self.sent.get((action.peer, device, action.value))
                if content is None:
                    return False
                if isinstance(content, Counter):
                    self.gradients[device][action.value] = Counter(content)
                else:
                    self.weights[device][action.value] = content
        return True

    def _reduce(self, device: str, action: Collective) -> bool:
        self.waiting[action].add(device)
        if action.result in self.gradients[device]:
            return True
        if self.waiting[action] < set(action.group):
            return False
        if action.kind != "all-reduce":
            raise self._fail(
                device, f"{action.kind} of {action.value}: gradients are followed through an all-reduce only"
            )
        total: Gradient = Counter()
        for member in action.group:
            if action.value not in self.gradients[member]:
                raise self._fail(member, f"{action.kind} of {action.value}, which it does not hold")
            total.update(self.gradients[member].pop(action.value))
        for member in action.group:
            self.gradients[member][action.result] = total
        return True

    def _compute(self, device: str, action: Compute) -> None:
        if action.direction == BACKWARD:
            for value in action.accumulates:
                content = self.gradients[device].setdefault(value, Counter())
                content[action.units, action.micro_batch, action.rows] += 1
            return
        mine = self.computed.setdefault((device, action.micro_batch), {})
        for value in action.weights:
            if self._kind(value) == "weights" and self._gradient_of(value.name) in self.plan.tensors:
                mine[value.name] = self.weights[device][value]

    def _sum(self, device: str, action: Combine) -> None:
        if action.op != "sum":
            raise self._fail(device, f"{action.op} of {action.write}: gradients are followed through sums only")
        total: Gradient = Counter()
        for value in action.reads:
            total.update(self.gradients[device].get(value, Counter()))
        self.gradients[device][action.write] = total

    def _pull(self, device: str, action: Combine) -> None:
        """Weights take the place of others with the same gradient."""
        names = {self._gradient_of(value.name) for value in action.reads}
        if action.op != "sum" or len(action.reads) != 1 or names != {self._gradient_of(action.write.name)}:
            raise self._fail(device, f"{action.write} is made of something else than one copy of the same weights")
        self._renew(device, action.write, self.weights[device][action.reads[0]])

    def _renew(self, device: str, value: Value, content: Weights) -> None:
        self.weights[device][value] = content
        self.newest[device][value.name] = value

    def _step(self, device: str, action: Step) -> None:
        if {v.name: v.version + 1 for v in action.reads} != {v.name: v.version for v in action.writes}:
            raise self._fail(device, "the step must write what it reads, one version on")
        if action.norm is not None:
            raise self._fail(device, "gradients of mini-batches that are updated one by one are not clipped by a norm")
        weights = {self._gradient_of(v.name): v for v in action.reads if self._kind(v) == "weights"}
        gradients = {value.name: value for value in action.gradients}
        if odd := weights.keys() ^ gradients.keys():
            raise self._fail(device, f"the step uses {min(odd)} and does not write its weights, or the reverse")
        ordered = not self.served or any(self._kind(value) == "optimizer" for value in action.reads)
        for name, gradient in gradients.items():
            before = weights[name]
            if before != self.newest[device].get(before.name):
                raise self._fail(device, f"the step begins with {before}, which is not the newest version")
            content = self.weights[device][before]
            added = self._whole(device, gradient)
            if twice := content & added:
                raise self._fail(device, f"{before} has the update of mini-batch {lowest(twice)} already")
            turn = lowest(~content)
            if ordered and (content, added) != ((1 << turn) - 1, 1 << turn):
                raise self._fail(device, f"{gradient} is not of mini-batch {turn} alone, whose turn it is")
            self._renew(device, before._replace(version=before.version + 1), content | added)

    def _whole(self, device: str, gradient: Value) -> Weights:
        """The mini-batches whose gradients these are: all rows of each, once."""
        content = self.gradients[device].get(gradient, Counter())
        numbers = {m for _, m, _ in content}
        need: Gradient = Counter()
        for m in numbers:
            need.update(self.wanted[gradient.name][m])
        twice = [piece for piece, count in content.items() if count > 1]
        missing = [piece for piece in need if piece not in content]
        if twice or missing:
            problem = f"adds {twice[0]} twice" if twice else f"lacks {missing[0]}"
            raise self._fail(device, f"the gradient {gradient} {problem} (units, mini-batch, rows)")
        return sum(1 << m for m in numbers)


def lowest(content: Weights) -> int:
    """The first mini-batch whose update is there."""
    return (content & -content).bit_length() - 1
