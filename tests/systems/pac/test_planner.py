"""PAC's planner beside all splits there are, under the paper's own equations."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import profile
from harness.errors import OrreryError, OutOfMemory
from harness.search import layer_stacks, stage_bytes
from harness.workload import Workload
from systems import pac
from systems.pac.planner import Profile, Split, best_split, phases, splits
from testbeds import library
from tests.harness.toys import chain, cluster
from tests.systems.pac.every import every_split, uneven

TINY = Workload("bert-tiny", "synthetic", num_samples=16, batch_size=8, seq_len=16, technique="parallel-adapters")


def slowest_stage(found: Profile, split: Split, micro_batch: int, count: int) -> float:
    """Equation 3 of every stage; infinite where a device has too little memory, or a group more devices than rows."""
    worst = 0.0
    for place, (layers, devices) in enumerate(zip(split.layers, split.devices(), strict=True)):
        in_flight = min(count, len(split.groups) - place)
        for device, rows in zip(range(*devices), found.rows(*devices, micro_batch), strict=True):
            if not rows:
                continue
            first, last = found.costs.layers[layers[0]][0], found.costs.layers[layers[1] - 1][1]
            if stage_bytes(found.costs, "sgd", first, last, rows, in_flight) > found.budgets[device]:
                return np.inf
            forward, backward = (t[layers[1]] - t[layers[0]] for t in found.layer_seconds(device, rows))
            worst = max(worst, forward + backward)
    return worst


layers = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 9), min_size=n, max_size=n), st.lists(st.integers(0, 3000), min_size=n, max_size=n)
    )
)


@settings(max_examples=150, deadline=None)
@given(
    layers,
    st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=1, max_size=4),
    st.sampled_from([4, 6]),
    st.integers(1, 6),
    st.sampled_from([10_000, 40_000, 10**9]),
    st.sampled_from(pac.SHARES),
)
def test_no_split_has_a_faster_slowest_stage(work, speeds, micro_batch, count, memory, shares) -> None:
    """Of every number of stages, with memory short or not, devices alike or not."""
    costs, devices = uneven(*work), cluster(len(speeds), speeds=tuple(speeds), memory_bytes=memory)
    found = Profile(costs, devices, shares=shares)
    best: dict[int, float] = {}
    for split in every_split(found.num_layers, len(speeds)):
        seconds = slowest_stage(found, split, micro_batch, count)
        best[len(split.groups)] = min(best.get(len(split.groups), np.inf), seconds)
    chosen = {len(split.groups): split for split in splits(found, micro_batch, count)}
    assert set(chosen) == {stages for stages, seconds in best.items() if np.isfinite(seconds)}
    for stages, split in chosen.items():
        assert slowest_stage(found, split, micro_batch, count) == pytest.approx(best[stages])
    decided = best_split(found, micro_batch, count)
    totals = [sum(phases(found, split, micro_batch, count)) for split in chosen.values()]
    assert (decided is None) == (not totals)
    assert decided is None or sum(phases(found, decided, micro_batch, count)) == pytest.approx(min(totals))


def test_the_three_phases_of_a_mini_batch() -> None:
    """Two stages of three layers, 1 and 2 s a layer and row, on one and two devices; 64 bytes a row at 32 bytes/s."""
    costs = uneven([1] * 6, [8] * 6)
    found = Profile(costs, cluster(3, bandwidth=32.0, latency_s=0.5))
    split = Split(((0, 3), (3, 6)), (1, 2))
    beginning, execution, ending = phases(found, split, micro_batch=2, count=4)
    assert beginning == pytest.approx(3 * 2 + (2 * 64 / 32 + 0.5))
    assert execution == pytest.approx(4 * (3 + 6))
    all_reduce = 2 * (3 * 8 * 4 / 2 / 32 + 0.5)
    assert ending == pytest.approx(max(all_reduce, 6 * 2 + 2 * 64 / 32 + 0.5))


@pytest.mark.parametrize("technique", ["full", "adapters", "lora", "parallel-adapters"])
@pytest.mark.parametrize("model", ["bert-tiny", "t5-tiny", "bart-tiny", "gpt2-tiny"])
def test_memory_of_ranges_is_what_every_planner_counts(model: str, technique: str) -> None:
    costs = profile.count(replace(TINY, model=model, technique=technique))
    found = Profile(costs, cluster(2), "adamw")
    for x, y in itertools.combinations(range(found.num_layers + 1), 2):
        first, last = costs.layers[x][0], costs.layers[y - 1][1]
        for rows, in_flight in ((1, 1), (3, 2)):
            wanted = stage_bytes(costs, "adamw", first, last, rows, in_flight)
            assert found.bytes(rows, in_flight)[x, y] == pytest.approx(wanted)


def test_stages_of_several_hold_the_encoder_or_the_decoder() -> None:
    workload = replace(TINY, model="t5-tiny")
    costs, devices = profile.count(workload), cluster(4, memory_bandwidth=1e9)
    stacks = layer_stacks(costs)
    assert stacks[0] == "encoder" and stacks[-1] == "decoder"
    for grouping in ([4], [2, 2], [2, 1, 1], [1, 1, 1, 1]):
        made = pac.plan(
            workload, costs, devices, {**pac.OPTIONS, "grouping": "-".join(map(str, grouping)), "whole_stacks": True}
        )
        assert made.summary["grouping"] == grouping
        cuts = made.summary["layer_cuts"]
        assert isinstance(cuts, list)
        if len(grouping) > 1:
            assert all(len(set(stacks[first:last])) == 1 for first, last in cuts)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"grouping": 3}, "pac.grouping is 3, 3 devices, and toy has 2"),
        ({"grouping": "2+2"}, "it must be the number of devices in each stage, as in '2-1-1'"),
        ({"shares": "fair"}, "pac.shares is 'fair'; it must be one of even, speed"),
        ({"choose": "luck"}, "pac.choose is 'luck'; it must be one of equations, simulation"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(OrreryError, match=text):
        pac.plan(TINY, profile.count(TINY), cluster(2, memory_bandwidth=1e9), {**pac.OPTIONS, **options})


def test_what_fits_nowhere_is_out_of_memory() -> None:
    costs = profile.count(TINY)
    with pytest.raises(OutOfMemory):
        pac.plan(TINY, costs, cluster(2, memory_bandwidth=1e9, memory_bytes=10**5), pac.OPTIONS)


@pytest.mark.benchmark
def test_planning_takes_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    """24 + 24 layers on 8 Nanos, and 100 layers on 64 devices: every micro-batch size of a mini-batch of 16."""
    workload = Workload("t5-large", "mrpc", 3668, 16, seq_len=128, technique="parallel-adapters")
    cases = {
        "24 + 24 layers, 8 devices": (profile.count(workload, "gpu"), library.load("pac-nano-8").cluster, 0.1),
        "100 layers, 64 devices": (chain(100), cluster(64), 10.0),
    }
    for name, (costs, devices, most_s) in cases.items():
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            found = Profile(costs, devices)
            for size in (1, 2, 4, 8, 16):
                best_split(found, size, 16 // size)
            seconds.append(time.perf_counter() - began)
        with capsys.disabled():
            print(f"\n{name}: {min(seconds):.3f} s")
        assert min(seconds) < most_s
