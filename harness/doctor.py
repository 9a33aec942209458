"""What stands in the way of a run on this machine: each check says what was found and what to do about it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

from harness import meters, provenance, registry
from harness.errors import OrreryError
from harness.profile.store import folder
from harness.registry import Finding as Check

PACKAGES = ("harness", "baselines", "systems", "testbeds", "results")
REQUIRED = ("torch", "transformers", "datasets", "numpy", "pandas", "pydantic")
OLDEST_PYTHON = (3, 10)
#: Room for the records and pictures of a campaign.
ENOUGH_BYTES = 100 * 2**20


def examine(out: Path, testbed: str | None = None) -> list[Check]:
    """All checks, in the order in which they are worth mending."""
    checks = [_python(), *map(_library, REQUIRED), *map(_package, PACKAGES), _writable("cache", folder())]
    checks += [_writable("results", out), _disk(out)]
    for kind in registry.METHOD_PACKAGES:
        checks += [_method(name, why) for name, why in registry.check_methods(kind).items()]
    checks += [_leftovers(), _meter()]
    if testbed is not None:
        checks += _testbed(testbed)
    return checks


def _python() -> Check:
    ok = sys.version_info >= OLDEST_PYTHON
    oldest = ".".join(map(str, OLDEST_PYTHON))
    return Check("python", ok, platform.python_version(), "" if ok else f"Install Python {oldest} or newer.")


def _library(name: str) -> Check:
    version = provenance.libraries().get(name)
    if version is None:
        return Check(name, False, "not installed", f"Install it: pip install {name}")
    return Check(name, True, version)


def _package(name: str) -> Check:
    """Another distribution with a folder of the same name would silently take our place."""
    home = Path(__file__).resolve().parent.parent
    spec = importlib.util.find_spec(name)
    places = [Path(place).resolve() for place in spec.submodule_search_locations or ()] if spec else []
    if places == [home / name]:
        return Check(f"package {name}", True, str(home / name))
    found = ", ".join(map(str, places)) or "not found"
    remedy = f"It must be {home / name}. Remove the other package of that name, or call from another folder."
    return Check(f"package {name}", False, found, remedy)


def _writable(name: str, folder: Path) -> Check:
    """The folder itself, or the nearest one above it that exists and would have to take it."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    ok = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    remedy = f"Make {place} a folder that you can write to, or choose another one."
    return Check(f"{name} folder", ok, str(folder), "" if ok else remedy)


def _disk(folder: Path) -> Check:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    ok = free >= ENOUGH_BYTES
    return Check("free disk", ok, f"{free / 2**30:.1f} GiB", "" if ok else f"Free {ENOUGH_BYTES / 2**20:.0f} MiB.")


def _method(name: str, why: str | None) -> Check:
    remedy = f"Mend or remove the method {name}; the others work without it."
    return Check(f"method {name}", why is None, why or "imports", remedy if why else "")


def _leftovers() -> Check:
    found = registry.leftovers().find()
    remedy = "`orrery doctor --clean` removes what dead runs have left."
    return Check("leftovers of dead runs", not found, ", ".join(found) or "none", remedy if found else "")


def _meter() -> Check:
    """A machine without a meter is whole: its runs say that nothing was measured."""
    probe, why = meters.found()
    return Check("meter", True, why if probe is None else f"{probe.facts.meter}, {probe.facts.scope}")


def _testbed(name: str) -> list[Check]:
    """The testbed itself, and whether each of its modes can run here."""
    try:
        testbed = registry.load_testbed(name)
    except OrreryError as error:
        return [Check(f"testbed {name}", False, str(error), "Name another testbed, or mend its file.")]
    devices = len(testbed.cluster.devices)
    found = f"{devices} device{'s'[: devices != 1]}; modes: {', '.join(testbed.modes)}"
    checks = [Check(f"testbed {name}", True, found)]
    for mode in testbed.modes:
        checks += [
            Check(f"{mode}: {c.name}", c.ok, c.found, "" if c.ok else c.remedy)
            for c in registry.load_mode(mode).examine(testbed)
        ]
    return checks
