"""The fine-tuning techniques that a workload can name, and what can be chosen of each. Costs no torch.

What they do is in `harness.models.techniques` and `harness.models.side`. Defaults are what PAC measured, as far as its
counts and its released code tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

from harness.errors import OrreryError, unknown_name

SEED, PRUNING = "seed", "pruning"
INITS = (SEED, PRUNING)
NONE = "none"


@dataclass(frozen=True)
class Lora:
    """Low-rank updates: B A x `alpha` / `rank`, A of [rank, width].

    `dropout` is that of the updates' inputs; None: the workload's where it has one, else 0.1.
    """

    rank: int = 32
    alpha: int = 32
    dropout: float | None = None

    def __post_init__(self) -> None:
        _whole("lora.rank", self.rank)
        _whole("lora.alpha", self.alpha)
        if self.dropout is not None and not (type(self.dropout) in (int, float) and 0 <= self.dropout < 1):
            raise _refused("lora.dropout", self.dropout, "a probability from 0 to below 1")


@dataclass(frozen=True)
class Adapters:
    """Bottlenecks: `reduction` times narrower than the layer."""

    reduction: int = 16

    def __post_init__(self) -> None:
        _whole("adapters.reduction", self.reduction)


@dataclass(frozen=True)
class ParallelAdapters:
    """A network beside the backbone, `reduction` times narrower.

    `gate`: what enters a side layer is weighed against what the side network has, with a weight that is learnt.
    `dropped`: the layers of each stack that have none beside them, such as "0,4,8", counted from 0.
    `init`: the side layers' weights come from the "seed", or from the backbone's by "pruning".
    """

    reduction: int = 8
    gate: bool = False
    dropped: str = NONE
    init: str = SEED

    def __post_init__(self) -> None:
        _whole("parallel-adapters.reduction", self.reduction)
        if type(self.gate) is not bool:
            raise _refused("parallel-adapters.gate", self.gate, "true or false")
        given: object = self.dropped
        text = str(given) if type(given) is int else given  # a single layer may be a plain number
        if not isinstance(text, str) or not re.fullmatch(rf"{NONE}|\d{{1,4}}(, *\d{{1,4}})*", text, re.ASCII):
            allowed = f"{NONE!r}, or a text with numbers of layers, such as '0,4,8'"
            raise _refused("parallel-adapters.dropped", self.dropped, allowed)
        if self.init not in INITS:
            raise unknown_name("parallel-adapters.init", str(self.init), INITS)
        if text != NONE:
            text = ",".join(map(str, sorted({int(layer) for layer in text.split(",")})))
        object.__setattr__(self, "dropped", text)

    @property
    def dropped_layers(self) -> tuple[int, ...]:
        return () if self.dropped == NONE else tuple(map(int, self.dropped.split(",")))


Options: TypeAlias = Lora | Adapters | ParallelAdapters
#: Technique -> what can be chosen of it, if anything.
TECHNIQUES: dict[str, type[Lora] | type[Adapters] | type[ParallelAdapters] | None] = {
    "full": None,
    "lora": Lora,
    "adapters": Adapters,
    "parallel-adapters": ParallelAdapters,
    "inference": None,
}


def chosen(technique: str, given: Options | Mapping[str, Any] | None) -> Options | None:
    """What is chosen of the technique's options by name; None where that is what all have by default.

    Raises OrreryError for an option that the technique hasn't, and for a value that it can't have.
    """
    kind = TECHNIQUES[technique]
    named = asdict(given) if isinstance(given, Options) else dict(given or {})
    if kind is None:
        if named:
            raise OrreryError(f"The technique {technique} has no options, so {next(iter(named))!r} can't be set.")
        return None
    known = [field.name for field in fields(kind)]
    for name in named:
        if name not in known:
            raise unknown_name(f"option of {technique}", str(name), known)
    options = kind(**named)
    return None if options == kind() else options


def all_options(technique: str, given: Options | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every option of the technique by name: what is given, and the defaults of the others."""
    kind = TECHNIQUES[technique]
    return {} if kind is None else asdict(chosen(technique, given) or kind())


def _whole(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise _refused(name, value, "a whole number of at least 1")


def _refused(name: str, value: object, allowed: str) -> OrreryError:
    return OrreryError(f"The option {name} is {value!r}. Allowed is {allowed}.")
