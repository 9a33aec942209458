"""How time scales with the number of equal devices: as much work on more of them, and more work on more of them.

The work of a request are its tokens, and its time is the latency; that of training the samples of a batch, and their
time. Strong scaling: T(1) / (D T(D)) for the same work. Weak scaling: T(1) with work s / T(D) with work D s, so that
every device has as much as before. 100 % is linear, of one device by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from harness.records import Record
from results.grids import label
from results.papers import of_testbed
from results.settings import COMMON
from results.tables import Table

FAMILY = re.compile(r"(?P<family>.+)-(?P<count>[1-9][0-9]*)(?P<changes>(?:@.+)?)")
#: What says how much work there is, of a request and of training; everything else runs of one family have in common.
TOKENS, SAMPLES = "seq_len", "batch_size"


@dataclass(frozen=True)
class Group:
    """`seconds[model, method with its options][devices, work]` of runs on 1 and more devices of one family."""

    records: tuple[Record, ...]
    links: str
    seconds: Mapping[tuple[str, str], Mapping[tuple[int, int], float]]

    @property
    def training(self) -> bool:
        return _measure(self.records[0]) == SAMPLES

    def strong(self, key: tuple[str, str], devices: int, work: int) -> float | None:
        """Efficiency of as much work on more devices, in percent."""
        return self._efficiency(key, (1, work), (devices, work), devices)

    def weak(self, key: tuple[str, str], devices: int, work: int) -> float | None:
        """Efficiency of so much work per device, in percent."""
        return self._efficiency(key, (1, work), (devices, devices * work), 1)

    def _efficiency(
        self, key: tuple[str, str], alone: tuple[int, int], together: tuple[int, int], times: int
    ) -> float | None:
        found = self.seconds[key]
        return 100 * found[alone] / (times * found[together]) if alone in found and together in found else None


def groups(records: Sequence[Record]) -> list[Group]:
    """The runs on families of testbeds, of what was run on a single device and on more of them; of training those that
    are no paper's."""
    found: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        match = FAMILY.fullmatch(record.testbed)
        if match and _work(record):
            measure = _measure(record)
            alike = (getattr(record, name) for name in COMMON if name not in ("testbed", measure))
            key = (record.mode, match["family"], match["changes"], measure, *alike)
            found.setdefault(key, []).append(record)
    made = (_group(str(key[2]), runs) for key, runs in found.items())
    return [group for group in made if group.seconds]


def _measure(record: Record) -> str:
    return TOKENS if record.technique == "inference" else SAMPLES


def _work(record: Record) -> int:
    """Tokens of a request, or samples of a batch; 0 where the run has nothing to do with scaling, or leaves devices
    idle."""
    if record.memory and len(record.memory) < record.num_devices:
        return 0
    if _measure(record) == TOKENS:
        return (record.seq_len or 0) if record.latency_s and not record.new_tokens else 0
    return record.batch_size if record.time_per_sample_s and of_testbed(record.testbed) is None else 0


def _seconds(record: Record) -> float:
    """Of a request, or of a batch."""
    per_batch = (record.time_per_sample_s or 0.0) * record.batch_size
    return (record.latency_s or 0.0) if _measure(record) == TOKENS else per_batch


def members(records: Sequence[Record]) -> set[int]:
    """The `id`s of those that the tables of scaling are made of, and that need no tables and figures of their own."""
    return {id(record) for group in groups(records) for record in group.records}


def _group(changes: str, records: Sequence[Record]) -> Group:
    runs: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        runs.setdefault((record.model, label(record)), []).append(record)
    scaled = {key: alike for key, alike in runs.items() if _scales({(r.num_devices, _work(r)) for r in alike})}
    seconds = {key: {(run.num_devices, _work(run)): _seconds(run) for run in alike} for key, alike in scaled.items()}
    return Group(tuple(run for alike in scaled.values() for run in alike), changes, seconds)


def _scales(sizes: set[tuple[int, int]]) -> bool:
    """Whether some size on several devices has one on a single device to be compared with."""
    return any(count > 1 and {(1, work), (1, work // count)} & sizes for count, work in sizes)


def tables(found: Sequence[Group]) -> Iterator[Table]:
    """Strong and weak scaling of each group, as far as its runs give them."""
    for number, group in enumerate(found, 1):
        sizes = sorted({size for cells in group.seconds.values() for size in cells})
        counts = sorted({count for count, _ in sizes if count > 1})
        works = sorted({work for _, work in sizes})
        first = group.records[0]
        family = first.testbed.partition("@")[0].rpartition("-")[0]
        where = f"{family}-N{group.links}, {first.mode}"
        unit = "samples a batch" if group.training else "tokens"
        kinds = (("strong", f"{works[-1]} {unit}", works[-1]), ("weak", f"{works[0]} {unit} per device", works[0]))
        for kind, how, work in kinds:
            rows = [
                {"model": model, "method": method}
                | {f"{count} devices": getattr(group, kind)((model, method), count, work) for count in counts}
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
