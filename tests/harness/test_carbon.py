"""From joules to grams."""

from __future__ import annotations

import pytest

from harness.carbon import Intensity, intensity_of
from harness.errors import OrreryError


def test_by_hand() -> None:
    """A kWh of 380 g/kWh is 380 g; a kJ is 1/3600 of it."""
    assert Intensity(380, "").grams(3.6e6) == 380
    assert Intensity(380, "").grams(1e3) == pytest.approx(380 / 3600)


def test_a_number_is_the_users() -> None:
    assert intensity_of("380.5") == Intensity(380.5, "as given by the user")


@pytest.mark.parametrize("text", ["-1", "1e9", "nan"])
def test_a_number_that_can_not_be_is_refused(text: str) -> None:
    with pytest.raises(OrreryError, match="from 0 to 5000"):
        intensity_of(text)


def test_without_a_number_one_is_assumed_and_says_so() -> None:
    intensity = intensity_of(None)
    assert intensity.source == "assumed"
    assert intensity.assumed is not None and intensity.assumed[0] < intensity.g_per_kwh < intensity.assumed[1]
    assert "assumed" in str(intensity) and "assumed" not in str(intensity_of("100"))
