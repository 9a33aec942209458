"""What a meter says of a window: the energy, and everything that is needed to know what the figure means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

#: How an energy was obtained. Figures of different sources never stand in one ranking without saying so.
RAIL, COUNTER, PMIC = "measured-rail", "measured-counter", "corrected-pmic"
EXTERNAL, REGRESSION, TDP_MODEL = "external", "regression", "tdp-model"


class NotHere(Exception):
    """The meter can't be used on this machine. The message says why, and what would help."""


@dataclass(frozen=True)
class Facts:
    """What is known of a meter before it measures.

    `rails`: the labels that are added, or the counters. `constants`: those of a correction or a regression.
    `carrier_included`: whether the carrier board's own power is in it; None where there is no carrier board, or where
    it is not known. No meter sees the switch, the router, or another board's network card.
    """

    meter: str
    energy_source: str
    scope: str
    nominal_hz: float | None
    rails: tuple[str, ...] = ()
    constants: Mapping[str, float] = field(default_factory=dict)
    constants_source: str | None = None
    carrier_included: bool | None = None


@dataclass(frozen=True)
class Measurement:
    """One window. Energies are gross, in J; net is less what would have been drawn idle, where that was measured.

    Where there is no figure, `energy_j` is None and `reason` says why: it is never zero for want of a reading.
    Where only the idle baseline failed, `reason` says that.
    """

    meter: str
    energy_j: float | None = None
    energy_net_of_idle_j: float | None = None
    energy_source: str | None = None
    rails: tuple[str, ...] = ()
    constants: Mapping[str, float] = field(default_factory=dict)
    constants_source: str | None = None
    scope: str | None = None
    carrier_included: bool | None = None
    network_included: bool = False
    nominal_hz: float | None = None
    achieved_hz: float | None = None
    samples: int | None = None
    largest_gap_s: float | None = None
    duration_s: float | None = None
    mean_w: float | None = None
    min_w: float | None = None
    max_w: float | None = None
    idle_w: float | None = None
    idle_at: str | None = None
    idle_duration_s: float | None = None
    board: str | None = None
    power_mode: str | None = None
    clocks_pinned: bool | None = None
    release: str | None = None
    carbon_g: float | None = None
    carbon_g_per_kwh: float | None = None
    carbon_source: str | None = None
    reason: str | None = None


def net_of_idle(measured: Measurement, idle: Measurement, idle_at: str) -> Measurement:
    """The window with an idle baseline, which began at `idle_at`: net = gross - idle power x duration."""
    if measured.energy_j is None or measured.duration_s is None:
        return measured
    if idle.mean_w is None:
        return replace(measured, reason=f"Not net of idle: {idle.reason}")
    return replace(
        measured,
        energy_net_of_idle_j=measured.energy_j - idle.mean_w * measured.duration_s,
        idle_w=idle.mean_w,
        idle_at=idle_at,
        idle_duration_s=idle.duration_s,
    )
