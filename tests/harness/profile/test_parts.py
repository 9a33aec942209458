"""Parts of units: what is timed of them, and what comes of it in a part's time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness import datasets, profile
from harness.costs import FORWARD
from harness.models import build
from harness.plan.pieces import TOKENWISE
from harness.profile import parts
from harness.profile.measure import LOCAL, on_this_machine
from harness.workload import Workload
from testbeds import library

LOAD = Workload("gpt2-tiny", "synthetic", 2, 1, technique="inference", seq_len=24, new_tokens=3)


def test_a_part_takes_its_fixed_share_and_its_part_of_the_rest() -> None:
    costs, device = profile.count(LOAD), library.load("emu-4-50mbit").cluster.devices[0]
    units = len(costs.units)
    table = {FORWARD: tuple(((1, 1.0 + i),) for i in range(units + len(costs.local_units)))}
    timed = replace(costs, measured={LOCAL: table}, fixed_shares={LOCAL: (0.25,) * units})
    core = next(i for i, unit in enumerate(costs.units) if unit.kind == "attention")
    local = 1.0 + units  # the mask is made whole, whatever the part
    for fraction in (1.0, 0.5, 0.0):
        expected = (1.0 + core) * (0.25 + 0.75 * fraction) + local
        assert timed.seconds(device, core, core + 1, FORWARD, 1, fraction) == pytest.approx(expected / device.share)


@pytest.mark.parametrize("new_tokens", [1, 3])
def test_every_chain_is_timed_in_parts(new_tokens: int) -> None:
    load = replace(LOAD, new_tokens=new_tokens)
    costs = on_this_machine(load, profile.count(load), [1])
    chains = [costs] if costs.decoding is None else [costs, costs.decoding]
    assert len(chains) == (1 if new_tokens == 1 else 2)
    for chain in chains:
        shares = chain.fixed_shares[LOCAL]
        shared = [unit.cut is not None or unit.kind in TOKENWISE for unit in chain.units]
        assert len(shares) == len(chain.units)
        assert all(0 <= share <= 1 for share in shares)
        assert all(share == 0 for share, can in zip(shares, shared, strict=True) if not can)
        assert any(share > 0 for share in shares), "a quarter of a tiny product takes longer than a quarter of its time"


def test_a_part_has_a_quarter_in_whole_granules() -> None:
    load = replace(LOAD, new_tokens=None)
    layered, costs = build(load), profile.count(load)
    cut = parts._cut(load, costs)
    for unit, part in zip(layered.units, cut.units, strict=True):
        if unit.cut is not None and unit.held:
            whole, quarter = (sum(p.numel() for p in u.parameters() if p.dim() == 2) for u in (unit, part))
            assert quarter * 4 == whole
    assert parts._width(replace(layered.units[2].cut, granule=8, width=24)) == 8
    tensors = [torch.zeros(2, 24, 32)] * 3
    (core,) = [u for u in layered.units if u.kind == "attention"][:1]
    assert [tuple(t.shape) for t in parts._piece(core, tensors)] == [(2, 24, 8)] * 3
    assert datasets.load(load).batch([0])["input_ids"].shape == (1, 24)
