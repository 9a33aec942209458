from __future__ import annotations

from functools import partial

from torch import nn
from torch.nn import functional

from harness.models import build
from harness.profile.signature import structure
from tests.harness.profile.tiny import workload


def scaled(module: nn.Module, factor: float):
    return lambda x: module(x) * factor


def test_equal_layers_are_equal_whatever_their_weights() -> None:
    units = {unit.name: unit for unit in build(workload("bert-tiny"), "meta").units}
    kinds = [name.removeprefix("layer.0.") for name in units if name.startswith("layer.0.")]
    assert len(kinds) > 5
    descriptions = [structure(units[f"layer.{layer}.{kind}"].function, {}) for kind in kinds for layer in (0, 1)]
    assert descriptions[::2] == descriptions[1::2]
    assert len(set(descriptions)) == len(kinds)


def test_what_changes_the_cost_changes_the_structure() -> None:
    linear, frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
    evaluated = nn.Dropout(0.1).eval()
    different = [
        linear,
        frozen,
        nn.Linear(4, 4, bias=False),
        nn.Linear(4, 8),
        nn.Linear(4, 4).double(),
        nn.Dropout(0.1),
        nn.Dropout(0.2),
        evaluated,
        nn.Sequential(linear),
        scaled(linear, 2.0),
        scaled(linear, 3.0),
        scaled(frozen, 2.0),
        linear.forward,
        partial(functional.dropout, p=0.1),
        partial(functional.dropout, p=0.2),
    ]
    assert len({structure(value, {}) for value in different}) == len(different)
    assert structure(scaled(nn.Linear(4, 4), 2.0), {}) == structure(scaled(linear, 2.0), {})


def test_what_can_not_be_described_equals_only_itself() -> None:
    one, other = object(), object()
    assert structure(one, {}) == structure(one, {}) != structure(other, {})
