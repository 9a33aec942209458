"""A paper's groupings of devices where links are slower or faster than its testbed states: planned, not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby, pairwise

import pandas as pd

from harness import runner
from harness.errors import OutOfMemory
from harness.experiment import Request
from harness.search import weighted_seconds
from harness.simulator import estimate
from results import again
from results.comparison import Comparison, grouping_text
from results.papers import OOM, Cell, Paper
from results.tables import Table, percent, significant, title_of

BYTES_PER_MBIT = 1e6 / 8
#: A rate at which a grouping flips is known to this part of itself.
NEAR = 1.05


@dataclass(frozen=True)
class Point:
    """The plan where every link has `factor` times the stated rate, and its samples per second; none where OOM."""

    factor: float
    grouping: str
    throughput: float | None


@dataclass(frozen=True)
class Question:
    """One of the paper's groupings, and the planner's answer with these options at any rate.

    `stated_mbit_per_s`: of the slowest link, as TCP has it.
    """

    cell: Cell
    options: Mapping[str, object]
    stated_mbit_per_s: float
    plan: Callable[[float], Point]

    def agrees(self, factor: float) -> bool:
        return self.plan(factor).grouping == self.cell.value


def tables(paper: Paper, comparisons: Sequence[Comparison]) -> tuple[Table, Table] | None:
    """From which rate on each grouping is the paper's; and what is planned at each rate. None without groupings."""
    asked = list(_questions(paper, comparisons))
    if not asked:
        return None
    return _flips(paper, asked), _points(paper, asked)


def _questions(paper: Paper, comparisons: Sequence[Comparison]) -> Iterator[Question]:
    for comparison in comparisons:
        if comparison.cell.artefact != paper.rates.get("artefact") or comparison.run is None:
            continue
        request = again.request(comparison.run)
        if request is not None:
            rate = min(request.testbed.cluster.bandwidth.values()) / BYTES_PER_MBIT
            for options in paper.rates["options"]:
                yield Question(comparison.cell, options, rate, _planner(request, options))


def _planner(request: Request, options: Mapping[str, object]) -> Callable[[float], Point]:
    costs = runner.profile_of(request.workload, request.testbed)
    cluster = request.testbed.cluster

    @cache
    def plan(factor: float) -> Point:
        scaled = replace(cluster, bandwidth={name: rate * factor for name, rate in cluster.bandwidth.items()})
        try:
            made = request.method.plan(request.workload, costs, scaled, {**request.options, **options})
        except OutOfMemory:
            return Point(factor, OOM, None)
        grouping = made.summary["grouping"]
        assert isinstance(grouping, list)
        seconds = weighted_seconds(made, estimate(made, costs, scaled))
        return Point(factor, grouping_text(grouping), request.workload.total_samples / seconds)

    return plan


def spans(agrees: Callable[[float], bool], factors: Sequence[float]) -> list[tuple[float, float]]:
    """Where between the factors it agrees: from and to, each as near as `NEAR`, at the ends the first and last."""

    def finer(low: float, high: float) -> Iterator[float]:
        if agrees(low) != agrees(high) and high / low > NEAR:
            middle = (low * high) ** 0.5
            yield from finer(low, middle)
            yield middle
            yield from finer(middle, high)

    every = [factors[0]]
    for low, high in pairwise(factors):
        every += [*finer(low, high), high]
    runs = [(agreed, list(group)) for agreed, group in groupby(every, agrees)]
    return [(group[0], group[-1]) for agreed, group in runs if agreed]


def _flips(paper: Paper, asked: Sequence[Question]) -> Table:
    factors = paper.rates["factors"]
    rows = []
    for question in asked:
        cell = question.cell
        found = spans(question.agrees, factors) if cell.value else []
        rows.append(
            {
                "model": cell.model,
                "devices": cell.devices,
                **question.options,
                "paper": cell.value,
                **{f"x {factor:g}": question.plan(factor).grouping for factor in factors},
                "the paper's at": _text(found, factors) if cell.value else "",
                "from, Mbit/s": found[0][0] * question.stated_mbit_per_s if found else None,
            }
        )
    return Table(
        f"{paper.name}-rates",
        f"{paper.title}: {title_of(paper.rates['artefact'])} at other rates of the links",
        pd.DataFrame(rows),
        {"from, Mbit/s": significant},
        heads=2 + len(paper.rates["options"][0]),
        notes=(
            "Planned, not run: every link has so many times its stated rate, computing is the same. From: the least "
            f"rate looked at that gives the paper's grouping, as TCP has it, known to {NEAR - 1:.0%}.",
        ),
    )


def _text(found: Sequence[tuple[float, float]], factors: Sequence[float]) -> str:
    def words(low: float, high: float) -> str:
        ends = low == factors[0], high == factors[-1]
        if all(ends):
            return "all"
        return f"up to {high:.3g}" if ends[0] else f"{low:.3g} and more" if ends[1] else f"{low:.3g} to {high:.3g}"

    return ", ".join(words(*span) for span in found) or "none"


def _points(paper: Paper, asked: Sequence[Question]) -> Table:
    """What each plan at each rate gives, beside the paper's samples per second for the same run."""
    artefact, metric = paper.rates["throughput"].split()
    theirs = {(c.model, c.devices, c.system): c for c in paper.cells if (c.artefact, c.metric) == (artefact, metric)}
    rows = []
    for question in asked:
        cell = theirs.get((question.cell.model, question.cell.devices, question.cell.system))
        for point in map(question.plan, paper.rates["factors"]):
            number = None if cell is None else cell.number
            rows.append(
                {
                    "model": question.cell.model,
                    "devices": question.cell.devices,
                    **question.options,
                    "rate": f"x {point.factor:g}",
                    "Mbit/s": point.factor * question.stated_mbit_per_s,
                    "grouping": point.grouping,
                    "samples/s": point.throughput,
                    "paper, samples/s": None if cell is None else cell.value,
                    "difference": point.throughput / number - 1 if number and point.throughput else None,
                }
            )
    formats = {"Mbit/s": significant, "samples/s": significant, "difference": percent}
    return Table(
        f"{paper.name}-rates-throughput",
        f"{paper.title}: what is planned at other rates of the links",
        pd.DataFrame(rows),
        formats,
        heads=3 + len(paper.rates["options"][0]),
    )
