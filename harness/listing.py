"""What `orrery list` shows, read from file names and data files: no method is imported, and no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from harness import datasets, meters, models, registry
from harness.errors import OrreryError, unknown_name

Entries = list[tuple[str, str]]
METERS = "meters"


def entries(kind: str) -> Entries:
    """(name, summary) of everything of the kind that can be named."""
    if kind not in KINDS:
        raise unknown_name("kind of thing to list", kind, KINDS)
    return KINDS[kind]()


def broken(kind: str) -> dict[str, str]:
    """Methods of the kind that can't be imported, and why."""
    if kind not in registry.METHOD_PACKAGES:
        checked = ", ".join(registry.METHOD_PACKAGES)
        raise OrreryError(f"--check tries what may not work here: it goes with {checked} or {METERS}, not {kind}.")
    return {name: why for name, why in registry.check_methods(kind).items() if why is not None}


def meters_here() -> Iterator[tuple[str, str | None]]:
    """Every meter, and why it can't be used on this machine, if so."""
    yield from meters.here().items()


def _methods(kind: str) -> Entries:
    return [(entry.name, entry.summary) for entry in registry.methods().values() if entry.kind == kind]


def _models() -> Entries:
    return [(name, models.entry(name).source) for name in models.names()]


def _datasets() -> Entries:
    specs = [datasets.spec(name) for name in datasets.names()]
    return [(spec.name, f"{spec.kind}, {spec.num_samples} samples. {spec.source}") for spec in specs]


KINDS: dict[str, Callable[[], Entries]] = {
    registry.SYSTEMS: lambda: _methods(registry.SYSTEMS),
    registry.BASELINES: lambda: _methods(registry.BASELINES),
    "testbeds": registry.testbeds,
    "devices": registry.devices,
    "models": _models,
    "datasets": _datasets,
    "experiments": registry.experiments,
    METERS: lambda: list(meters.SUMMARIES.items()),
}
