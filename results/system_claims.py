"""What is claimed of a system whose cells nobody knows, beside our own: the most, or the range, of how many times as
long or as many the others take, and scaling. A claim is reached or not reached, and neither passed nor failed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd

from harness.experiment import COMPUTED
from harness.records import Record
from results import recovery, scaling
from results.grids import defaults
from results.settings import COMMON
from results.tables import Table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: The systems of which something is claimed: each has a file of claims.
SYSTEMS = ("galaxy", "asteroid")
Claim = Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """One of our numbers, and where it comes from."""

    value: float
    where: str


@cache
def load(system: str) -> dict[str, Any]:
    """The system's file of claims."""
    text = files("results").joinpath("reference").joinpath(f"{system}_claims.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def tables(records: Sequence[Record]) -> Iterator[tuple[str, Table]]:
    """The title of each system of which some claim has a number of ours, and those claims."""
    for system in SYSTEMS:
        if (found := table(system, records)) is not None:
            yield load(system)["title"], found


def table(system: str, records: Sequence[Record]) -> Table | None:
    """The claims that some of the records have a number for; None where there are none."""
    about = load(system)
    rows = []
    for claim in about["claim"]:
        ours = list(_ours(system, claim, records))
        if ours:
            reached = max(found.value for found in ours) >= max(claim["value"])
            rows.append(
                {
                    "claim": claim["words"],
                    "claimed": _joined(claim["value"], claim["unit"]),
                    "confidence": claim["confidence"],
                    "ours": _joined([round(found.value, 2) for found in ours], claim["unit"]),
                    "is": "reached" if reached else "not reached",
                    "from": "; ".join(found.where for found in ours),
                    "note": claim["note"],
                }
            )
    if not rows:
        return None
    title = f"What is claimed of {about['title']}, and ours"
    return Table(f"{system}-claims", title, pd.DataFrame(rows), notes=(about["note"],))


def _joined(values: Sequence[float], unit: str) -> str:
    return f"{' to '.join(f'{value:g}' for value in values)} {unit}"


def _ours(system: str, claim: Claim, records: Sequence[Record]) -> Iterator[Found]:
    """The most, or the least and the most, or one number; nothing where no run gives any."""
    if claim["take"] == "efficiency":
        yield from _efficiencies(system, claim, records)
        return
    ratios = _recoveries(claim, records) if claim["take"] == "recovery" else _ratios(system, claim, records)
    found = sorted(ratios, key=lambda found: found.value)
    if found and claim["take"] == "range":
        yield found[0]
    if found:
        yield found[-1]


def _ratios(system: str, claim: Claim, records: Sequence[Record]) -> Iterator[Found]:
    """What the baselines take over what the system does, wherever both were simulated alike."""
    options = {**load(system)["options"], **claim.get("options", {})}
    runs = [
        run
        for run in records
        if getattr(run, claim["of"])
        and (run.mode, run.new_tokens, run.inject) == (COMPUTED, None, None)
        and any(fnmatchcase(run.testbed, name) for name in claim["testbeds"])
        and _stands(run, options)
    ]
    own = {_place(run): run for run in runs if run.method == system}
    for run in runs:
        if run.method in claim["methods"] and (ours := own.get(_place(run))) is not None:
            ratio = getattr(run, claim["of"]) / getattr(ours, claim["of"])
            yield Found(ratio, f"{run.method}, {run.model} on {run.testbed}")


def _recoveries(claim: Claim, records: Sequence[Record]) -> Iterator[Found]:
    """How many times as long it took the others to catch up after a failure."""
    for run, ratio in recovery.times_as_long(records):
        if run.mode == COMPUTED and any(fnmatchcase(run.testbed, name) for name in claim["testbeds"]):
            how = f"{recovery.how(run)}, {recovery.replayed(run)} rounds replayed"
            yield Found(ratio, f"{run.inject}, {how}, {run.model} on {run.testbed}")


def _stands(record: Record, options: Mapping[str, Mapping[str, object]]) -> bool:
    """Whether the run stands for the paper's method: its options are the defaults, or as the file of claims says."""
    wanted = {**defaults(record.method), **options.get(record.method, {})}
    return all(record.method_options.get(key, value) == value for key, value in wanted.items())


def _place(record: Record) -> tuple[object, ...]:
    return record.model, *(getattr(record, name) for name in COMMON)


def _efficiencies(system: str, claim: Claim, records: Sequence[Record]) -> Iterator[Found]:
    """Weak scaling with the fewest tokens per device that were run, on the claim's boards."""
    options = load(system)["options"]
    runs = [
        run
        for run in records
        if (run.method, run.mode, run.inject) == (system, COMPUTED, None) and _stands(run, options)
    ]
    for group in scaling.groups(runs):
        if claim["boards"] not in {run.testbed for run in group.records}:
            continue
        for key in group.seconds:
            tokens = min(length for _, length in group.seconds[key])
            value = group.weak(key, claim["devices"], tokens)
            if key[0] == claim["model"] and value is not None:
                yield Found(value, f"{tokens} tokens per device, {claim['boards']}")


def text(records: Sequence[Record]) -> str:
    """The tables for a terminal; empty where no run has to do with a claim."""
    return "\n\n".join(found.text() for _, found in tables(records))
