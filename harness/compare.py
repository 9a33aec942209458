"""Two sets of records side by side: ratios of every metric for the runs that both hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import store
from harness.errors import OrreryError, unknown_name
from harness.records import Record

#: Metrics that can be compared, and which way is better.
HIGHER_IS_BETTER = {"throughput_samples_per_s": True} | dict.fromkeys(
    (
        "total_time_s",
        "time_per_sample_s",
        "device_time_per_sample_s",
        "latency_s",
        "prefill_time_s",
        "time_per_token_s",
        "peak_memory_bytes",
        "comm_bytes",
        "comm_time_s",
        "compute_time_s",
        "bubble_fraction",
        "energy_j",
        "energy_net_of_idle_j",
        "energy_per_sample_j",
        "planning_time_s",
        "loss",
        "max_rel_error",
    ),
    False,
)
#: What says that two records answer the same question.
IDENTITY = (
    *("method", "method_options", "technique", "technique_options", "model", "dataset", "num_samples", "seq_len"),
    *("decoder_seq_len", "new_tokens", "image_size", "batch_size", "epochs", "steps", "optimizer", "learning_rate"),
    *("clip_norm", "dropout", "dtype", "attn_implementation", "checkpoint", "testbed", "mode", "inject"),
)


@dataclass(frozen=True)
class Limit:
    """`field` may get worse by `fraction`, not by more."""

    field: str
    fraction: float


@dataclass(frozen=True)
class Row:
    """One metric of one run on both sides. `ratio` is b / a, None where a is 0 or a side has no number."""

    run: str
    field: str
    a: float | None
    b: float | None

    @property
    def ratio(self) -> float | None:
        return self.b / self.a if self.a and self.b is not None else None

    def worse_than(self, limit: Limit) -> bool:
        """Whether b is worse than a by more than the limit. A number that b has lost is worse than any."""
        if self.field != limit.field or self.a is None:
            return False
        if self.b is None:
            return True
        if HIGHER_IS_BETTER[self.field]:
            return self.b < self.a * (1 - limit.fraction)
        return self.b > self.a * (1 + limit.fraction)


def parse_limit(text: str) -> Limit:
    """`field:10%`."""
    match = re.fullmatch(r"(\w+):(\d+(?:\.\d+)?)%", text)
    if match is None:
        raise OrreryError(
            f"--fail-if is {text!r}. Allowed is a field and a percentage, such as 'throughput_samples_per_s:10%'."
        )
    if match[1] not in HIGHER_IS_BETTER:
        raise unknown_name("field that can be compared", match[1], HIGHER_IS_BETTER)
    return Limit(match[1], float(match[2]) / 100)


def read(path: Path) -> list[Record]:
    """The records of a results folder, or the one of a record file."""
    return store.load_all(path) if path.is_dir() else [store.load(path)]


def compare(a: Sequence[Record], b: Sequence[Record]) -> list[Row]:
    """A row per metric and run of `a`. Two single records are compared whatever they are.

    A run that `b` lacks has None in every `b`. Raises `OrreryError` where not one run is in both.
    """
    if len(a) == len(b) == 1:
        pairs: list[tuple[Record, Record | None]] = [(a[0], b[0])]
    else:
        others = _by_identity(b, "B")
        pairs = [(record, others.get(asked)) for asked, record in _by_identity(a, "A").items()]
        if not any(other for _, other in pairs):
            raise OrreryError(
                f"Not one of the {len(a)} runs of A is among the {len(b)} of B, so nothing can be compared. "
                f"Runs match where these fields are equal: {', '.join(IDENTITY)}, seed."
            )
    return [
        Row(title(left), field, getattr(left, field), getattr(right, field) if right else None)
        for left, right in pairs
        for field in HIGHER_IS_BETTER
        if getattr(left, field) is not None or (right and getattr(right, field) is not None)
    ]


def title(record: Record) -> str:
    """A run in one line, for people."""
    what = (record.method, record.model, record.technique, record.dataset, f"batch {record.batch_size}")
    return " ".join((*what, record.testbed, record.mode, *([record.inject] if record.inject else [])))


def _by_identity(records: Sequence[Record], side: str) -> dict[tuple[str, ...], Record]:
    """Records by what they answer. Which of two answers to one question is meant, only the user knows."""
    found: dict[tuple[str, ...], Record] = {}
    for record in records:
        asked = (*(repr(getattr(record, field)) for field in IDENTITY), str(record.provenance.seed))
        if asked in found:
            files = " and ".join(f"runs/{r.provenance.config_hash}.json" for r in (found[asked], record))
            raise OrreryError(
                f"{side} holds two answers to one question, {files} ({title(record)}), made by different versions of "
                "the code, or of a method or testbed. Remove the one that is out of date, or compare record files."
            )
        found[asked] = record
    return found
