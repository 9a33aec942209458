"""Counted models against what PAC (ICPP 2024) printed: Figure 3 (Full, Inference) and Table 1."""

from __future__ import annotations

import time

import pytest

from harness.models import build
from harness.profile.counting import count_units
from harness.workload import Workload

#: TFLOP per mini-batch of 16 sequences of 128 tokens, one decoder token. Read off PAC's Figure 3 to 0.001.
FIGURE_3 = {"t5-base": (0.418, 0.838), "bart-large": (0.740, 1.481), "t5-large": (1.480, 2.961)}
#: GiB of weights, PAC's Table 1.
TABLE_1_T5_LARGE_GIB = 2.75


@pytest.mark.parametrize("model", FIGURE_3)
@pytest.mark.parametrize("technique", ["full", "inference"])
def test_flops_of_figure_3(model: str, technique: str) -> None:
    load = Workload(model, "mrpc", 3668, 16, technique=technique)
    began = time.perf_counter()
    costs = count_units(build(load, "meta"), load)
    seconds = time.perf_counter() - began
    print(f"{model} {technique}: built and counted in {seconds:.1f} s")
    assert seconds < 30
    forward, backward = FIGURE_3[model]
    whole = (0, len(costs.units))
    assert costs.work(*whole, "forward").flops(16) / 1e12 == pytest.approx(forward, rel=0.01)
    expected = backward if technique == "full" else 0
    assert costs.work(*whole, "backward").flops(16) / 1e12 == pytest.approx(expected, rel=0.01)
    if model == "t5-large":
        weights = sum(costs.parameters[name].bytes for name in costs.parameters_of(*whole))
        assert weights / 2**30 == pytest.approx(TABLE_1_T5_LARGE_GIB, rel=0.01)


#: Parameters in millions that follow from the models' published shapes, embeddings once.
PARAMETERS_M = {"t5-base": 222.9, "bart-large": 403.8, "t5-large": 737.5}


@pytest.mark.parametrize("model", PARAMETERS_M)
def test_every_parameter_is_held_by_a_unit_once(model: str) -> None:
    load = Workload(model, "mrpc", 3668, 16, technique="inference")
    costs = count_units(build(load, "meta"), load)
    held = costs.parameters_of(0, len(costs.units))
    assert set(held) == set(costs.parameters)
    assert len(held) == len(set(held))
    assert sum(costs.parameters[name].numel for name in held) / 1e6 == pytest.approx(PARAMETERS_M[model], rel=0.01)
