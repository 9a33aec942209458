"""Where samples come from: a folder on this machine, the Hugging Face hub, or scikit-learn's wheel."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from harness.datasets import DatasetSpec
from harness.errors import OrreryError

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from numpy.typing import NDArray

#: Seconds to wait for the hub's answer before its cache on this machine is tried.
HUB_TIMEOUT_S = 5.0


class Text(NamedTuple):
    """Sentences, one or two per sample, and labels [samples]: whole numbers, or scores where it is a regression."""

    samples: list[tuple[str, ...]]
    labels: NDArray[Any]


class Pictures(NamedTuple):
    """Pixels [samples, channels, height, width] as bytes, of which `white` is the largest, and labels [samples]."""

    pixels: NDArray[np.uint8]
    white: int
    labels: NDArray[np.int64]


def glue(spec: DatasetSpec, data_dir: Path | None, split: str) -> Text:
    """A split of a GLUE task: `<task>/<split>.csv` or `<split>.csv` of the folder, or the hub."""
    if data_dir is None:
        return _text(spec, _from_hub(spec, split, spec.name), f"the hub's {spec.hub}")
    path = _find(spec, data_dir, f"{split}.csv")
    with tempfile.TemporaryDirectory(prefix="orrery-") as cache:
        # "NA", "null" and the like are words here, not missing values.
        options: dict[str, Any] = dict(data_files={split: str(path)}, cache_dir=cache, keep_default_na=False)
        return _text(spec, _read(path, split, "csv", **options), str(path))


def cifar10(spec: DatasetSpec, data_dir: Path | None, split: str) -> Pictures:
    """The images of a split: of a folder (a copy of the hub's repository, or one folder per class), or the hub."""
    if data_dir is None:
        return _pictures(spec, _from_hub(spec, split), f"the hub's {spec.hub}")
    folder = _find(spec, data_dir, ".")
    with tempfile.TemporaryDirectory(prefix="orrery-") as cache:
        return _pictures(spec, _read(folder, split, str(folder), cache_dir=cache), str(folder))


def digits() -> Pictures:
    """8 x 8 gray images inside scikit-learn's wheel. The same on every machine."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return Pictures(found.images.astype(np.uint8)[:, np.newaxis], 16, found.target.astype(np.int64))


def _find(spec: DatasetSpec, data_dir: Path, name: str) -> Path:
    """`name` in the data set's own folder below `data_dir`, or in `data_dir` itself."""
    candidates = [data_dir / spec.name / name, data_dir / name]
    if data_dir.is_dir():
        for path in candidates:
            if path.exists():
                return path
    problem = "holds neither of them" if data_dir.is_dir() else "is no folder"
    raise OrreryError(
        f"Looked for {candidates[0]} and {candidates[1]}, but --data-dir {data_dir} {problem}. Give the folder that "
        f"holds {spec.name}/{name}, or leave --data-dir away to load {spec.hub} from the Hugging Face hub."
    )


def _read(path: Path, split: str, *arguments: str, **options: Any) -> Table:
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*arguments, split=split, **options)
    except (DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        raise OrreryError(f"{path} can't be read as a {split} split: {type(cause).__name__}: {cause}.") from error


def _from_hub(spec: DatasetSpec, split: str, *configuration: str) -> Table:
    """From the hub, or what is cached of it. Fails fast without a network, where `datasets` would ask six times."""
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi

    assert spec.hub is not None
    datasets.disable_progress_bars()
    unreachable: Exception | None = None
    try:
        HfApi().dataset_info(spec.hub, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # the HTTP client's own errors, whichever client the hub's library uses
        unreachable = error
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or unreachable is not None
    try:
        return datasets.load_dataset(spec.hub, *configuration, split=split)
    except (DatasetsError, OSError, ValueError) as error:
        reason = str(unreachable or error).strip().splitlines()[0]
        raise OrreryError(
            f"The data set {spec.name} can't be loaded from the Hugging Face hub ({spec.hub}: {reason}), nor from its "
            "cache on this machine. Pass --data-dir with a folder that holds it, or choose the data set "
            "synthetic, which is made from the seed."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _text(spec: DatasetSpec, table: Table, origin: str) -> Text:
    _require_columns(table, (*spec.columns, "label"), origin)
    samples = list(zip(*(table[column][:] for column in spec.columns), strict=True))
    for row, sample in enumerate(samples):
        if not all(isinstance(text, str) for text in sample):
            raise OrreryError(f"In {origin}, sample {row} is {sample!r}; {', '.join(spec.columns)} must hold text.")
    return Text(samples, _labels(spec, table["label"][:], origin))


def _pictures(spec: DatasetSpec, table: Table, origin: str) -> Pictures:
    column = "image" if "image" in table.column_names else "img"
    _require_columns(table, (column, "label"), origin)
    images = [np.asarray(image.convert("RGB"), np.uint8) for image in table[column]]
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise OrreryError(f"The images of {origin} differ in size: {sorted(sizes)[:4]}. Give them one size.")
    pixels = np.stack(images)
    return Pictures(pixels.transpose(0, 3, 1, 2), 255, _labels(spec, table["label"][:], origin))


def _require_columns(table: Table, wanted: tuple[str, ...], origin: str) -> None:
    missing = [column for column in wanted if column not in table.column_names]
    if missing:
        raise OrreryError(
            f"{origin} has no column {' nor '.join(missing)}; found {', '.join(table.column_names)}. "
            f"Needed are {', '.join(wanted)}."
        )


def _labels(spec: DatasetSpec, found: list[Any], origin: str) -> NDArray[Any]:
    """Class numbers below `num_labels`, or scores. The hub's test splits carry -1: they can't be trained on."""
    regression = spec.num_labels == 1
    kind, allowed = ((int, float), "a number") if regression else (int, f"0 to {spec.num_labels - 1}")
    for row, label in enumerate(found):
        if not isinstance(label, kind) or (not regression and not 0 <= label < spec.num_labels):
            raise OrreryError(f"In {origin}, the label of sample {row} is {label!r}; allowed is {allowed}.")
    return np.asarray(found, np.float64 if regression else np.int64)
