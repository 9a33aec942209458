"""The machine a meter is on, as its files tell: the board, and the state that its power depends on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class System:
    """A machine by the root of its file tree. Where a file is hidden, as in containers, what it says is None."""

    root: Path = Path("/")

    def board(self) -> str | None:
        """The model that the device tree names; its text ends in a NUL byte."""
        return self._text("proc/device-tree/model")

    def power_mode(self) -> str | None:
        """The mode that nvpmodel has set on a Jetson."""
        return self._text("var/lib/nvpmodel/status")

    def clocks_pinned(self) -> bool | None:
        """Whether the first core's lowest and highest frequency are the same, as `jetson_clocks` sets them."""
        folder = "sys/devices/system/cpu/cpu0/cpufreq"
        lowest, highest = (self._text(f"{folder}/scaling_{end}_freq") for end in ("min", "max"))
        return None if lowest is None or highest is None else lowest == highest

    def release(self) -> str | None:
        """The L4T release of a Jetson, or else the operating system's name."""
        tegra = self._text("etc/nv_tegra_release")
        if tegra is not None:
            return tegra.splitlines()[0].lstrip("# ")
        lines = (self._text("etc/os-release") or "").splitlines()
        names = [line.partition("=")[2].strip('"') for line in lines if line.startswith("PRETTY_NAME=")]
        return names[0] if names else None

    def _text(self, place: str) -> str | None:
        try:
            text = (self.root / place).read_text(encoding="utf-8", errors="replace").replace("\0", "").strip()
        except OSError:
            return None
        return text or None
