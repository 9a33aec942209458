"""How fast an emulated device computes: a share of one core of this machine, as quota and period of a cgroup."""

from __future__ import annotations

import os

from harness.errors import OrreryError

#: The kernel refuses quotas below 1 ms, and counts computing in ticks of 1 to 4 ms: quotas must not be much shorter.
LEAST_QUOTA_US = 2_000
#: A short period makes a slow device, a long one a fast device that pauses.
LEAST_PERIOD_US, MOST_PERIOD_US = 5_000, 100_000

Quota = tuple[int, int] | None


def quota_for(share: float) -> Quota:
    """`(quota_us, period_us)` for a share of one core, which may exceed 1. None from all cores on: no quota.

    The shortest period that gives a quota of 2 ms, of at least 5 ms.
    """
    least = LEAST_QUOTA_US / MOST_PERIOD_US
    if not share >= least:
        raise OrreryError(
            f"A device can't have {share:.3g} of a core: the kernel needs quotas of {LEAST_QUOTA_US / 1000:g} ms in at "
            f"most {MOST_PERIOD_US / 1000:g} ms, a share of {least}. Dilate time less, or emulate fewer devices."
        )
    if share >= (os.cpu_count() or 1):
        return None
    period_us = max(LEAST_PERIOD_US, LEAST_QUOTA_US / share)
    return round(share * period_us), round(period_us)
