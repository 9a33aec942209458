"""Ring collectives on real devices: what each member gets, and that nothing but the result is held afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness import profile
from harness.engine import Worker
from harness.engine.worker import Iteration
from harness.plan import Action, Collective, Combine, Free, Phase, Plan, Shard, Value
from harness.plan import Tensor as Shape
from harness.plan.collectives import share_ranges
from harness.workload import Workload
from tests.harness.engine.devices import run_devices

WORKLOAD = Workload("bert-tiny", "synthetic", num_samples=4, batch_size=2, seq_len=8, dropout=0.0)
EMBEDDING = (0, 1)
DEVICES = tuple(f"device{i}" for i in range(3))
WEIGHTS, X = Value("weights@0:1"), Value("x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[Value, Tensor]]:
    """By device: the flat values that are held when its last iteration has ended."""
    found: dict[str, dict[Value, Tensor]] = {}
    carry = Worker._carry

    def look(worker: Worker, iteration: Iteration) -> object:
        held = {value: payload for value, payload in iteration.values.items() if value != WEIGHTS}
        found[worker.device] = {value: torch.cat([*payload.pieces, torch.empty(0)]) for value, payload in held.items()}
        return carry(worker, iteration)

    monkeypatch.setattr(Worker, "_carry", look)
    return found


def width() -> int:
    costs = profile.count(WORKLOAD)
    return sum(costs.parameters[name].numel for name in costs.parameters_of(*EMBEDDING))


def collectives(kinds: tuple[str, ...], member: int, shares: tuple[int, ...], tiles: int) -> list[Action]:
    """One after the other, of x, which is the weights times the number of the member."""
    actions: list[Action] = [Combine("sum", (WEIGHTS,) * (member + 1), X)]
    for version, kind in enumerate(kinds):
        whole = Collective("all-reduce", X, X, DEVICES, shares)
        mine = share_ranges(whole, width())[member]
        value = X._replace(version=version, width=mine if kind == "all-gather" else None)
        if kind == "all-gather" and not version:
            actions += [Combine("slice", (X,), value), Free((X,))]
        result = X._replace(version=version + 1, width=mine if kind == "reduce-scatter" else None)
        actions.append(Collective(kind, value, result, DEVICES, shares, tiles))
    return actions


def planned(kinds: tuple[str, ...], shares: tuple[int, ...], tiles: int) -> Plan:
    actions = {device: tuple(collectives(kinds, rank, shares, tiles)) for rank, device in enumerate(DEVICES)}
    stays = (Value("x"),) * (1 + (kinds[-1] == "all-gather"))  # an all-gather leaves the share, too
    phase = Phase(
        "rings",
        (2,),
        {device: Shard(EMBEDDING, ((0, 2),)) for device in DEVICES},
        actions,
        dict.fromkeys(DEVICES, (WEIGHTS,)),
        repeat=3,
        leaves=dict.fromkeys(DEVICES, (WEIGHTS, *stays)),
    )
    tensors = {"weights@0:1": Shape("weights", 1, width(), 4), "x": Shape("buffers", 1, width(), 4)}
    return Plan("rings", 31, tensors, (phase,))


@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize("uneven", [(), (0, 1, 5)], ids=str)
@pytest.mark.parametrize(
    "kinds",
    [("all-reduce",), ("reduce-scatter",), ("all-gather",), ("reduce-scatter", "all-gather")],
    ids="+".join,
)
def test_members_get_their_part_of_the_whole(
    kinds: tuple[str, ...], uneven: tuple[int, ...], tiles: int, folder: Path, left: dict[str, dict[Value, Tensor]]
) -> None:
    rest = width() - 1000 * sum(uneven)
    shares = tuple(1000 * share + (rest if share == max(uneven) else 0) for share in uneven)
    plan = planned(kinds, shares, tiles)
    trained = run_devices(plan, WORKLOAD, folder)
    weights = torch.cat([p.detach().view(-1) for p in trained.shards["device0"].weights("weights@0:1")])
    ranges = share_ranges(Collective("all-reduce", X, X, DEVICES, shares), width())
    total = sum((rank + 1) * weights for rank in range(len(DEVICES)))
    if kinds == ("all-gather",):
        whole = torch.cat([(rank + 1) * weights[slice(*r)] for rank, r in enumerate(ranges)])
    else:
        whole = total
    version = len(kinds)
    for rank, (device, mine) in enumerate(zip(DEVICES, ranges, strict=True)):
        wanted = {X._replace(version=version): whole}
        if kinds[-1] == "reduce-scatter":
            wanted = {X._replace(version=version, width=mine): whole[slice(*mine)]}
        if kinds[-1] == "all-gather":
            share = total if len(kinds) == 2 else (rank + 1) * weights
            wanted[X._replace(version=version - 1, width=mine)] = share[slice(*mine)]
        found = left[device]
        assert found.keys() == wanted.keys()
        for value, tensor in wanted.items():
            torch.testing.assert_close(found[value], tensor)
    sent = dict(trained.execution.trace.link_bytes)
    rings = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1}
    repeats = 3 * sum(rings[kind] for kind in kinds) * (len(DEVICES) - 1)
    assert sum(sent.values()) == repeats * 4 * width()
