"""INA3221 rails in sysfs: every Jetson but the Nano 2 GB. Totals by the board's table, never by a name's pattern.

Two layouts: up to L4T 32 `rail_name_N` with mW in `in_powerN_input`, N = 0..2; from L4T 34 on `inN_label` with mV in
`inN_input` and mA in `currN_input`, N = 1..3 (`in7` is the sum of shunt voltages). The label NC means: not connected.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from harness.meters.measurement import RAIL, Facts, NotHere
from harness.meters.sampler import Watch, sampled, timed
from harness.meters.system import System
from harness.meters.window import Unreadable, Window

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RATE_HZ = 20.0
NOT_CONNECTED = "NC"
OLD = "sys/bus/i2c/drivers/ina3221x"
NEW = "sys/bus/i2c/drivers/ina3221"
#: Beyond the third channel of the newer layout are sums.
CHANNELS = (1, 2, 3)
OVERRIDE = "Name the rails to add, such as --meter ina3221:VDD_IN, or a board of harness/meters/rails.toml"


@dataclass(frozen=True)
class Channel:
    """One rail: the file of its label, and those of its power in mW, or of its voltage in mV and current in mA."""

    label: str
    label_file: str
    value_files: tuple[str, ...]

    def check(self) -> None:
        """Raises Unreadable where it is not connected any more."""
        if (label := _read(self.label_file)) != self.label:
            raise Unreadable(f"{self.label_file} says {label!r}, and said {self.label!r} before: the rail is gone.")

    def watts(self) -> float:
        """What it draws now. Raises Unreadable where a file holds no number."""
        values = [_number(path) for path in self.value_files]
        return values[0] / 1e3 if len(values) == 1 else values[0] * values[1] / 1e6


@dataclass(frozen=True)
class Rails:
    """The sum of some rails."""

    facts: Facts
    channels: tuple[Channel, ...]

    def read_w(self) -> float:
        powers = [(channel.watts(), channel.label) for channel in self.channels]
        for watts, label in powers:
            if watts < 0:  # in a sum it would hide
                raise Unreadable(f"The rail {label} reads {watts:g} W. A rail can't draw less than nothing.")
        return sum(watts for watts, _ in powers)

    def window(self, watch: Watch) -> Window:
        """Labels are read once, at the end: each file is a good part of what a reading costs."""
        window = sampled(lambda: timed(self.read_w), RATE_HZ, watch)
        try:
            for channel in self.channels:
                channel.check()
        except Unreadable as error:
            return Window(window.duration_s, samples=window.samples, reason=str(error))
        return window


@cache
def boards() -> Mapping[str, Mapping[str, Any]]:
    return tomllib.loads(files("harness.meters").joinpath("rails.toml").read_text(encoding="utf-8"))


def probe(argument: str | None, system: System) -> Rails:
    """The rails of this board, of the board that is named, or those that are listed (`VDD_IN,VDD_MUX`)."""
    found = channels(system.root)
    board = argument if argument in boards() else _board(system.board())
    if board is not None and "without_sensor" in boards()[board]:
        raise NotHere(boards()[board]["without_sensor"])
    if not found:
        raise NotHere(f"there is no INA3221 in {system.root / NEW} or {system.root / OLD}")
    if argument is not None and argument not in boards():
        wanted = [label.strip() for label in argument.split(",")]
        scope, carrier = "the rails that were named", None
    elif board is None:
        model = system.board() or "not given by the device tree"
        raise NotHere(f"the board is {model!r}, which is in no table. {_labels(found)} {OVERRIDE}")
    else:
        wanted, scope, carrier = _total(board, found)
    chosen = tuple(_one(label, found, system.root) for label in wanted)
    _check_double(wanted, board)
    rails = Rails(Facts("ina3221", RAIL, scope, RATE_HZ, tuple(wanted), carrier_included=carrier), chosen)
    try:
        rails.read_w()
    except Unreadable as error:
        raise NotHere(str(error)) from error
    return rails


def channels(root: Path) -> list[Channel]:
    """Every connected channel of every INA3221, in both layouts. The numbers of `hwmon` differ between boots."""
    found = []
    for name in sorted((root / OLD).glob("*/iio:device*/rail_name_*")):
        number = name.name.removeprefix("rail_name_")
        found.append((name, [name.parent / f"in_power{number}_input"]))
    for n in CHANNELS:
        for name in sorted((root / NEW).glob(f"*/hwmon/hwmon*/in{n}_label")):
            found.append((name, [name.parent / f"in{n}_input", name.parent / f"curr{n}_input"]))
    try:
        labelled = [(_read(str(name)), name, values) for name, values in found]
    except Unreadable as error:
        raise NotHere(f"{error} Mend its permissions, or run as one who may read it") from error
    return [
        Channel(label, str(name), tuple(map(str, values))) for label, name, values in labelled if label != NOT_CONNECTED
    ]


def _board(model: str | None) -> str | None:
    """The board of the table with the longest words in the model."""
    fits = [
        (len(words), name)
        for name, about in boards().items()
        for words in about["models"]
        if words in f"{model}".lower()
    ]
    return max(fits)[1] if fits else None


def _total(board: str, found: Sequence[Channel]) -> tuple[list[str], str, bool | None]:
    """The labels that add up to the board, what they cover, and whether the carrier board is in it."""
    about, there = boards()[board], {channel.label for channel in found}
    optional = about.get("total_if_there", [])
    if all(label in there for label in optional):
        return [*about["total"], *optional], about["scope"], about["carrier_included"]
    return about["total"], about["scope_without"], False


def _one(label: str, found: Sequence[Channel], root: Path) -> Channel:
    named = [channel for channel in found if channel.label == label]
    if len(named) == 1:
        return named[0]
    amount = "twice" if named else "not"
    raise NotHere(f"the rail {label} is {amount} in {root / 'sys/bus/i2c/drivers'}. {_labels(found)} {OVERRIDE}")


def _check_double(wanted: Sequence[str], board: str | None) -> None:
    """Refuse a rail beside the one that feeds it."""
    if len(set(wanted)) < len(wanted):
        raise NotHere(f"the rails {', '.join(wanted)} name one twice. Name each once")
    for parent, children in (boards()[board]["children"] if board is not None else {}).items():
        for child in children:
            if parent in wanted and child in wanted:
                raise NotHere(f"{child} is fed by {parent}, so adding both would count twice. Leave one of them out")


def _labels(found: Sequence[Channel]) -> str:
    return f"Labels found: {', '.join(sorted(channel.label for channel in found)) or 'none'}."


def _read(path: str) -> str:
    """A file of sysfs, which is short. Opened anew each time: one that has gone is noticed."""
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            return os.read(file, 64).decode(errors="replace").strip()
        finally:
            os.close(file)
    except OSError as error:  # not all of them say which file
        raise Unreadable(f"{path} can't be read: {error.strerror}.") from None


def _number(path: str) -> float:
    text = _read(path)
    try:
        return float(text)
    except ValueError:
        raise Unreadable(f"{path} holds {text!r}. It must hold a number.") from None
