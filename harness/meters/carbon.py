"""From energy to carbon dioxide: joules times what the grid emits per kWh, and where that number comes from."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

from harness.errors import OrreryError, unknown_name

J_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Intensity:
    """What a grid emits, in g of CO2 equivalents per kWh."""

    g_per_kwh: float
    source: str


def grams(energy_j: float, intensity: Intensity) -> float:
    """g of CO2 equivalents."""
    return energy_j / J_PER_KWH * intensity.g_per_kwh


def intensity_of(text: str) -> Intensity:
    """A number of g per kWh, or the three letters of a country that the tables of CodeCarbon know."""
    try:
        number = float(text)
    except ValueError:
        return _of_country(text.upper())
    if not 0 <= number <= 5000:
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
