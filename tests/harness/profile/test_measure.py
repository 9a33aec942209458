from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import pytest
import torch
from torch import Tensor

from harness.cluster import Device
from harness.costs import BACKWARD, DIRECTIONS, FORWARD
from harness.engine.dropout import KeyedDropout
from harness.models import build
from harness.models.layered import Layered
from harness.profile.counting import count_units
from harness.profile.measure import LOCAL, fingerprint, measure_units, measured
from tests.harness.profile.tiny import batch, workload

HERE = Device(LOCAL, LOCAL, {}, 0.0, 2**33, 1e10, measured=LOCAL)


def iteration(layered: Layered, values: Mapping[str, Tensor], rows: int) -> float:
    """Seconds of one plain training iteration, forward and backward."""
    masks = KeyedDropout(seed=0)
    began = perf_counter()
    with masks.samples(0, range(rows)):
        made = layered.run(0, len(layered.units), dict(values), entering=masks.enter)
    (made["loss"] / rows).backward()
    seconds = perf_counter() - began
    layered.root.zero_grad(set_to_none=True)
    return seconds


@pytest.mark.benchmark  # compares two timings, so nothing else should run beside it
@pytest.mark.parametrize("model", ["bert-tiny", "resnet-tiny"])
def test_units_add_up_to_a_plain_iteration(model: str) -> None:
    """The median of several comparisons, each between iterations before and after, for other programs run too."""
    load, rows = workload(model), 8
    layered, values = build(load), batch(load, rows)
    ratios = []
    for _ in range(11):
        plain = [iteration(layered, values, rows) for _ in range(4)]
        seconds = measure_units(layered, None, lambda _: values, [rows], repeats=5).seconds
        plain += [iteration(layered, values, rows) for _ in range(4)]
        units = sum(unit[0][1] for direction in DIRECTIONS for unit in seconds[direction])
        ratios.append(units / median(plain))
    print(f"{model}: the units take {median(ratios):.3f} of a plain iteration of {1e3 * median(plain):.1f} ms")
    assert median(ratios) == pytest.approx(1, abs=0.1)


def test_measured_costs_time_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load = workload("t5-tiny")
    counted = count_units(build(load, "meta"), load, key="content")
    costs = measured(load, counted, lambda rows: batch(load, rows), [4, 1, 2], repeats=2, least_s=0)
    assert replace(costs, measured={}, core_flops_per_s={}) == counted
    assert costs.core_flops_per_s[LOCAL] > 1e8
    units, whole = [*costs.units, *costs.local_units], (0, len(costs.units))
    for direction in DIRECTIONS:
        table = costs.measured[LOCAL][direction]
        assert len(table) == len(units)
        for rows in (1, 2, 4):
            points = [dict(points)[rows] for points in table]
            assert [[row for row, _ in points] for points in table] == [[1, 2, 4]] * len(units)
            assert costs.seconds(HERE, *whole, direction, rows) == pytest.approx(sum(points))
    for unit, points in zip(units, costs.measured[LOCAL][FORWARD], strict=True):
        assert all(seconds > 0 for _, seconds in points), unit.name
    for unit, points in zip(units, costs.measured[LOCAL][BACKWARD], strict=True):
        trains = any(costs.tensors[name].needs_grad for name in unit.writes)
        assert all((seconds > 0) == trains for _, seconds in points), unit.name
    again = measured(load, counted, lambda rows: pytest.fail("measured twice"), [4, 1, 2], repeats=2, least_s=0)
    assert again == costs


def test_dropout_is_timed_as_the_engine_draws_it() -> None:
    """By key: torch's own generator is left alone, which draws if the same units run without keys."""
    load = workload("bert-tiny", dropout=0.1)
    layered, values = build(load), batch(load, 2)
    before = torch.get_rng_state()
    measure_units(layered, None, lambda rows: values, [2], repeats=1)
    assert torch.equal(torch.get_rng_state(), before)
    layered.run(0, len(layered.units), dict(values))
    assert not torch.equal(torch.get_rng_state(), before)


def test_inference_has_no_backward_time() -> None:
    load = workload("gpt2-tiny", technique="inference")
    seconds = measure_units(build(load), None, lambda rows: batch(load, rows), [2], repeats=1).seconds
    assert all(points == ((2, 0.0),) for points in seconds[BACKWARD])


def test_the_host_is_named() -> None:
    host = fingerprint()
    assert host["cpu"]
    assert host["threads"] == torch.get_num_threads()
