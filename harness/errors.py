"""Errors for the person at the keyboard: one paragraph, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OrreryError(Exception):
    """A mistake the user can mend. The message says what was found, what is allowed and what to do next."""


class OutOfMemory(Exception):
    """No plan fits the memory of `device`. Becomes a row with status `oom`, never a crash."""

    def __init__(self, device: str, needed_bytes: int, available_bytes: int, detail: str = ""):
        self.device = device
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        missing_mib = (needed_bytes - available_bytes) / 2**20
        text = (
            f"{device} needs {needed_bytes / 2**20:.1f} MiB and has {available_bytes / 2**20:.1f} MiB "
            f"({missing_mib:.1f} MiB missing)"
        )
        super().__init__(f"{text}; {detail}" if detail else text)


class BatteryEmpty(Exception):
    """A device's battery does not last the run. Becomes a row with status `failed`, never a crash."""

    def __init__(self, device: str, needed_j: float, battery_j: float, at_s: float, samples: int):
        self.device, self.needed_j, self.battery_j, self.at_s, self.samples = device, needed_j, battery_j, at_s, samples
        super().__init__(
            f"the battery of {device} holds {battery_j:.6g} J and the run takes {needed_j:.6g} J of it: it is empty "
            f"after {at_s:.6g} s and {samples} samples"
        )


class Unsupported(Exception):
    """A method can't express this workload on this cluster. Becomes a row with status `unsupported`."""


class Broken(Exception):
    """A method broke while it planned, or made what can't even be checked. Becomes a row with status `failed`."""


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> OrreryError:
    """The error for a name that is not in the library, with the nearest names that are."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name, allowed, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(allowed)}."
    return OrreryError(f"There is no {kind} called {name!r}. {hint}")
