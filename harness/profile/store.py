"""Costs on disk: exact JSON with a digest, whole files or none."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from harness.costs import Affine, Costs, ParameterCost, TensorCost, UnitCost, WidthCut, Work

#: Per direction and unit, seconds by rows: ((rows, seconds), ...), as `Costs.measured` holds them.
Seconds = dict[str, tuple[tuple[tuple[int, float], ...], ...]]
Content = TypeVar("Content")


class Timed(NamedTuple):
    """What the units of a workload cost on one machine, and how fast a core of it was then, in FLOP/s.

    `fixed_shares` as `Costs.fixed_shares` has them.
    """

    seconds: Seconds
    core_flops_per_s: float
    fixed_shares: tuple[float, ...] = ()


def folder() -> Path:
    """`$XDG_CACHE_HOME/orrery/profiles`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orrery" / "profiles"


def read(path: Path, decode: Callable[[Any], Content]) -> Content | None:
    """The decoded file, or None where there is none. One that is damaged or locked gives a warning and None."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["sha256"] != _digest(stored["content"]):
            raise ValueError("its digest does not match")
        return decode(stored["content"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(f"The cache file {path} can't be used ({error!r}); what it held is made again.", stacklevel=3)
        return None


def write(path: Path, content: Any) -> None:
    """Write the file whole: a reader, or a crash, sees all of it or none. Where that fails, a warning says so."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(json.dumps({"sha256": _digest(content), "content": content}), encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(
            f"The cache file {path} can't be written ({error.strerror or error}), so this work will be done again next "
            "time. Set XDG_CACHE_HOME to a folder that can be written.",
            stacklevel=3,
        )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def to_dict(costs: Costs) -> dict[str, Any]:
    """Plain dicts, lists and numbers. Measured seconds belong to one machine and are stored apart."""
    return {
        "key": costs.key,
        "units": [asdict(unit) for unit in costs.units],
        "local_units": [asdict(unit) for unit in costs.local_units],
        "tensors": {name: asdict(tensor) for name, tensor in costs.tensors.items()},
        "parameters": {name: asdict(parameter) for name, parameter in costs.parameters.items()},
        "inputs": costs.inputs,
        "training": costs.training,
        "loaded": costs.loaded,
        "kept": costs.kept,
        "decoding": None if costs.decoding is None else to_dict(costs.decoding),
    }


def from_dict(content: dict[str, Any]) -> Costs:
    """The inverse of `to_dict`."""
    return Costs(
        key=content["key"],
        units=tuple(_unit(**unit) for unit in content["units"]),
        local_units=tuple(_unit(**unit) for unit in content["local_units"]),
        tensors={name: TensorCost(**tensor) for name, tensor in content["tensors"].items()},
        parameters={name: ParameterCost(**parameter) for name, parameter in content["parameters"].items()},
        inputs=tuple(content["inputs"]),
        training=content["training"],
        loaded=tuple(content["loaded"]),
        kept=tuple(content["kept"]),
        decoding=None if content["decoding"] is None else from_dict(content["decoding"]),
    )


def timed_from_dict(content: dict[str, Any]) -> Timed:
    """The inverse of `Timed._asdict` after a round trip through JSON, which knows no tuples."""
    seconds = {
        direction: tuple(tuple((rows, seconds) for rows, seconds in points) for points in units)
        for direction, units in content["seconds"].items()
    }
    return Timed(seconds, content["core_flops_per_s"], tuple(content["fixed_shares"]))


def _unit(**content: Any) -> UnitCost:
    for name in ("reads", "writes", "saves", "parameters"):
        content[name] = tuple(content[name])
    for name in ("saved", "forward_workspace", "backward_workspace"):
        content[name] = Affine(*content[name])
    for name in ("forward", "backward"):
        content[name] = Work(*(Affine(*line) for line in content[name]))
    if content["cut"] is not None:
        width, granule, whole = content["cut"]
        content["cut"] = WidthCut(width, granule, tuple(whole))
    return UnitCost(**content)
