"""What a workload costs: counted once from the real model, then read back from disk. Reading back needs no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from harness.costs import Costs
from harness.models import entry
from harness.models.checkpoints import locate
from harness.profile import store
from harness.workload import Workload

#: What the costs of a row depend on. How many rows, how often and with which optimizer is the planner's business.
FIELDS = (
    "model",
    "technique",
    "technique_options",
    "seq_len",
    "decoder_seq_len",
    "new_tokens",
    "image_size",
    "num_channels",
    "num_labels",
    "dtype",
    "attn_implementation",
    "dropout",
    "checkpoint",
)


def count(workload: Workload, accelerator: str = "cpu") -> Costs:
    """The workload's costs on a "cpu" or a "gpu", from `$XDG_CACHE_HOME/orrery/profiles` if they were counted before.

    A cache that is damaged or can't be written gives a warning and is done without, never a wrong result.
    """
    key = content_key(workload, accelerator)
    path = store.folder() / f"{key}.json"
    costs = store.read(path, store.from_dict)
    if costs is None:
        from harness.models import build
        from harness.profile.counting import count_units

        costs = count_units(build(workload, device="meta"), workload, key, accelerator)
        store.write(path, store.to_dict(costs))
    return costs


def content_key(workload: Workload, accelerator: str = "cpu") -> str:
    """A digest of all that the costs depend on: workload, model, checkpoint, our code, torch and transformers."""
    asked = asdict(workload)
    content = {
        "workload": {field: asked[field] for field in FIELDS},
        "accelerator": accelerator,
        "model": asdict(entry(workload.model)),
        "checkpoint": _checkpoint_config(workload.checkpoint),
        "code": _code_digest(),
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _checkpoint_config(checkpoint: str | None) -> str | None:
    """The shape of a checkpoint in a folder; one with a hub name goes by its name."""
    config = Path(locate(checkpoint)) / "config.json" if checkpoint else None
    return config.read_text(encoding="utf-8") if config and config.is_file() else None


@cache
def _code_digest() -> str:
    """Of the code that builds and counts models, so that a change to it is a change of the content."""
    package = files("harness")
    sources = [
        package / "costs.py",
        package / "techniques.py",
        *(package / "models").iterdir(),
        *(package / "profile").iterdir(),
    ]
    digest = hashlib.sha256()
    for source in sorted(sources, key=str):
        if source.name.endswith(".py"):
            digest.update(source.read_bytes())
    return digest.hexdigest()
