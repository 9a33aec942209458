"""Quotas that the kernel takes and that hold."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import OrreryError
from testbeds.emulation.quota import quota_for

CORES = os.cpu_count() or 1


@given(st.floats(0.02, CORES, exclude_max=True))
def test_the_share_is_kept_with_the_shortest_period(share: float) -> None:
    quota = quota_for(share)
    assert quota is not None
    quota_us, period_us = quota
    assert quota_us / period_us == pytest.approx(share, rel=1e-3)
    assert quota_us >= 2_000 and 5_000 <= period_us <= 100_000
    assert period_us == 5_000 or quota_us == 2_000  # no shorter period would do


@pytest.mark.parametrize(
    ("share", "quota"), [(0.02, (2_000, 100_000)), (0.2, (2_000, 10_000)), (0.4, (2_000, 5_000)), (0.6, (3_000, 5_000))]
)
def test_known_shares(share: float, quota: tuple[int, int]) -> None:
    assert quota_for(share) == quota


@pytest.mark.parametrize("share", [CORES, CORES + 0.5, float("inf")])
def test_the_whole_machine_needs_no_quota(share: float) -> None:
    assert quota_for(share) is None


@pytest.mark.parametrize("share", [0.0199, 0.0, -1.0, float("nan")])
def test_too_small_a_share_is_refused(share: float) -> None:
    with pytest.raises(OrreryError, match=r"can't have .* of a core: .* a share of 0.02. Dilate time less"):
        quota_for(share)
