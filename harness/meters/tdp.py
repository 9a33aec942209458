"""CodeCarbon's model of a machine: a processor's nominal power times its load, and watts per memory module.

It measures no ARM board, and is never chosen unless it is named. What it gives is labelled `tdp-model`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from harness.carbon import J_PER_KWH
from harness.meters.measurement import TDP_MODEL, Facts, NotHere
from harness.meters.sampler import Watch
from harness.meters.system import System
from harness.meters.window import FEWEST_SAMPLES, Window

PERIOD_S = 1.0
#: The offline tracker wants a country. It is for emissions, which are not used here, and changes no energy.
ANY_COUNTRY = "USA"
SETTINGS = "CODECARBON_"


@dataclass(frozen=True)
class TdpModel:
    facts: Facts

    def window(self, watch: Watch) -> Window:
        with _alone():
            return _tracked(watch)


def _tracked(watch: Watch) -> Window:
    """One tracker per window: it can't be started twice. It swallows its own errors, so that what is missing is one."""
    from codecarbon import OfflineEmissionsTracker

    tracker = OfflineEmissionsTracker(
        country_iso_code=ANY_COUNTRY,
        tracking_mode="machine",
        measure_power_secs=PERIOD_S,
        save_to_file=False,
        log_level="error",
        allow_multiple_runs=True,
    )
    tracker.start()
    begin_ns = watch.now_ns()
    watch.begun()
    watch.ended(None)
    tracker.stop()
    duration_s = (watch.now_ns() - begin_ns) / 1e9
    found = getattr(tracker, "final_emissions_data", None)
    if found is None or not found.energy_consumed > 0:
        return Window(duration_s, reason="CodeCarbon gave no energy. Its own messages are on standard error.")
    if duration_s < FEWEST_SAMPLES * PERIOD_S:
        why = f"The window is of {duration_s:.2g} s: no figure below {FEWEST_SAMPLES} looks, one per {PERIOD_S:g} s."
        return Window(duration_s, reason=why)
    energy_j = found.energy_consumed * J_PER_KWH
    return Window(duration_s, energy_j, energy_j / duration_s)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Without the user's settings, of which some change the figure and some send it away, and without telemetry.

    The settings are variables, and files in the home folder and the current one.
    """
    environment, folder = dict(os.environ), os.getcwd()
    with tempfile.TemporaryDirectory(prefix="orrery-codecarbon-") as empty:
        try:
            for name in [name for name in os.environ if name.startswith(SETTINGS)]:
                del os.environ[name]
            os.environ |= {"HOME": empty, f"{SETTINGS}TELEMETRY_LEVEL": "disabled"}
            os.chdir(empty)
            yield
        finally:
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)


def probe(argument: str | None, system: System) -> TdpModel:
    """CodeCarbon, where it is installed."""
    if argument is not None:
        raise NotHere(f"it takes no argument, and {argument!r} is given. Use --meter codecarbon")
    try:
        about = f"codecarbon {version('codecarbon')}"
    except PackageNotFoundError as error:
        raise NotHere("it is not installed. Install it: pip install codecarbon") from error
    scope = "a model of processor and memory, with counters in their place where CodeCarbon finds them"
    return TdpModel(Facts(about, TDP_MODEL, scope, 1 / PERIOD_S))
