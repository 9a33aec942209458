"""A model as a chain of units: the real modules, cut so that any range can live on one device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from harness.models.cuts import Piece

#: What a whole run is for.
RESULTS = ("logits", "loss")


@dataclass(frozen=True)
class Cut:
    """How the width of a unit is cut: in whole multiples of `granule` of its `width` channels.

    Of `columns`, products, a device has some output channels, bias included; of `rows` some input channels, and the
    bias where it is the one that adds it (Shoeybi et al., arXiv 1909.08053, section 3). An attention core has neither.
    """

    width: int
    granule: int = 1
    columns: tuple[nn.Module, ...] = ()
    rows: tuple[nn.Module, ...] = ()


class Unit(nn.Module):
    """A piece of a layer. `function(*tensors of reads)` returns the tensors of `writes`, in order.

    Tensor names are unique in a model. `modules` are the Hugging Face modules the function calls, so that
    parameters and buffers are theirs; a tied module stands in every unit that uses it.
    A `local` unit is cheap and is run by every device that reads what it writes (masks, position biases).
    `head_dim`: of an attention core, the channels of each head.
    `cut`: how several devices can share the unit; None where they can't.
    """

    def __init__(
        self,
        name: str,
        layer: int,
        kind: str,
        reads: Sequence[str],
        writes: Sequence[str],
        function: Callable[..., Tensor | tuple[Tensor, ...]],
        modules: Sequence[nn.Module] = (),
        local: bool = False,
        head_dim: int | None = None,
        cut: Cut | None = None,
    ) -> None:
        super().__init__()
        self.name, self.layer, self.kind, self.local = name, layer, kind, local
        self.head_dim, self.cut = head_dim, cut
        self.reads, self.writes = tuple(reads), tuple(writes)
        self.function = function
        self.held = nn.ModuleList(modules)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        out = self.function(*tensors)
        return out if isinstance(out, tuple) else (out,)


class _Step(NamedTuple):
    """A unit, and the tensors that can go after it."""

    unit: Unit
    done: tuple[str, ...]


@dataclass(frozen=True)
class Layered:
    """`root` is the Hugging Face model (with its head); `units` cover it in execution order.

    The head writes "logits". For training one more unit reads "logits" and "labels" and writes "loss": the *sum*
    over rows of the per-sample loss, so that micro-batches and replicas add up; whoever trains divides by the rows
    of the whole batch.
    `inputs` are the names of the batch's tensors (see `harness.datasets`), batch first.
    `pieces`: of parameters that have been cut, by name, which part of the model's they are.

    Where tokens are generated the units are those of the prompt, and `decoding` is the same model as a chain for one
    more token, if there is to be one. `kept` are tensors that outlive a pass, on the device that makes them: the
    "token" that was chosen last, and of every attention core "keys" and "values", with room for all tokens to come.
    """

    root: nn.Module
    units: tuple[Unit, ...]
    local_units: tuple[Unit, ...]
    inputs: tuple[str, ...]
    pieces: Mapping[str, Piece] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    decoding: Layered | None = None
    _steps: dict[tuple[object, ...], list[_Step]] = field(init=False, default_factory=dict, compare=False, repr=False)

    def parameter_names(self) -> dict[int, str]:
        """`id(parameter)` -> its first name in `root`; tied parameters have one name."""
        return {id(p): name for name, p in self.root.named_parameters()}

    def locals_of(self, units: Sequence[Unit]) -> list[Unit]:
        """The local units that `units` need, in the order of `local_units`."""
        writer = {tensor: unit for unit in self.local_units for tensor in unit.writes}
        wanted: set[str] = set()
        todo = [name for unit in units for name in unit.reads]
        while todo:
            unit = writer.get(todo.pop())
            if unit is not None and unit.name not in wanted:
                wanted.add(unit.name)
                todo.extend(unit.reads)
        return [unit for unit in self.local_units if unit.name in wanted]

    def reads_batch(self, first: int, last: int) -> bool:
        """Whether units [first, last), or the local units that they need, read a tensor of the batch."""
        units = self.units[first:last]
        wanted = {*self.inputs, "labels"}
        return any(not wanted.isdisjoint(unit.reads) for unit in (*self.locals_of(units), *units))

    def run(
        self,
        first: int,
        last: int,
        values: dict[str, Tensor],
        entering: Callable[[str], None] | None = None,
        wanted: Collection[str] = RESULTS,
        tokens: tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        """Run units [first, last) on `values` (the batch's inputs, what is carried in, and what is known already).

        `entering` is called with the name of each unit before it runs. Of `tokens` that are not all, what is carried in
        has these, but for keys and values.

        Returns the tensors that units after `last` read, and those that are `wanted`. Every other tensor is let go
        after its last reader, so that only autograd decides what stays. Units that make but what is known are not run.
        """
        alive = dict(values)
        key = (first, last, frozenset(wanted), frozenset(values))
        if key not in self._steps:
            self._steps[key] = self._order(first, last, wanted, values)
        for unit, done in self._steps[key]:
            if entering is not None:
                entering(unit.name)
            made = unit(*[alive[name] for name in unit.reads])
            if tokens is not None and unit.local:
                made = tuple(_of_queries(tensor, tokens) for tensor in made)
            alive.update(zip(unit.writes, made, strict=True))
            for name in done:
                del alive[name]
        return alive

    def _order(self, first: int, last: int, wanted: Collection[str], known: Collection[str]) -> list[_Step]:
        """The units that are run, and after each the tensors that nobody needs any more."""
        later = {name for unit in self.units[last:] for name in unit.reads}.union(wanted)
        units = self._needed(self.units[first:last], later, known)
        order = [*self.locals_of(units), *units]
        last_reader = {name: unit.name for unit in order for name in unit.reads if name not in later}
        done = [dict.fromkeys(name for name in unit.reads if last_reader.get(name) == unit.name) for unit in order]
        return [_Step(unit, tuple(names)) for unit, names in zip(order, done, strict=True)]

    @staticmethod
    def _needed(units: Sequence[Unit], later: Collection[str], known: Collection[str]) -> list[Unit]:
        """The units without which what is wanted later can't be made from what is known."""
        if not any(name in known for unit in units for name in unit.writes):
            return list(units)
        missing, found = set(later).difference(known), []
        for unit in reversed(units):
            if missing.intersection(unit.writes):
                found.append(unit)
                missing.difference_update(unit.writes)
                missing.update(name for name in unit.reads if name not in known)
        return found[::-1]


def _of_queries(mask: Tensor, tokens: tuple[int, int]) -> Tensor:
    """mask: [rows or 1, heads or 1, q_tokens or 1, k_tokens], of which the rows of some queries."""
    return mask if mask.shape[-2] == 1 else mask.narrow(-2, tokens[0], tokens[1] - tokens[0])
