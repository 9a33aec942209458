"""Power of a Raspberry Pi 3, 4, 5 from the load of its CPU: a fit of others, for want of a sensor."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from harness.meters.measurement import REGRESSION, Facts, NotHere
from harness.meters.sampler import Watch, sampled
from harness.meters.system import System
from harness.meters.window import Unreadable, Window

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: The kernel counts in hundredths of a second: at a higher rate the load would be of a few counts.
RATE_HZ = 5.0
#: The first reading needs a load, too.
FIRST_S = 0.1
#: user, nice, system, idle, iowait, irq, softirq, steal; the time of guests is in user.
FIELDS, IDLE, IOWAIT = 8, 3, 4


@cache
def _data() -> Mapping[str, Any]:
    return tomllib.loads(files("harness.meters").joinpath("regressions.toml").read_text(encoding="utf-8"))


def boards() -> Mapping[str, Mapping[str, Any]]:
    """Board -> coefficients, and the models it is known by."""
    found: Mapping[str, Mapping[str, Any]] = _data()["boards"]
    return found


def watts(board: str, load: float) -> float:
    """The power at a CPU load from 0 to 1. Raises Unreadable for others."""
    if not 0 <= load <= 1:
        raise Unreadable(f"The CPU load is {load:g}. The regression is for loads from 0 to 1.")
    about = boards()[board]
    return float(about["base_w"] + about["slope_w"] * load)


def counts(path: str) -> tuple[int, int]:
    """(busy, all) counts of all cores since boot, of the first line of /proc/stat."""
    try:
        words = Path(path).read_text(encoding="ascii").partition("\n")[0].split()
        numbers = [int(word) for word in words[1 : 1 + FIELDS]]
        if words[0] != "cpu" or len(numbers) < FIELDS:
            raise ValueError
    except (ValueError, LookupError):
        raise Unreadable(f"{path} does not begin with a line 'cpu' and {FIELDS} counts.") from None
    return sum(numbers) - numbers[IDLE] - numbers[IOWAIT], sum(numbers)


@dataclass
class Regression:
    """Each reading is of the load since the last one. Where nothing was counted since, it is the last one again."""

    facts: Facts
    board: str
    path: str
    _counted: tuple[int, int] | None = None
    _reading: tuple[int, float] | None = None

    def read(self) -> tuple[int, float]:
        if self._counted is None:
            self._counted = counts(self.path)
            time.sleep(FIRST_S)
        at_ns, (busy, total) = time.monotonic_ns(), counts(self.path)
        before_busy, before_total = self._counted
        if total == before_total:
            if self._reading is None:
                raise Unreadable(f"{self.path} counts no time.")
            return self._reading
        self._counted = busy, total
        self._reading = at_ns, watts(self.board, (busy - before_busy) / (total - before_total))
        return self._reading

    def window(self, watch: Watch) -> Window:
        self._counted = self._reading = None
        return sampled(self.read, RATE_HZ, watch)


def probe(argument: str | None, system: System) -> Regression:
    """The fit for this board, or for the one that is named."""
    model = system.board()
    board = argument if argument is not None else _board(model)
    if board is None or board not in boards():
        found = f"there is no board {argument!r}" if argument is not None else f"the board is {model or 'not known'}"
        raise NotHere(f"{found}. There are regressions for: {', '.join(boards())}. Name one: --meter regression:pi-5b")
    about, path = boards()[board], str(system.root / "proc/stat")
    try:
        counts(path)
    except (Unreadable, OSError) as error:
        raise NotHere(str(error)) from error
    facts = Facts(
        "regression",
        REGRESSION,
        "board by its CPU load: memory, network and storage are not seen",
        RATE_HZ,
        constants={name: about[name] for name in ("base_w", "slope_w")},
        constants_source=f"{_data()['source']}, {board}",
    )
    return Regression(facts, board, path)


def _board(model: str | None) -> str | None:
    bits = 64 if platform.machine() in ("aarch64", "x86_64") else 32
    fits = [
        (len(words), name)
        for name, about in boards().items()
        for words in about["models"]
        if words in f"{model}".lower() and about.get("bits", bits) == bits
    ]
    return max(fits)[1] if fits else None
