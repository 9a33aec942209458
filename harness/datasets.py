"""The data sets by name: their size and shape (all that the simulated mode needs), and the samples themselves."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import unknown_name
from harness.workload import Workload

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from harness.samples import Dataset


TRAINING = "train"


@dataclass(frozen=True)
class DatasetSpec:
    """One entry of `datasets.toml`: the training split. `num_labels` 1 is a regression.

    `validation` is the split that `metric` is measured on; None where the data set has no other one.

    `kind` is "text", "image", or "any" for what is made as the model needs it. `columns` hold the sentences;
    `seq_len` and `image_size` are defaults. `hub` is the repository on the Hugging Face hub.
    """

    name: str
    kind: str
    num_samples: int
    num_labels: int
    metric: str
    source: str
    columns: tuple[str, ...] = ()
    seq_len: int | None = None
    image_size: int | None = None
    num_channels: int | None = None
    hub: str | None = None
    validation: str | None = None


@cache
def _specs() -> dict[str, DatasetSpec]:
    tables = tomllib.loads(files("harness").joinpath("datasets.toml").read_text(encoding="utf-8"))
    return {
        name: DatasetSpec(name=name, columns=tuple(table.pop("columns", ())), **table) for name, table in tables.items()
    }


def names() -> list[str]:
    """The data sets, in the order of `datasets.toml`."""
    return list(_specs())


def spec(name: str) -> DatasetSpec:
    """The data set's size and shape. Raises `OrreryError` for a name that is not known."""
    if name not in _specs():
        raise unknown_name("data set", name, names())
    return _specs()[name]


def sample_order(num_samples: int, epoch: int, seed: int) -> list[int]:
    """The sample ids of one epoch, shuffled: the same on every device."""
    order = list(range(num_samples))
    random.Random(f"order of epoch {epoch} with seed {seed}").shuffle(order)
    return order


def batches(workload: Workload) -> Iterator[list[int]]:
    """The sample ids of each iteration, epoch after epoch without end, each epoch in an order of its own.

    Batches are formed once, so that what a device has cached of its rows serves it in every epoch; then it is the whole
    ones that are shuffled.
    """
    size = workload.batch_size
    order = sample_order(workload.num_samples, 0, workload.seed)
    formed = [order[i : i + size] for i in range(0, len(order), size)]
    yield from formed
    whole = len(order) // size
    for epoch in count(1):
        yield from (formed[i] for i in sample_order(whole, epoch, workload.seed))
        yield from formed[whole:]


def load(workload: Workload, data_dir: Path | None = None, split: str = TRAINING) -> Dataset:
    """The samples in the workload's shape. GLUE and CIFAR-10 come from `data_dir`, or without it from the hub.

    Of a training split with more rows than `workload.num_samples` it is so many, at even distances: files may be
    sorted. There may be fewer, too: `len()` tells. Of another split it is all. Raises `OrreryError`.
    """
    from harness import samples

    chosen = spec(workload.dataset)
    if workload.seq_len is None:
        return samples.images(chosen, workload, data_dir, split)
    return samples.texts(chosen, workload, data_dir, split)
