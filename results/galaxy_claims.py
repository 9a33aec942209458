"""What is claimed of Galaxy beside our own: the most, or the range, of our speed-ups, and our scaling."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd

from harness.experiment import COMPUTED
from harness.records import Record
from results import scaling
from results.tables import Table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

METHOD = "galaxy"
LEADS = {"embeddings": "leader"}
#: The options with which our runs stand for the paper's system, and for its baselines.
STANDS: dict[str, dict[str, object]] = {
    METHOD: {"overlap": True, "split": "heuristic", "scheme": "hybrid", "choose": "all", "tiles": 1, **LEADS},
    "megatron": {"shares": "equal", "tiles": 1, **LEADS},
    "sequence-parallel": {"shares": "equal", "tiles": 1, **LEADS},
}


@dataclass(frozen=True)
class Found:
    """One of our numbers, and where it comes from."""

    value: float
    where: str


@cache
def _claims() -> list[dict[str, Any]]:
    text = files("results").joinpath("reference").joinpath("galaxy_claims.toml").read_text(encoding="utf-8")
    claims: list[dict[str, Any]] = tomllib.loads(text)["claim"]
    return claims


def table(records: Sequence[Record]) -> Table | None:
    """The claims that some of the records have a number for; None where there are none."""
    rows = []
    for claim in _claims():
        ours = list(_ours(claim, records))
        if ours:
            rows.append(
                {
                    "claim": claim["words"],
                    "claimed": _joined(claim["value"], claim["unit"]),
                    "confidence": claim["confidence"],
                    "ours": _joined([round(found.value, 2) for found in ours], claim["unit"]),
                    "from": "; ".join(found.where for found in ours),
                    "note": claim["note"],
                }
            )
    if not rows:
        return None
    return Table("galaxy-claims", "What is claimed of Galaxy, and ours", pd.DataFrame(rows), notes=(NOTE,))


NOTE = (
    "Ours are of devices, links, budgets and compositions that are assumed, with a planner whose equations are, "
    "too: no cell of the paper is known, and none of these is a target."
)


def _joined(values: Sequence[float], unit: str) -> str:
    return f"{' to '.join(f'{value:g}' for value in values)} {unit}"


def _ours(claim: Mapping[str, Any], records: Sequence[Record]) -> Iterator[Found]:
    """The most, or the least and the most, or one number; nothing where no run gives any."""
    if claim["take"] == "efficiency":
        yield from _efficiencies(claim, records)
        return
    found = sorted(_speedups(claim, records), key=lambda found: found.value)
    if found and claim["take"] == "range":
        yield found[0]
    if found:
        yield found[-1]


def _speedups(claim: Mapping[str, Any], records: Sequence[Record]) -> Iterator[Found]:
    """How many times as long as Galaxy the baselines take, wherever both were simulated alike."""
    runs = [r for r in records if r.latency_s and r.testbed in claim["testbeds"] and _stands(r)]
    runs = [run for run in runs if run.mode == COMPUTED and not run.new_tokens]
    own = {_place(run): run for run in runs if run.method == METHOD}
    for run in runs:
        if run.method in claim["methods"] and (galaxy := own.get(_place(run))) is not None:
            assert run.latency_s is not None and galaxy.latency_s is not None
            yield Found(run.latency_s / galaxy.latency_s, f"{run.method}, {run.model} on {run.testbed}")


def _stands(record: Record) -> bool:
    wanted = STANDS.get(record.method)
    return wanted is not None and all(record.method_options.get(key, value) == value for key, value in wanted.items())


def _place(record: Record) -> tuple[object, ...]:
    return record.model, record.testbed, record.dataset, record.seq_len, record.batch_size, record.dtype


def _efficiencies(claim: Mapping[str, Any], records: Sequence[Record]) -> Iterator[Found]:
    """Weak scaling with the fewest tokens per device that were run, on the claim's boards."""
    runs = [record for record in records if _stands(record) and (record.method, record.mode) == (METHOD, COMPUTED)]
    for group in scaling.groups(runs):
        if claim["boards"] not in {run.testbed for run in group.records}:
            continue
        for key in group.seconds:
            tokens = min(length for _, length in group.seconds[key])
            value = group.weak(key, claim["devices"], tokens)
            if key[0] == claim["model"] and value is not None:
                yield Found(value, f"{tokens} tokens per device, {claim['boards']}")


def text(records: Sequence[Record]) -> str:
    """The table for a terminal; empty where no run has to do with a claim."""
    found = table(records)
    return "" if found is None else found.text()
