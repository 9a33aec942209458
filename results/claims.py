"""What a paper's text claims, beside the same number made from its own cells, and from ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import fmean

import pandas as pd

from results import papers
from results.comparison import Comparison
from results.papers import Cell, Paper
from results.tables import Table, significant, title_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Fields = Mapping[str, object]
#: What cells of one comparison have in common.
SHARED = ("model", "dataset", "epochs")
#: How a claim's number comes of two cells.
FORMULAS: dict[str, Callable[[float, float], float]] = {
    "other / own": lambda own, other: other / own,
    "own / other": lambda own, other: 100 * own / other,
    "own / other - 1": lambda own, other: 100 * (own / other - 1),
    "1 - own / other": lambda own, other: 100 * (1 - own / other),
    "own": lambda own, other: own,
}
TAKEN: dict[str, Callable[[Iterable[float]], float]] = {"max": max, "min": min, "mean": fmean}


@dataclass(frozen=True)
class Claim:
    """One claim: the cell of its number, and how the number is made of other cells (see the file of claims).

    `at` is None where no cells of the paper give the number. `note` says what in the paper does not fit together.
    """

    words: str
    cell: Cell
    formula: str
    cells: Fields
    own: Fields
    other: Fields | None
    at: Fields | None
    take: str
    note: str

    def pairs(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Cell]]:
        """Of these cells all that could be meant: what the claim is about, and what that is compared with."""
        chosen = [cell for cell in cells if _is(cell, self.cells)]
        for own in chosen:
            if not _is(own, self.own):
                continue
            if self.other is None:
                yield own, own
                continue
            for other in chosen:
                if _is(other, self.other) and all(getattr(own, name) == getattr(other, name) for name in self._shared):
                    yield own, other

    @property
    def _shared(self) -> set[str]:
        """What both cells have in common: that, and what the cells are chosen by a list of."""
        return {*SHARED, *(name for name, wanted in self.cells.items() if isinstance(wanted, list))}

    def meant(self, pair: tuple[Cell, Cell]) -> bool:
        """Whether the number comes, as far as one can infer, of this pair."""
        return self.at is not None and all(
            any(_is(cell, {name: wanted}) for cell in pair) for name, wanted in self.at.items()
        )

    def number(self, values: Iterable[tuple[float, float]]) -> float | None:
        """The claim's number as it comes of the values of pairs."""
        found = [FORMULAS[self.formula](own, other) for own, other in values]
        return TAKEN[self.take](found) if found else None


@dataclass(frozen=True)
class Rule:
    """A claim is reproduced where ours is within this part of it, and a percentage also within so many points."""

    within: float
    within_points: float

    def reproduced(self, claimed: float, ours: float, unit: str) -> bool:
        near = abs(ours - claimed) <= self.within * abs(claimed)
        return near and (unit != "%" or abs(ours - claimed) <= self.within_points)


def _is(cell: Cell, fields: Fields) -> bool:
    """Whether each field of the cell is the value asked for, or one of them."""
    return all(
        getattr(cell, name) in wanted if isinstance(wanted, list) else getattr(cell, name) == wanted
        for name, wanted in fields.items()
    )


@cache
def load(name: str) -> tuple[Rule, tuple[Claim, ...]] | None:
    """The claims of the paper, in the order of their file; None where there is no file of them."""
    path = files("results").joinpath("reference").joinpath(f"{name}_claims.toml")
    if not path.is_file():
        return None
    about = tomllib.loads(path.read_text(encoding="utf-8"))
    claims = []
    for entry in about["claims"]:
        (cell,) = (cell for cell in papers.load(name).cells if _is(cell, entry["claim"]))
        optional = {"other": entry.get("other"), "at": entry.get("at"), "note": entry.get("note", "")}
        always = {key: entry[key] for key in ("words", "formula", "cells", "own", "take")}
        claims.append(Claim(cell=cell, **always, **optional))
    return Rule(about["within"], about["within_points"]), tuple(claims)


def table(paper: Paper, comparisons: Sequence[Comparison]) -> Table | None:
    """A row per claim of which ours has a cell; None where there is none."""
    loaded = load(paper.name)
    if loaded is None:
        return None
    rule, claims = loaded
    ours = {c.cell: c for c in comparisons if c.alike}
    rows = [row for claim in claims if (row := _row(claim, rule, paper, ours))]
    if not rows:
        return None
    formats = dict.fromkeys(("claimed", "the paper's cells", "ours", "ours, over all"), significant)
    return Table(
        f"{paper.name}-claims",
        f"What {paper.title} claims",
        pd.DataFrame(rows),
        formats,
        heads=1,
        notes=(
            "The paper's cells, ours: the claim's number made from the cells that agree with it; which are meant is "
            "inferred. Ours, over all: the largest or smallest that ours give among all cells that the words cover.",
            f"Reproduced: ours differs from the claim by at most {rule.within:.0%} of it, and a percentage also by at "
            f"most {rule.within_points:g} points. A number that no cells of the paper give is reached by our own "
            "extreme or not reached, and neither counts as reproduced. Fitted: constants were fitted to one of the "
            "cells, so that agreement proves less.",
        ),
    )


def _row(claim: Claim, rule: Rule, paper: Paper, ours: Mapping[Cell, Comparison]) -> dict[str, object]:
    pairs = list(claim.pairs(paper.cells))
    meant = [pair for pair in pairs if claim.meant(pair)]
    if not any(cell in ours for pair in pairs for cell in pair):
        return {}
    claimed = claim.cell.number
    assert claimed is not None
    fitted = any(ours[cell].fitted for pair in meant for cell in pair if cell in ours)
    same = claim.number(_numbers(meant, ours))
    extreme = claim.number(_numbers(pairs, ours)) if claim.take != "mean" else None
    return {
        "claim": claim.words,
        "claimed": claimed,
        "unit": claim.cell.unit,
        "from": title_of(pairs[0][0].artefact),
        "the paper's cells": claim.number(
            (own.number, other.number) for own, other in meant if own.number is not None and other.number is not None
        ),
        "ours": same,
        "ours, over all": extreme,
        "verdict": _verdict(claim, rule, claimed, same, extreme, fitted),
        "note": claim.note,
    }


def _numbers(pairs: Iterable[tuple[Cell, Cell]], ours: Mapping[Cell, Comparison]) -> Iterator[tuple[float, float]]:
    """Our values of the pairs that have two."""
    for pair in pairs:
        own, other = (ours[cell].ours if cell in ours else None for cell in pair)
        if isinstance(own, float) and isinstance(other, float):
            yield own, other


def _verdict(claim: Claim, rule: Rule, claimed: float, same: float | None, extreme: float | None, fitted: bool) -> str:
    if claim.at is None:
        if extreme is None:
            return "no such cell"
        reached = extreme <= claimed if claim.take == "min" else extreme >= claimed
        return "reached" if reached else "not reached"
    if same is None:
        return "no such cell"
    away = f"{same - claimed:+.1f} points" if claim.cell.unit == "%" else f"{same / claimed - 1:+.1%}"
    verdict = "reproduced" if rule.reproduced(claimed, same, claim.cell.unit) else "not reproduced"
    return f"{verdict}, {away}" + (" (fitted)" if fitted else "")
