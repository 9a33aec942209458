"""The power management chip of a Raspberry Pi 5, by `vcgencmd pmic_read_adc`: volts and amperes paired by name."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from harness.meters.measurement import PMIC, Facts, NotHere
from harness.meters.sampler import Watch, sampled, timed
from harness.meters.system import System
from harness.meters.window import MOST_GAP_S, Unreadable, Window

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Each reading starts a program, so fewer than of a file.
RATE_HZ = 5.0
PROGRAM = "vcgencmd"
LINE = re.compile(r"\s*(\w+)_([AV]) (current|volt)\(\d+\)=(-?[\d.]+)(\w*)\s*")
UNITS = {"A": ("current", "A"), "V": ("volt", "V")}


@cache
def _data() -> Mapping[str, Any]:
    return tomllib.loads(files("harness.meters").joinpath("pmic.toml").read_text(encoding="utf-8"))


def corrected_w(text: str) -> float:
    """The board's power from what the program prints, in any order of lines. Raises Unreadable for missing pairs."""
    values: dict[tuple[str, str], float] = {}
    for line in text.splitlines():
        match = LINE.fullmatch(line)
        if match is None:
            continue
        name, kind, noun, number, unit = match.groups()
        if (noun, unit) != UNITS[kind]:
            raise Unreadable(f"{PROGRAM} printed {line.strip()!r}. It must give {name}_{kind} in {UNITS[kind][1]}.")
        values[name, kind] = float(number)
    names = _data()["rails"]["names"]
    missing = [f"{name}_{kind}" for name in names for kind in UNITS if (name, kind) not in values]
    if missing:
        raise Unreadable(
            f"{PROGRAM} pmic_read_adc did not print {', '.join(missing)}, and without them the sum is wrong."
        )
    correction = _data()["correction"]
    total_w = sum(values[name, "V"] * values[name, "A"] for name in names)
    return float(correction["slope"] * total_w + correction["offset_w"])


@dataclass(frozen=True)
class Pmic:
    facts: Facts
    program: str

    def read_w(self) -> float:
        try:
            done = subprocess.run(
                [self.program, "pmic_read_adc"], capture_output=True, text=True, timeout=MOST_GAP_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise Unreadable(f"{self.program} pmic_read_adc took longer than {MOST_GAP_S:g} s.") from None
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()[:200]
            raise Unreadable(f"{self.program} pmic_read_adc ended with code {done.returncode}: {said}")
        return corrected_w(done.stdout)

    def window(self, watch: Watch) -> Window:
        return sampled(lambda: timed(self.read_w), RATE_HZ, watch)


def probe(argument: str | None, system: System) -> Pmic:
    """The chip of this board."""
    if argument is not None:
        raise NotHere(f"it takes no argument, and {argument!r} is given. Use --meter pmic")
    program = shutil.which(PROGRAM)
    if program is None:
        raise NotHere(f"the program {PROGRAM} is not there: it comes with Raspberry Pi OS")
    correction = _data()["correction"]
    facts = Facts(
        "pmic",
        PMIC,
        "board, without what hangs on its 5 V: USB devices, HAT, NVMe",
        RATE_HZ,
        rails=tuple(_data()["rails"]["names"]),
        constants={name: correction[name] for name in ("slope", "offset_w")},
        constants_source=correction["source"],
    )
    meter = Pmic(facts, program)
    try:
        meter.read_w()
    except (Unreadable, OSError) as error:
        raise NotHere(f"{error} Only the Raspberry Pi 5 has this chip") from error
    return meter
