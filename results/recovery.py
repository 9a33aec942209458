"""How long devices took to go on without one that was lost, and lightweight beside heavy recovery.

Recovery is what lies between the moment when the loss is known and the first round on the new plan: planning,
regrouping and transfers. Detection is apart: it measures a timeout. With the rounds since the snapshot, done again, and
the round in which it happened, the run is where it would have been.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

import pandas as pd

from harness.records import Record, Recovery
from results.tables import Table, significant

LIGHTWEIGHT = "lightweight"
SECONDS = {
    "detect, s": "detect_s",
    "plan, s": "replan_s",
    "regroup, s": "regroup_s",
    "transfer, s": "transfer_s",
    "replay, s": "replay_s",
    "first round, s": "first_step_s",
}
RATES = {
    "samples/s before": "throughput_before_samples_per_s",
    "samples/s after": "throughput_after_samples_per_s",
}


def members(records: Sequence[Record]) -> list[Record]:
    """The runs in which devices were lost."""
    return [record for record in records if record.inject is not None]


def took_s(recovery: Recovery) -> float | None:
    """Planning, regrouping and transfers; None where the next failure came before they were over."""
    if recovery.transfer_s is None:
        return None
    return (recovery.replan_s or 0.0) + recovery.regroup_s + recovery.transfer_s


def caught_up_s(recovery: Recovery) -> float | None:
    """From the moment when the loss is known until the round in which it happened is over."""
    took = took_s(recovery)
    if took is None or recovery.replay_s is None or recovery.first_step_s is None:
        return None
    return took + recovery.replay_s + recovery.first_step_s


def tables(records: Sequence[Record]) -> Iterator[Table]:
    """Every recovery of runs that went on, and where both kinds were run on the same failures, their ratio."""
    runs = [record for record in members(records) if record.recovery]
    if not runs:
        return
    rows = sorted((_row(run, recovery) for run in runs for recovery in run.recovery or ()), key=_order)
    numbers = dict.fromkeys((*SECONDS, *RATES, "recovery, s", "caught up, s", "moved, MB"), significant)
    notes = (
        "Recovery: planning, regrouping and transfers. Caught up: with the rounds that are done again, too. In virtual "
        "time planning takes none. Of several runs each number is the median.",
    )
    yield Table("recovery", "Devices that were lost, and how runs went on", pd.DataFrame(rows), numbers, 7, notes)
    ratios = list(_ratios(runs))
    if ratios:
        title = f"How many times as long other recovery takes as {LIGHTWEIGHT}"
        columns = dict.fromkeys(("median", "least", "most"), "{:.3g}x".format)
        notes = (
            "Where nothing has to move, lightweight recovery is but new connections, and in virtual time no plan.",
        )
        yield Table("recovery-ratios", title, pd.DataFrame(ratios), columns | {"failures": "{:.0f}".format}, 6, notes)


def _row(run: Record, recovery: Recovery) -> dict[str, object]:
    return {
        "model": run.model,
        "testbed": run.testbed,
        "mode": run.mode,
        "failure": recovery.fault,
        "recovery": how(run),
        "runs": run.repeats,
        "replayed rounds": recovery.in_round - recovery.back_to_round,
        **{column: getattr(recovery, field) for column, field in SECONDS.items()},
        "recovery, s": took_s(recovery),
        "caught up, s": caught_up_s(recovery),
        "moved, MB": None if recovery.moved_bytes is None else recovery.moved_bytes / 1e6,
        **{column: getattr(recovery, field) for column, field in RATES.items()},
    }


def _order(row: Mapping[str, object]) -> tuple[str, ...]:
    columns = ("model", "testbed", "mode", "replayed rounds", "failure")
    how = str(row["recovery"])
    return (*(str(row[column]) for column in columns), "" if how == LIGHTWEIGHT else how)


def how(run: Record) -> str:
    """The kind of recovery, as the method's options have it."""
    kind = str(run.method_options.get("recovery", run.method))
    collector = run.method_options.get("collector")
    return kind if collector is None or kind == LIGHTWEIGHT else f"{kind}, {collector} collects"


def times_as_long(
    records: Sequence[Record], seconds: Callable[[Recovery], float | None] = caught_up_s
) -> Iterator[tuple[Record, float]]:
    """Of every failure that was run with lightweight recovery, too: the run with another one, and how many times as
    long that took."""
    runs = [record for record in members(records) if record.recovery]
    light = {_failure(run): run for run in runs if how(run) == LIGHTWEIGHT}
    for run in runs:
        ours, theirs = _total(light.get(_failure(run)), seconds), _total(run, seconds)
        if how(run) != LIGHTWEIGHT and ours is not None and theirs is not None:
            yield run, theirs / ours


def _failure(run: Record) -> tuple[object, ...]:
    return run.model, run.testbed, run.mode, run.inject, replayed(run)


def replayed(run: Record) -> int:
    """Rounds that were done again because the snapshot was older than the failure."""
    return sum(recovery.in_round - recovery.back_to_round for recovery in run.recovery or ())


def _ratios(runs: Sequence[Record]) -> Iterator[dict[str, object]]:
    """Of each model on each testbed in each mode, over the failures that both kinds of recovery were run on."""
    found: dict[tuple[str, str, str, str, str, int], list[float]] = {}
    for what, seconds in (("recovery", took_s), ("caught up", caught_up_s)):
        for run, ratio in times_as_long(runs, seconds):
            found.setdefault((run.model, run.testbed, run.mode, how(run), what, replayed(run)), []).append(ratio)
    for (model, testbed, mode, other, what, rounds), ratios in sorted(found.items()):
        about = {"model": model, "testbed": testbed, "mode": mode, "recovery": other, "of": what}
        spread = {"median": median(ratios), "least": min(ratios), "most": max(ratios)}
        yield {**about, "replayed rounds": rounds, "failures": len(ratios), **spread}


def _total(run: Record | None, seconds: Callable[[Recovery], float | None]) -> float | None:
    """Over all recoveries of the run; None where one of them is not known."""
    if run is None:
        return None
    each = [seconds(recovery) for recovery in run.recovery or ()]
    known = [found for found in each if found is not None]
    return sum(known) if len(known) == len(each) else None


def text(records: Sequence[Record]) -> str:
    """The tables for a terminal; empty where no device was lost."""
    return "\n\n".join(table.text() for table in tables(records))
