"""The part of a model that a device holds: its passes, gradients and update, by the names that plans use."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from harness.engine.dropout import Cut, KeyedDropout, Part
from harness.engine.tensors import Bundle
from harness.errors import OrreryError
from harness.models.layered import RESULTS, Layered
from harness.models.shards import absent, complete, fill
from harness.optimizers import optimizer_for
from harness.plan import Compute, Plan, Value
from harness.plan.updates import LOCAL, SERVED
from harness.plan.values import Range
from harness.workload import Workload

#: What torch's optimizers keep of each parameter, in the order in which it travels.
STATE: dict[str, tuple[str, ...]] = {"sgd-momentum": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


@dataclass(frozen=True)
class Saved:
    """What a forward pass keeps for its backward pass: where gradients enter the graph, and where they leave it."""

    roots: Mapping[str, GradientEdge]
    leaves: Mapping[str, Tensor]


NOTHING_SAVED = Saved({}, {})


class ModelShard:
    """The units of a model that the plan gives to a device, trained in place.

    Weights are grouped as in the plan: `weights@a:b` are the parameters that the units [a, b) use, or the trained ones
    of them where `frozen@a:b` are the others; `weights:name` is a single one that several stages hold. `gradients...`
    and `optimizer...` go with them, `buffers@a:b` likewise. `global...` is a parameter server's copy of `weights...`,
    which begins as these are.
    """

    def __init__(self, layered: Layered, workload: Workload, plan: Plan, device: torch.device) -> None:
        self.layered, self.workload, self.plan, self.device = layered, workload, plan, device
        self.masks = KeyedDropout(workload.seed)
        for tensor in (*layered.root.parameters(), *layered.root.buffers()):
            if not tensor.is_meta:
                tensor.data = tensor.data.to(device)
        self._reads_batch: dict[tuple[Range, bool], bool] = {}
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._inherited: dict[Tensor, dict[str, Tensor]] = {}

    def weights(self, name: str) -> list[nn.Parameter]:
        """Parameters of the value `weights...`, in the order in which the units first use them."""
        if name not in self._parameters:
            if name.startswith(SERVED):
                own = self.weights(LOCAL + name.removeprefix(SERVED))
                self._parameters[name] = [nn.Parameter(p.detach().clone()) for p in own]
            else:
                self._parameters[name] = self._find(name)
        return self._parameters[name]

    def check(self, value: Value) -> None:
        """Refuse weights that are not as many elements as the plan says. Raises OrreryError."""
        numel = sum(p.numel() for p in self.weights(value.name))
        planned = self.plan.bytes(value) // self.plan.tensors[value.name].itemsize
        if numel != planned:
            raise OrreryError(
                f"The plan says that {value} has {planned} elements, and in {self.workload.model} it has {numel}. "
                "Plan again for this workload."
            )

    def _find(self, name: str) -> list[nn.Parameter]:
        first_name = self.layered.parameter_names()
        if name.startswith("weights:"):
            wanted = name.removeprefix("weights:")
            return [p for p in self.layered.root.parameters() if first_name[id(p)] == wanted]
        kind, _, place = name.partition("@")
        first, last = map(int, place.split(":"))
        units = self.layered.units[first:last]
        used = {id(p): p for unit in (*self.layered.locals_of(units), *units) for p in unit.parameters()}
        own = [p for p in used.values() if f"weights:{first_name[id(p)]}" not in self.plan.tensors]
        apart = f"frozen@{place}" in self.plan.tensors
        return [p for p in own if not apart or p.requires_grad == (kind == "weights")]

    def trained(self, gradient: str) -> list[nn.Parameter]:
        """The parameters whose gradients are the value `gradients...`."""
        return [p for p in self.weights("weights" + gradient.removeprefix("gradients")) if p.requires_grad]

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return list(self._optimizers.values())

    def buffers(self) -> list[Tensor]:
        """Batch-norm statistics and the like, as far as they are on this device."""
        return [buffer for buffer in self.layered.root.buffers() if not absent(buffer)]

    def weights_bundle(self, name: str) -> Bundle:
        """The value `weights...` as flat pieces."""
        return Bundle(tuple(p.detach().view(-1) for p in self.weights(name)))

    def adopt(self, name: str, content: Bundle) -> None:
        """Take over the value `weights...` from a device that has trained it."""
        first = 0
        for parameter in self.weights(name):
            last = first + parameter.numel()
            (piece,) = content.slice(first, last).pieces
            if parameter.is_meta:
                fill(parameter, piece.view(parameter.shape))
            elif absent(parameter):
                parameter.data = piece.view(parameter.shape).clone()
            else:
                parameter.data.copy_(piece.view(parameter.shape))
            first = last

    def complete(self, path: Path, values: Sequence[Value]) -> None:
        """Read from the model's file what of the weights among the values has no content yet."""
        names = [value.name for value in values if self.plan.tensors[value.name].kind == "weights"]
        names = [name for name in names if not name.startswith(SERVED)]
        missing = [p for name in names for p in self.weights(name) if absent(p)]
        complete(self.layered, self.workload, path, missing)
        for parameter in missing:
            parameter.data = parameter.data.to(self.device)

    def state_bundle(self, name: str) -> Bundle:
        """The value `optimizer...` as flat pieces, parameter by parameter."""
        state = self._optimizer(_gradients(name)).state
        for parameter in self.trained(_gradients(name)):
            if not state[parameter]:  # before the first update
                state[parameter] = {key: torch.zeros_like(parameter) for key in STATE[self.workload.optimizer]}
                self._count(state[parameter], 0)
        keys = STATE[self.workload.optimizer]
        return Bundle(tuple(state[p][key].view(-1) for p in self.trained(_gradients(name)) for key in keys))

    def adopt_state(self, name: str, content: Bundle, updates: int) -> None:
        """Take over the value `optimizer...` after so many updates; its weights have been taken over before."""
        optimizer = self._optimizer(_gradients(name))
        first = 0
        for parameter in self.trained(_gradients(name)):
            state = optimizer.state[parameter]
            self._count(state, updates)
            for key in STATE[self.workload.optimizer]:
                last = first + parameter.numel()
                (piece,) = content.slice(first, last).pieces
                state[key] = piece.view(parameter.shape).clone()
                first = last

    def _count(self, state: dict[str, Tensor], updates: int) -> None:
        if self.workload.optimizer == "adamw":
            state["step"] = torch.tensor(float(updates))

    def buffers_bundle(self, name: str) -> Bundle:
        """The value `buffers@a:b` as flat pieces of bytes: not all buffers are of one type."""
        return Bundle(tuple(buffer.view(-1).view(torch.uint8) for buffer in self._buffers(name)))

    def adopt_buffers(self, name: str, content: Bundle) -> None:
        """Take over the value `buffers@a:b` from a device that has it."""
        first = 0
        for buffer in self._buffers(name):
            last = first + buffer.nbytes
            (piece,) = content.slice(first, last).pieces
            stored = piece.clone().view(buffer.dtype).view(buffer.shape)
            if buffer.is_meta:
                fill(buffer, stored)
            elif absent(buffer):
                buffer.data = stored
            else:
                buffer.copy_(stored)
            first = last

    def _buffers(self, name: str) -> list[Tensor]:
        first, last = map(int, name.removeprefix("buffers@").split(":"))
        units = self.layered.units[first:last]
        found = {id(b): b for unit in (*self.layered.locals_of(units), *units) for b in unit.buffers()}
        return list(found.values())

    def inherit(self, before: ModelShard) -> None:
        """Take over what another shard of the same model has as the state of optimizers."""
        for optimizer in before.optimizers:
            self._inherited |= optimizer.state

    def take_over(self, name: str, kind: str, content: Bundle, updates: int) -> None:
        """Take over a value of one of these kinds, after so many updates."""
        if kind == "weights":
            self.adopt(name, content)
        elif kind == "optimizer":
            self.adopt_state(name, content, updates)
        else:
            self.adopt_buffers(name, content)

    def _optimizer(self, gradients: str) -> torch.optim.Optimizer:
        if gradients not in self._optimizers:
            trained = self.trained(gradients)
            optimizer = self._optimizers[gradients] = optimizer_for(self.workload, trained)
            optimizer.state.update({p: self._inherited[p] for p in trained if p in self._inherited})
        return self._optimizers[gradients]

    def release(self, name: str) -> None:
        """Let go of the value `weights...` or `frozen...`: nothing uses it until another one comes. The shape stays."""
        _let_go(self.weights(name))

    def forget(self, values: Collection[Value]) -> None:
        """Let go of what training has made of these values: weights, and buffers."""
        for value in values:
            if self.plan.tensors[value.name].kind == "weights":
                _let_go(p for p in self.weights(value.name) if p.requires_grad)
            elif value.name.startswith("buffers@"):
                _let_go(self._buffers(value.name))

    def gradients(self, name: str) -> Bundle:
        """The value `gradients...` as flat pieces; autograd adds to this very memory until they are dropped."""
        return Bundle(tuple(self._gradient(p).view(-1) for p in self.trained(name)))

    @staticmethod
    def _gradient(parameter: nn.Parameter) -> Tensor:
        """The parameter's gradient; zeros where no row has reached it."""
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def take_gradients(self, name: str, content: Bundle) -> None:
        """The next backward pass adds to these gradients, the next step uses them."""
        for parameter, piece in zip(self.trained(name), content.pieces, strict=True):
            parameter.grad = piece.view(parameter.shape)

    def renew_weights(self, name: str) -> Bundle:
        """Copy the value `weights...` for its next version, in memory of its own. Returns the old one.

        Passes that have begun keep the old memory (see `forward`), gradients still come to the same parameters.
        """
        old = self.weights_bundle(name)
        for parameter in self.weights(name):
            parameter.data = parameter.data.clone()
        return old

    def move_weights(self, name: str, content: Bundle) -> None:
        """The value `weights...` is this from now on, in this memory."""
        first = 0
        for parameter in self.weights(name):
            last = first + parameter.numel()
            (piece,) = content.slice(first, last).pieces
            parameter.data = piece.view(parameter.shape)
            first = last

    def serve(self, name: str, gradients: Bundle) -> None:
        """The optimizer's update of the value `global...`."""
        parameters, first = self.weights(name), 0
        for parameter in parameters:
            last = first + parameter.numel()
            (piece,) = gradients.slice(first, last).pieces
            parameter.grad = piece.view(parameter.shape)
            first = last
        if name not in self._optimizers:
            self._optimizers[name] = optimizer_for(self.workload, parameters)
        self._optimizers[name].step()
        for parameter in parameters:
            parameter.grad = None

    def drop_gradients(self, name: str) -> None:
        """The next backward pass makes new ones. The memory lives as long as somebody holds the old ones."""
        for parameter in self.trained(name):
            parameter.grad = None

    def chain(self, decoding: bool) -> Layered:
        """The units of a phase, which may be `decoding`."""
        if not decoding:
            return self.layered
        assert self.layered.decoding is not None, "only what generates tokens decodes"
        return self.layered.decoding

    def reads_batch(self, units: Range, decoding: bool) -> bool:
        """Whether a pass over the units [units[0], units[1]) reads anything of the data set."""
        if (units, decoding) not in self._reads_batch:
            self._reads_batch[units, decoding] = self.chain(decoding).reads_batch(*units)
        return self._reads_batch[units, decoding]

    def forward(
        self,
        action: Compute,
        batch: Mapping[str, Tensor],
        entering: Mapping[str, Tensor],
        step: int,
        sample_ids: Sequence[int],
        decoding: bool = False,
    ) -> tuple[dict[str, Tensor], Saved]:
        """One pass over the units of the action, in a phase that may be `decoding`.

        batch: the rows of the data set; entering: what was made before, rows first, in the pieces that
        `harness.plan.pieces` says. Returns every tensor that later units or the run want, cut off from autograd, and
        what the backward pass needs.

        Autograd saves the memory of what it needs, not the objects: a parameter may have other memory by the time of
        the backward pass, where its weights have been renewed, and of what entered nothing else is held.
        """
        first, last = action.units
        wanted = {*RESULTS, *(value.name for value in action.writes)}
        if not self.workload.training:
            with torch.no_grad():
                chain = self.chain(decoding)
                made = chain.run(first, last, {**batch, **entering}, wanted=wanted, tokens=action.tokens)
            return {name: tensor for name, tensor in made.items() if name not in entering}, NOTHING_SAVED
        leaves = {
            name: tensor.detach().requires_grad_() if self._flows(name, first) else tensor
            for name, tensor in entering.items()
        }
        values = {**batch, **leaves}
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(saved_tensors_hooks(Tensor.detach, lambda kept: kept))
            if self.workload.dropout != 0:
                stack.enter_context(self.masks.samples(step, sample_ids, self._part(action)))
            made = self.layered.run(first, last, values, self.masks.enter, wanted, action.tokens)
        roots = {
            name: get_gradient_edge(tensor)
            for name, tensor in made.items()
            if tensor.requires_grad and (name == "loss" or self._flows(name, last))
        }
        outputs = {name: tensor.detach() for name, tensor in made.items() if name not in entering}
        _let_go(leaf for leaf in leaves.values() if leaf.requires_grad)
        return outputs, Saved(roots, {name: leaf for name, leaf in leaves.items() if leaf.requires_grad})

    def _part(self, action: Compute) -> Part:
        """The tokens and heads that a pass works on."""
        unit = self.layered.units[action.units[0]]
        tokens = self.workload.seq_len
        cut = None if action.tokens is None or tokens is None else Cut(*action.tokens, tokens)
        if action.width is None or unit.cut is None:
            return Part(cut)
        low, high, of = (edge // unit.cut.granule for edge in (*action.width, unit.cut.width))
        return Part(cut, Cut(low, high, of))

    def _flows(self, name: str, cut: int) -> bool:
        """Whether a gradient comes back for the tensor across the boundary in front of unit `cut`."""
        return f"grad:{name}@{cut}" in self.plan.tensors

    def backward(self, saved: Saved, arriving: Mapping[str, Tensor], batch_size: int) -> dict[str, Tensor]:
        """Gradients of the mean loss over the whole batch: micro-batches and replicas just add up.

        arriving: gradients of what the stage handed on, by tensor name. Returns those of what it was handed.
        """
        roots, gradients = [], []
        for name, edge in saved.roots.items():
            if name == "loss":
                roots.append(edge)
                gradients.append(torch.full((), 1 / batch_size, dtype=self.layered_dtype, device=self.device))
            elif name in arriving:
                roots.append(edge)
                gradients.append(arriving[name])
        torch.autograd.backward(roots, gradients)
        leaving = {name: leaf.grad for name, leaf in saved.leaves.items() if leaf.grad is not None}
        # What the stage only hands through has no pass here: its gradient is handed through, too.
        return {**{name: gradient for name, gradient in arriving.items() if name not in saved.roots}, **leaving}

    @property
    def layered_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.workload.dtype)
        return dtype

    def step(self, gradients: Sequence[str], square_norm: Tensor | None) -> None:
        """The optimizer's update of the groups whose gradients these are, clipped where a global norm is given."""
        parameters = [p for name in gradients for p in self.trained(name)]
        if square_norm is not None:
            assert self.workload.clip_norm is not None
            scale = (self.workload.clip_norm / (square_norm.sqrt() + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([self._gradient(p) for p in parameters], scale.squeeze(0))
        for name in gradients:
            self._optimizer(name).step()

    def standing_bytes(self) -> dict[str, int]:
        """Bytes that stay from iteration to iteration, by kind."""
        states = [state for optimizer in self._optimizers.values() for state in optimizer.state.values()]
        tensors: dict[str, list[Tensor]] = {
            "weights": [p for p in (*self.layered.root.parameters(), *self._served()) if not absent(p)],
            "buffers": self.buffers(),
            "optimizer": [t for state in states for t in state.values() if isinstance(t, Tensor)],
        }
        return {kind: sum(t.numel() * t.itemsize for t in held) for kind, held in tensors.items()}

    def _served(self) -> list[nn.Parameter]:
        return [p for name, parameters in self._parameters.items() if name.startswith(SERVED) for p in parameters]


def _let_go(tensors: Iterable[Tensor]) -> None:
    """Free their memory; the shape stays."""
    for tensor in tensors:
        if not tensor.is_meta:
            hollow = tensor.data.new_empty(()).expand(tensor.shape)
            hollow.untyped_storage().resize_(0)
            tensor.data = hollow


def _gradients(state: str) -> str:
    """The name of the gradients of the value `optimizer...`."""
    return "gradients" + state.removeprefix("optimizer")
