"""From energy to carbon dioxide: joules times what the grid emits per kWh, and where that number comes from."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files

from harness.errors import OrreryError, unknown_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

J_PER_KWH = 3.6e6
MOST_G_PER_KWH = 5000.0


@dataclass(frozen=True)
class Intensity:
    """What a grid emits, in g of CO2 equivalents per kWh; with its range where nobody said which grid it is."""

    g_per_kwh: float
    source: str
    assumed: tuple[float, float] | None = None

    def grams(self, energy_j: float) -> float:
        """g of CO2 equivalents."""
        return energy_j / J_PER_KWH * self.g_per_kwh

    def __str__(self) -> str:
        if self.assumed is None:
            return f"{self.g_per_kwh:g} g CO2 per kWh, {self.source}"
        low, high = self.assumed
        return f"{self.g_per_kwh:g} g CO2 per kWh, assumed (from {low:g} to {high:g})"


def intensity_of(text: str | None) -> Intensity:
    """A number of g per kWh, or the three letters of a country that the tables of CodeCarbon know; None: the assumed
    one of `carbon.toml`."""
    if text is None:
        known = tomllib.loads((files("harness") / "carbon.toml").read_text(encoding="utf-8"))["g_per_kwh"]
        return Intensity(known["value"], known["provenance"], (known["low"], known["high"]))
    try:
        number = float(text)
    except ValueError:
        return _of_country(text.upper())
    if not 0 <= number <= MOST_G_PER_KWH:
        raise OrreryError(f"The carbon intensity is {text}. Allowed is a number of g per kWh, from 0 to 5000.")
    return Intensity(number, "as given by the user")


def _of_country(code: str) -> Intensity:
    try:
        from codecarbon.input import DataSource
    except ImportError as error:
        raise OrreryError(
            f"The carbon intensity of {code!r} is in the tables of codecarbon, which can't be imported: {error}. "
            "Install it: pip install codecarbon. Or give a number of g per kWh."
        ) from error
    table = DataSource().get_global_energy_mix_data()
    if code not in table:
        raise unknown_name("country with a carbon intensity", code, table)
    return Intensity(float(table[code]["carbon_intensity"]), f"codecarbon {version('codecarbon')}, table of {code}")
