"""At which rates a grouping is the paper's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.experiment import expand
from harness.runner import run
from results import papers, rates
from results.comparison import compare
from results.settings import settings

FACTORS = [0.5, 1, 2, 4, 8]


@given(st.floats(0.51, 7.9))
def test_a_flip_is_found_where_it_is(flip: float) -> None:
    ((low, high),) = rates.spans(lambda factor: factor >= flip, FACTORS)
    assert flip <= low <= flip * rates.NEAR and high == 8
    ((low, high),) = rates.spans(lambda factor: factor < flip, FACTORS)
    assert low == 0.5 and flip / rates.NEAR <= high <= flip


def test_always_never_and_twice() -> None:
    assert rates.spans(lambda factor: True, FACTORS) == [(0.5, 8)]
    assert rates.spans(lambda factor: False, FACTORS) == []
    found = rates.spans(lambda factor: factor in (1, 4), FACTORS)
    assert [low <= wanted <= high for (low, high), wanted in zip(found, (1, 4), strict=True)] == [True, True]


def test_groupings_of_t5_base_on_two_devices() -> None:
    """At the stated rate as the run planned it, and one group where links are fast: nothing is left to pay."""
    workload = {"model": "t5-base", "dataset": "mrpc", "technique": "parallel-adapters", "batch_size": 2}
    (asked,) = expand({"workload": workload, "run": {"method": "pac", "testbed": "pac-nano-2"}}, "the test")
    record = run(asked)
    comparisons = [c for found in compare(settings([record])[0]).values() for c in found]
    flips, points = rates.tables(papers.load("pac"), comparisons) or (None, None)
    assert flips is not None and points is not None
    either, whole = flips.frame.to_dict("records")
    assert (either["whole_stacks"], whole["whole_stacks"]) == (False, True)
    assert record.plan is not None
    assert either["x 1"] == "[" + "-".join(map(str, record.plan["grouping"])) + "]"
    assert either["x 8"] == either["paper"] == "[2]"
    at_stated = points.frame[(points.frame["rate"] == "x 1") & ~points.frame["whole_stacks"]]
    assert at_stated["Mbit/s"].tolist() == [pytest.approx(940)]
    assert at_stated["samples/s"].tolist() == [pytest.approx(record.throughput_samples_per_s, rel=0.02)]
