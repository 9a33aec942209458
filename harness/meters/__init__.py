"""Meters: what a machine draws, window by window. One file per meter; which one is named, or found by looking.

with meters.opened(Choice("ina3221")) as meter:
    meter.begin()
    ...
    print(meter.end().energy_j)
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass

from harness.carbon import intensity_of
from harness.errors import OrreryError, unknown_name
from harness.meters.measurement import NotHere
from harness.meters.meter import Meter, NullMeter, ProbeMeter
from harness.meters.sampler import Probe
from harness.meters.system import System

THIS_MACHINE = System()
NONE = "none"
#: Name -> module with a function `probe(argument, system)`, which gives a `Probe` or raises `NotHere`.
MODULES = {
    "ina3221": "rails",
    "pmic": "pmic",
    "zeus": "counters",
    "external": "external",
    "regression": "regression",
    "codecarbon": "tdp",
}
#: Those that measure this machine's hardware, in the order in which they are tried. A model is only ever named.
FOUND = ("ina3221", "pmic", "zeus")
LONGEST_BASELINE_S = 3600.0
SUMMARIES = {
    "ina3221": "rails of a Jetson; [:BOARD] or [:RAIL,RAIL] where the board is not known",
    "pmic": "power management chip of a Raspberry Pi 5, corrected",
    "zeus": "energy counters of NVIDIA GPUs and x86 processors, by the package zeus",
    "external": "a meter outside of the board; :FILE or :http://HOST/PATH, see docs/energy.md",
    "regression": "Raspberry Pi 3, 4, 5 by the load of their CPU: no measurement; [:BOARD]",
    "codecarbon": "a model of processor and memory by the package codecarbon: no measurement",
    NONE: "measure nothing",
}


@dataclass(frozen=True)
class Choice:
    """What is to measure. `name`: NAME or NAME:ARGUMENT; None: what is found. `idle_baseline_s`: how long the machine
    is measured idle before the first window; 0: not. `carbon`: a country's three letters, or g per kWh."""

    name: str | None = None
    idle_baseline_s: float = 0.0
    carbon: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None and self.name.partition(":")[0] not in SUMMARIES:
            raise unknown_name("meter", self.name.partition(":")[0], SUMMARIES)
        if not 0 <= self.idle_baseline_s <= LONGEST_BASELINE_S:
            raise OrreryError(
                f"The idle baseline is {self.idle_baseline_s:g} s. Allowed is 0 (none) to {LONGEST_BASELINE_S:g}."
            )


@contextlib.contextmanager
def opened(choice: Choice, system: System = THIS_MACHINE) -> Iterator[Meter]:
    """The meter that is chosen, for as many windows as wanted. OrreryError where the one that is named is not here."""
    meter = _meter(choice, system)
    try:
        yield meter
    finally:
        meter.close()


def _meter(choice: Choice, system: System) -> Meter:
    intensity = None if choice.carbon is None else intensity_of(choice.carbon)
    if choice.name == NONE:
        return NullMeter("No meter was wanted.")
    if choice.name is None:
        probe, why = found(system)
        return NullMeter(why) if probe is None else ProbeMeter(probe, system, choice.idle_baseline_s, intensity)
    try:
        return ProbeMeter(named(choice.name, system), system, choice.idle_baseline_s, intensity)
    except NotHere as error:
        raise OrreryError(
            f"The meter {choice.name} can't be used here: {error}. `orrery list meters --check` shows which can."
        ) from error


def named(name: str, system: System) -> Probe:
    """The probe of NAME or NAME:ARGUMENT. Raises NotHere."""
    name, colon, argument = name.partition(":")
    module = importlib.import_module(f"harness.meters.{MODULES[name]}")
    probe: Probe = module.probe(argument if colon else None, system)
    return probe


def found(system: System = THIS_MACHINE) -> tuple[Probe | None, str]:
    """The first meter that measures this machine's hardware; or None, and why each of them does not."""
    reasons = []
    for name in FOUND:
        try:
            return named(name, system), ""
        except NotHere as error:
            reasons.append(f"{name}: {error}".rstrip("."))
    return None, f"No meter was found. {'; '.join(reasons)}. Name another one with --meter."


def here(system: System = THIS_MACHINE) -> dict[str, str | None]:
    """Every meter: None, or why it can't be used on this machine."""
    answers: dict[str, str | None] = {}
    for name in MODULES:
        try:
            named(name, system)
            answers[name] = None
        except NotHere as error:
            answers[name] = str(error)
    return {**answers, NONE: None}
