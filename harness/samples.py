"""Samples as tensors, by sample id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate

from harness import sources, tokenizer
from harness.datasets import TRAINING, DatasetSpec
from harness.errors import OrreryError
from harness.store import write_whole
from harness.workload import Workload

#: The entry of a file's metadata that says what its tensors are.
ABOUT = "about"


class Dataset(Protocol):
    """Samples 0 to `len() - 1`. A batch has `Layered.inputs` and "labels" [rows], each batch first."""

    def __len__(self) -> int: ...

    def batch(self, sample_ids: Sequence[int]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Texts:
    """Token and segment ids [samples, seq_len] and lengths [samples], in their smallest types.

    `decoder_start` are the decoder's tokens of every sample, the start token only: the answer is the label. With
    `padded_left` a text ends with the last token, as one that is to go on must.
    """

    ids: Tensor
    types: Tensor
    lengths: Tensor
    labels: Tensor
    decoder_start: Tensor | None
    padded_left: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, sample_ids: Sequence[int]) -> dict[str, Tensor]:
        rows = torch.as_tensor(sample_ids)
        ids = self.ids[rows].long()
        place = torch.arange(ids.shape[1])
        place = place.flip(0) if self.padded_left else place
        values = {
            "input_ids": ids,
            "attention_mask": (place < self.lengths[rows, None]).long(),
            "token_type_ids": self.types[rows].long(),
            "labels": self.labels[rows],
        }
        if self.decoder_start is not None:
            values["decoder_input_ids"] = self.decoder_start.repeat(len(rows), 1)
        return values


@dataclass(frozen=True)
class Images:
    """Pixels [samples, channels, height, width] as bytes up to `white`; a batch has [0, 1] and the wanted size."""

    pixels: Tensor
    white: int
    labels: Tensor
    image_size: int
    num_channels: int
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, sample_ids: Sequence[int]) -> dict[str, Tensor]:
        rows = torch.as_tensor(sample_ids)
        pixels = self.pixels[rows].to(self.dtype) / self.white
        if pixels.shape[2:] != (self.image_size, self.image_size):
            pixels = interpolate(pixels, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        return {"pixel_values": pixels.expand(-1, self.num_channels, -1, -1).contiguous(), "labels": self.labels[rows]}


def save(dataset: Dataset, path: Path) -> None:
    """Write encoded samples as one safetensors file. Raises OrreryError if it can't be written."""
    assert isinstance(dataset, Texts | Images)
    fields = vars(dataset)
    tensors = {name: value.contiguous() for name, value in fields.items() if isinstance(value, Tensor)}
    about = {"kind": type(dataset).__name__}
    if isinstance(dataset, Texts):
        about["padded"] = "left" if dataset.padded_left else "right"
    else:
        about |= {name: str(fields[name]) for name in ("white", "image_size", "num_channels")}
        about["dtype"] = str(dataset.dtype).removeprefix("torch.")
    # One entry: several are written in any order, and the same samples must be the same bytes.
    write_whole(path, lambda part: save_file(tensors, part, {ABOUT: json.dumps(about)}))


def read(path: Path) -> Dataset:
    """What `save` wrote: the same batches for any ids. Processes of one machine share the file's memory.

    Raises OrreryError for a file that is not there, is damaged, or holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        if about.get("kind") == "Texts":
            return Texts(**{"decoder_start": None, **tensors}, padded_left=about["padded"] == "left")
        if about.get("kind") == "Images":
            dtype: torch.dtype = getattr(torch, about["dtype"])
            size, channels = int(about["image_size"]), int(about["num_channels"])
            return Images(**tensors, white=int(about["white"]), image_size=size, num_channels=channels, dtype=dtype)
        raise ValueError(f"its kind is {about.get('kind')!r}, and must be 'Texts' or 'Images'.")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise OrreryError(f"The samples can't be read from {path}: {error} Save the data set again.") from error


def texts(spec: DatasetSpec, workload: Workload, data_dir: Path | None, split: str) -> Texts:
    """A split of a text data set, tokenised for the workload's model: always by the tokenizer that it trains with."""
    if spec.kind == "image":
        raise _mismatch(spec, workload, "text")
    assert workload.seq_len is not None
    vocabulary = tokenizer.vocabulary(workload)
    if spec.kind == "any":
        ids, labels = _random_tokens(workload, vocabulary, split)
        encoded = tokenizer.Encoded(ids, np.zeros_like(ids, np.uint8), np.full(len(ids), workload.seq_len, np.int32))
    else:
        samples, labels = sources.glue(spec, data_dir, split)
        if workload.checkpoint is None:
            learnt_from = samples if split == TRAINING else sources.glue(spec, data_dir, TRAINING).samples
            chosen = tokenizer.train(learnt_from, vocabulary)
        else:
            chosen = tokenizer.pretrained(workload.checkpoint, vocabulary)
        rows = _rows(len(samples), workload, split)
        labels = labels[rows]
        encoded = tokenizer.encode(chosen, [samples[row] for row in rows], workload.seq_len, vocabulary.pad)
    regression = spec.num_labels == 1
    start = vocabulary.decoder_start
    generates = workload.new_tokens is not None
    if generates:
        encoded = tokenizer.padded_left(encoded)
    return Texts(
        ids=torch.from_numpy(encoded.ids),
        types=torch.from_numpy(encoded.types),
        lengths=torch.from_numpy(encoded.lengths),
        labels=torch.from_numpy(labels).to(getattr(torch, workload.dtype) if regression else torch.long),
        decoder_start=None if start is None else torch.full((workload.decoder_seq_len,), start),
        padded_left=generates,
    )


def images(spec: DatasetSpec, workload: Workload, data_dir: Path | None, split: str) -> Images:
    """A split of an image data set, in the workload's size; a gray image fills as many channels as the model reads."""
    if spec.kind == "text":
        raise _mismatch(spec, workload, "images")
    if spec.name == "digits":
        pixels, white, labels = sources.digits()
    elif spec.kind == "any":
        pixels, white, labels = _random_pixels(spec, workload, split)
    else:
        pixels, white, labels = sources.cifar10(spec, data_dir, split)
    rows = _rows(len(labels), workload, split)
    if pixels.shape[1] not in (1, workload.num_channels):
        raise OrreryError(
            f"The data set {spec.name} has {pixels.shape[1]} channels and {workload.model} reads "
            f"{workload.num_channels}. Set num_channels to {pixels.shape[1]}."
        )
    return Images(
        torch.from_numpy(pixels[rows]),
        white,
        torch.from_numpy(labels[rows]),
        workload.image_size or pixels.shape[-1],
        workload.num_channels,
        getattr(torch, workload.dtype),
    )


def _rows(found: int, workload: Workload, split: str) -> NDArray[np.intp]:
    """Rows of a split: all, or of more training samples than are wanted as many as are, at even distances."""
    if split != TRAINING or found <= workload.num_samples:
        return np.arange(found)
    return np.arange(workload.num_samples) * found // workload.num_samples


def _random(workload: Workload, split: str) -> np.random.Generator:
    """What a split's samples are drawn with."""
    return np.random.default_rng(workload.seed if split == TRAINING else (workload.seed, 1))


def _random_tokens(
    workload: Workload, vocabulary: tokenizer.Vocabulary, split: str
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Each label owns a slice of the vocabulary, and a sample's tokens come from its label's slice."""
    assert workload.seq_len is not None
    random = _random(workload, split)
    words = np.array([token for token in range(vocabulary.size) if token not in vocabulary.special], np.int32)
    width = len(words) // workload.num_labels
    labels = random.integers(workload.num_labels, size=workload.num_samples)
    choice = labels[:, np.newaxis] * width + random.integers(width, size=(workload.num_samples, workload.seq_len))
    return words[choice], labels


def _random_pixels(spec: DatasetSpec, workload: Workload, split: str) -> sources.Pictures:
    """Each label has a pattern, the same in every split, and a sample is its label's pattern and as much noise."""
    assert spec.image_size is not None
    shape = (workload.num_channels, spec.image_size, spec.image_size)
    training = _random(workload, TRAINING)
    patterns = training.integers(128, size=(workload.num_labels, *shape), dtype=np.uint8)
    random = training if split == TRAINING else _random(workload, split)
    labels = random.integers(workload.num_labels, size=workload.num_samples)
    noise = random.integers(128, size=(workload.num_samples, *shape), dtype=np.uint8)
    return sources.Pictures(patterns[labels] + noise, 255, labels)


def _mismatch(spec: DatasetSpec, workload: Workload, wanted: str) -> OrreryError:
    return OrreryError(
        f"{workload.model} reads {wanted} and the data set {spec.name} does not hold any. "
        "`orrery list datasets` shows which do."
    )
