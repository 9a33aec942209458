"""How latency scales with the number of equal devices: as much work on more of them, and more work on more of them.

Strong scaling: T(1) / (D T(D)) for the same tokens. Weak scaling: T(1) with s tokens / T(D) with D s tokens, so that
every device has as many as before. 100 % is linear, of one device by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from harness.records import Record
from results.settings import COMMON, Setting
from results.tables import Table

FAMILY = re.compile(r"(?P<family>.+)-(?P<count>[1-9][0-9]*)(?P<changes>(?:@.+)?)")
#: What runs of one family have in common.
ALIKE = tuple(name for name in COMMON if name not in ("testbed", "seq_len"))


@dataclass(frozen=True)
class Group:
    """`seconds[model, method with its options][devices, tokens]` of requests on 1 and more devices of one family."""

    records: tuple[Record, ...]
    links: str
    seconds: Mapping[tuple[str, str], Mapping[tuple[int, int], float]]

    def strong(self, key: tuple[str, str], devices: int, tokens: int) -> float | None:
        """Efficiency of as many tokens on more devices, in percent."""
        return self._efficiency(key, (1, tokens), (devices, tokens), devices)

    def weak(self, key: tuple[str, str], devices: int, tokens: int) -> float | None:
        """Efficiency of so many tokens per device, in percent."""
        return self._efficiency(key, (1, tokens), (devices, devices * tokens), 1)

    def _efficiency(
        self, key: tuple[str, str], alone: tuple[int, int], together: tuple[int, int], times: int
    ) -> float | None:
        found = self.seconds[key]
        return 100 * found[alone] / (times * found[together]) if alone in found and together in found else None


def groups(records: Sequence[Record]) -> list[Group]:
    """The inference runs on families of testbeds, of what was run on a single device and on more of them."""
    found: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        match = FAMILY.fullmatch(record.testbed)
        if match and record.technique == "inference" and record.latency_s and record.seq_len and not record.new_tokens:
            alike = (record.mode, match["family"], match["changes"], *(getattr(record, name) for name in ALIKE))
            found.setdefault(alike, []).append(record)
    made = (_group(str(key[2]), runs) for key, runs in found.items())
    return [group for group in made if group.seconds]


def members(records: Sequence[Record]) -> set[int]:
    """The `id`s of those that the tables of scaling are made of, and that need no tables and figures of their own."""
    return {id(record) for group in groups(records) for record in group.records}


def _group(changes: str, records: Sequence[Record]) -> Group:
    setting = Setting("", tuple(records))
    runs: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        runs.setdefault((record.model, setting.label(record)), []).append(record)
    scaled = {key: alike for key, alike in runs.items() if _scales({(r.num_devices, r.seq_len or 0) for r in alike})}
    seconds = {
        key: {(run.num_devices, run.seq_len or 0): run.latency_s or 0.0 for run in alike}
        for key, alike in scaled.items()
    }
    return Group(tuple(run for alike in scaled.values() for run in alike), changes, seconds)


def _scales(sizes: set[tuple[int, int]]) -> bool:
    """Whether some size on several devices has one on a single device to be compared with."""
    return any(count > 1 and {(1, tokens), (1, tokens // count)} & sizes for count, tokens in sizes)


def tables(found: Sequence[Group]) -> Iterator[Table]:
    """Strong and weak scaling of each group, as far as its runs give them."""
    for number, group in enumerate(found, 1):
        sizes = sorted({size for cells in group.seconds.values() for size in cells})
        counts = sorted({count for count, _ in sizes if count > 1})
        tokens = sorted({length for _, length in sizes})
        first = group.records[0]
        family = first.testbed.partition("@")[0].rpartition("-")[0]
        where = f"{family}-N{group.links}, {first.mode}"
        kinds = (("strong", f"{tokens[-1]} tokens", tokens[-1]), ("weak", f"{tokens[0]} tokens per device", tokens[0]))
        for kind, how, length in kinds:
            rows = [
                {"model": model, "method": method}
                | {f"{count} devices": getattr(group, kind)((model, method), count, length) for count in counts}
                for model, method in sorted(group.seconds)
            ]
            columns = [f"{count} devices" for count in counts]
            frame = pd.DataFrame(rows).dropna(subset=columns, how="all")
            if len(frame):
                title = f"{kind.capitalize()} scaling on {where}, % of linear: {how}"
                formats = dict.fromkeys(columns, "{:.0f} %".format)
                yield Table(f"scaling-{number}-{kind}", title, frame, formats=formats, heads=2)


def text(records: Sequence[Record]) -> str:
    """The tables for a terminal; empty where no family with a single device was run."""
    return "\n\n".join(table.text() for table in tables(groups(records)))
