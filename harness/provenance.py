"""Where a record's numbers come from: code, libraries, machine."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DISTRIBUTION = "orrery-bench"
#: Libraries whose version can change a number.
LIBRARIES = ("torch", "transformers", "datasets", "numpy", "scikit-learn", "scipy", "pandas", "pydantic")


@cache
def package_version() -> str | None:
    return _version(DISTRIBUTION)


@cache
def libraries() -> dict[str, str]:
    """Versions of what is installed, read from metadata: nothing is imported."""
    found = {name: _version(name) for name in LIBRARIES}
    return {name: number for name, number in found.items() if number is not None}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


@cache
def code_digest() -> str:
    """Of every source and data file that can change a result: a run made by other code is another run."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in ("harness", "baselines", "systems", "testbeds"):
        for source in sorted(root.joinpath(package).rglob("*")):
            if source.suffix in (".py", ".toml"):
                digest.update(str(source.relative_to(root)).encode() + source.read_bytes())
    return digest.hexdigest()


@cache
def git_state() -> tuple[str | None, bool | None]:
    """(commit, dirty) of the checkout this code runs from; (None, None) where it is installed without one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None, None
    try:
        return _git(root, "rev-parse", "HEAD"), bool(_git(root, "status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@cache
def host() -> dict[str, str | int]:
    return {
        "name": platform.node(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpus": os.cpu_count() or 1,
    }
