"""Constants with their origin, and the strict reading of the TOML tables that hold them."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import OrreryError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: No constant of a device or link is smaller or larger, in any unit: beyond them times become infinite.
SMALLEST, LARGEST = 1e-12, 1e24
#: "printed": stated in the paper a testbed is taken from. "definition": true because this file says so.
PROVENANCES = ("datasheet", "measured", "derived", "secondary", "printed", "definition", "assumed", "fitted")


@dataclass(frozen=True)
class Constant:
    """A number and where it comes from. `cells` names the results that a fitted constant was fitted to."""

    value: float
    provenance: str
    source: str
    low: float | None = None
    high: float | None = None
    cells: tuple[str, ...] = ()


class Table:
    """A TOML table being read. A key that nobody asked for is a mistake, reported by `close`."""

    def __init__(self, path: Path, content: dict[str, Any], prefix: str = ""):
        self.path = path
        self._content = content
        self._prefix = prefix
        self._known: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether a key that may be left out is there."""
        self._known.add(key)
        return key in self._content

    def error(self, key: str, text: str) -> OrreryError:
        return OrreryError(f"{self.path}: {self._prefix}{key} {text}")

    def take(self, key: str, kind: type | tuple[type, ...], expected: str) -> Any:
        """The value of a key that must be there and be of the given type."""
        self._known.add(key)
        if key not in self._content:
            unread = [found for found in self._content if found not in self._known]
            raise self.error(key, f"is missing. It must be {expected}.{_nearest(key, unread)}")
        value = self._content[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.error(key, f"is {value!r}. It must be {expected}.")
        return value

    def text(self, key: str) -> str:
        value: str = self.take(key, str, "a text")
        if not value.strip():
            raise self.error(key, "is empty. It must be a text.")
        return value

    def choice(self, key: str, allowed: Sequence[str]) -> str:
        value: str = self.take(key, str, f"one of {', '.join(allowed)}")
        if value not in allowed:
            raise self.error(key, f"is {value!r}. Allowed are {', '.join(allowed)}.{_nearest(value, allowed)}")
        return value

    def list_of(self, key: str, kind: type, expected: str, valid: Callable[[Any], bool]) -> list[Any]:
        """A list without repetitions, each entry of the type and valid."""
        values: list[Any] = self.take(key, list, f"a list of {expected}")
        for value in values:
            if not isinstance(value, kind) or isinstance(value, bool) or not valid(value):
                raise self.error(key, f"holds {value!r}. It must be a list of {expected}.")
        if not values or len(set(values)) < len(values):
            raise self.error(key, f"is {values!r}. It must name at least one value, each once.")
        return values

    def table(self, key: str) -> Table:
        return Table(self.path, self.take(key, dict, "a table"), f"{self._prefix}{key}.")

    def tables(self, key: str) -> list[Table]:
        content = self.take(key, list, f"a list of tables, [[{key}]]")
        if not content or not all(isinstance(entry, dict) for entry in content):
            raise self.error(key, f"is {content!r}. It must be one or more tables, [[{key}]].")
        return [Table(self.path, entry, f"{self._prefix}{key}[{i}].") for i, entry in enumerate(content)]

    def number(self, key: str, allow_zero: bool) -> float:
        value: float = self.take(key, (int, float), "a number")
        if not SMALLEST <= value <= LARGEST and not (value == 0 and allow_zero):
            least = "of at least" if allow_zero else "above"
            raise self.error(key, f"is {value}. It must be a number {least} 0, between {SMALLEST:g} and {LARGEST:g}.")
        return value

    def constant(self, key: str, allow_zero: bool = False) -> Constant:
        """A table of value, provenance and source; a range where it is assumed, cells where it is fitted."""
        table = self.table(key)
        provenance = table.choice("provenance", PROVENANCES)
        low = table.number("low", allow_zero=True) if table.has("low") else None
        high = table.number("high", allow_zero=True) if table.has("high") else None
        constant = Constant(
            value=table.number("value", allow_zero),
            provenance=provenance,
            source=table.text("source"),
            low=low,
            high=high,
            cells=tuple(table.list_of("cells", str, "texts", bool)) if table.has("cells") else (),
        )
        table.close()
        if (low is None) != (high is None) or (provenance == "assumed" and low is None):
            raise self.error(key, "needs both low and high: an assumed value has a range, and a range has two ends.")
        if low is not None and high is not None and not low <= constant.value <= high:
            raise self.error(key, f"has the value {constant.value}, outside of its own range {low} to {high}.")
        if (provenance == "fitted") != bool(constant.cells):
            raise self.error(key, "must name the cells it was fitted to if it is fitted, and only then.")
        return constant

    def close(self) -> None:
        """Refuse keys that nobody asked for."""
        for key in self._content:
            if key not in self._known:
                known = sorted(self._known)
                raise self.error(key, f"is no known key.{_nearest(key, known)} Known here: {', '.join(known)}.")


def read(path: Path) -> Table:
    """Open a TOML file for strict reading."""
    try:
        with path.open("rb") as file:
            return Table(path, tomllib.load(file))
    except FileNotFoundError:
        raise OrreryError(f"There is no file {path}.") from None
    except OSError as error:
        raise OrreryError(f"{path} can't be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # also of text that is no UTF-8, and numbers of too many digits
        raise OrreryError(f"{path} is not valid TOML: {error}. Mend the file and try again.") from error


def _nearest(found: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(found, allowed, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
