"""From joules to grams."""

from __future__ import annotations

import pytest

from harness.errors import OrreryError
from harness.meters.carbon import Intensity, grams, intensity_of


def test_by_hand() -> None:
    """A kWh of 380 g/kWh is 380 g; a kJ is 1/3600 of it."""
    assert grams(3.6e6, Intensity(380, "")) == 380
    assert grams(1e3, Intensity(380, "")) == pytest.approx(380 / 3600)


def test_a_number_is_the_users() -> None:
    assert intensity_of("380.5") == Intensity(380.5, "as given by the user")


@pytest.mark.parametrize("text", ["-1", "1e9", "nan"])
def test_a_number_that_can_not_be_is_refused(text: str) -> None:
    with pytest.raises(OrreryError, match="from 0 to 5000"):
        intensity_of(text)
