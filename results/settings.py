"""Records that can be compared: the same work on the same testbed, by several methods, models and modes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from zlib import crc32

from harness import models
from harness.records import Record
from results.papers import Paper, of_testbed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: What the records of one setting have in common.
COMMON = (
    *("testbed", "technique", "dataset", "num_samples", "seq_len", "decoder_seq_len", "new_tokens", "image_size"),
    *(
        "batch_size",
        "epochs",
        "steps",
        "optimizer",
        "learning_rate",
        "clip_norm",
        "dropout",
        "dtype",
        "attn_implementation",
    ),
    "checkpoint",
)
#: For methods that `colours.toml` does not name.
OTHER_COLOURS = ("#000000", "#3b5b2b", "#7a3e9d", "#b2182b", "#1b7837", "#4d4d4d", "#a6611a", "#2166ac")


@dataclass(frozen=True)
class Setting:
    """Records in the order of tables: by model, method and mode. `name` is unique in a report."""

    name: str
    records: tuple[Record, ...]

    @property
    def first(self) -> Record:
        return self.records[0]

    @property
    def paper(self) -> Paper | None:
        return of_testbed(self.first.testbed)

    @property
    def title(self) -> str:
        return f"{self.first.testbed}: {self.first.technique} on {self.first.dataset}, batch {self.first.batch_size}"

    @property
    def work(self) -> str:
        """The workload in one sentence."""
        r = self.first
        rounds = f"{r.steps} iterations" if r.steps else f"{r.epochs} epoch{'s'[: r.epochs != 1]}"
        shape = f"{r.seq_len} tokens" if r.seq_len else f"{r.image_size} x {r.image_size} pixels"
        shape += f" and {r.new_tokens} new ones" if r.new_tokens else ""
        dropout = "the models' own dropout" if r.dropout is None else f"dropout {r.dropout:g}"
        weights = f"weights from {r.checkpoint}" if r.checkpoint else "weights from a seed"
        clipping = "" if r.clip_norm is None else f", gradients clipped to a norm of {r.clip_norm:g}"
        attention = f", {r.attn_implementation} attention" if r.seq_len else ""
        if r.technique == "inference":
            return f"Samples: {r.num_samples}, in requests of {r.batch_size}, {shape}, {r.dtype}{attention}, {weights}."
        return (
            f"{rounds} of {r.num_samples} samples, batch {r.batch_size}, {shape}, {r.optimizer} with learning rate "
            f"{r.learning_rate:g}{clipping}, {r.dtype}{attention}, {dropout}, {weights}."
        )

    def label(self, record: Record) -> str:
        """The method, with those of its and the technique's options, and the seed, that differ within the setting."""
        same = [r for r in self.records if r.method == record.method]
        told = [
            f"{name}={value}"
            for options in ("method_options", "technique_options")
            for name, value in getattr(record, options).items()
            if any(getattr(r, options).get(name) != value for r in same)
        ]
        if len({r.provenance.seed for r in same}) > 1:
            told.append(f"seed={record.provenance.seed}")
        return f"{record.method} ({', '.join(told)})" if told else record.method


def settings(records: Sequence[Record]) -> list[Setting]:
    """The settings of all records: those of the papers' testbeds first."""
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(getattr(record, field) for field in COMMON), []).append(record)
    found: dict[str, Setting] = {}
    for group in sorted(groups.values(), key=lambda group: (of_testbed(group[0].testbed) is None, group[0].testbed)):
        base = f"{group[0].testbed}-{group[0].technique}-{group[0].dataset}".replace("/", "-")
        name, number = base, 1
        while name in found:
            number += 1
            name = f"{base}-{number}"
        found[name] = Setting(name, tuple(sorted(group, key=_place)))
    return list(found.values())


def _place(record: Record) -> tuple[object, ...]:
    """Models in the order of the catalog, methods in that of `colours.toml`, what is in neither by name."""
    known, methods = models.names(), list(_colours())
    return (
        known.index(record.model) if record.model in known else len(known),
        record.model,
        methods.index(record.method) if record.method in methods else len(methods),
        record.method,
        record.mode,
        record.provenance.config_hash,
    )


def colour(method: str) -> str:
    """The method's colour in every figure."""
    return _colours().get(method) or OTHER_COLOURS[crc32(method.encode()) % len(OTHER_COLOURS)]


@cache
def _colours() -> dict[str, str]:
    return tomllib.loads(files("results").joinpath("colours.toml").read_text(encoding="utf-8"))
