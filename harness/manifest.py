"""What an activation cache is of: the backbone and its inputs' shape by name, and the samples by their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from harness import provenance
from harness.errors import OrreryError
from harness.models import shards
from harness.samples import Dataset
from harness.store import write_whole
from harness.workload import Workload

#: Raised whenever the files, or what the tensors of a backbone are called, become others.
FORMAT = 1
NAME = "manifest.json"
KEY_BYTES = 16
#: Samples in memory at a time.
CHUNK = 256
#: What makes two backbones' results comparable, in the order in which differences are named.
NOUNS = {
    "format": "version of the cache's format",
    "model": "model",
    "backbone": "digest of the backbone's weights",
    "dtype": "type of numbers",
    "attn_implementation": "attention",
    "seq_len": "number of tokens",
    "decoder_seq_len": "number of the decoder's tokens",
    "image_size": "image size",
    "torch": "version of torch",
    "transformers": "version of transformers",
}

Identity = Mapping[str, str | int | None]


def identity(workload: Workload, weights: Path) -> Identity:
    """Of the frozen part of the workload's model, whose weights `shards.write` has put into the file `weights`."""
    libraries = provenance.libraries()
    return {
        "model": workload.model,
        "backbone": shards.frozen_digest(workload, weights),
        "dtype": workload.dtype,
        "attn_implementation": workload.attn_implementation,
        "seq_len": workload.seq_len,
        "decoder_seq_len": workload.decoder_seq_len,
        "image_size": workload.image_size,
        "torch": libraries.get("torch"),
        "transformers": libraries.get("transformers"),
    }


def sample_keys(dataset: Dataset, count: int) -> list[bytes]:
    """Of the samples 0 to count - 1 each a digest of the tensors that a model reads of it: not of its label."""
    keys: list[bytes] = []
    for first in range(0, count, CHUNK):
        batch = dataset.batch(range(first, min(first + CHUNK, count)))
        rows = [
            (name, tensor.contiguous().view(len(tensor), -1).view(torch.uint8).numpy())
            for name, tensor in sorted(batch.items())
            if name != "labels"
        ]
        for number in range(len(rows[0][1])):
            digest = hashlib.blake2b(digest_size=KEY_BYTES)
            for name, content in rows:
                digest.update(name.encode())
                digest.update(content[number].data)
            keys.append(digest.digest())
    return keys


def slots(folder: Path, identity: Identity, keys: Sequence[bytes]) -> dict[bytes, int]:
    """The place of every sample of the cache in the folder, by key. A new folder gets a manifest; new samples a place.

    Raises OrreryError for a cache of something else, which it names, and for a damaged manifest.
    """
    ours = {"format": FORMAT, **identity}
    path = folder / NAME
    held = _read(folder, ours) if path.exists() else []
    if not path.exists() and any(folder.glob("*.bin")):
        raise _damaged(folder, "it is missing")
    if held and not set(held).intersection(keys):
        raise OrreryError(
            f"The activation cache in {folder} is of other samples, by another tokenizer or of other data: it has "
            f"{len(held)} with the digest {_digest(held)}, this run has {len(set(keys))} with the digest "
            f"{_digest(keys)}, and none of them is the same. {_remedy(folder)}"
        )
    listed = list(dict.fromkeys([*held, *keys]))
    if listed != held:
        content = {**ours, "samples": b"".join(listed).hex()}
        text = json.dumps({"sha256": _sha256(content), "content": content})
        write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
    return {key: slot for slot, key in enumerate(listed)}


def _read(folder: Path, ours: Identity) -> list[bytes]:
    """The samples' keys in order."""
    try:
        stored = json.loads((folder / NAME).read_text(encoding="utf-8"))
        theirs = stored["content"]
        if stored["sha256"] != _sha256(theirs):
            raise ValueError("its digest does not match")
        for key, value in ours.items():
            if theirs.get(key) != value:
                raise OrreryError(
                    f"The activation cache in {folder} is of another {NOUNS[key]}: {theirs.get(key)} there, {value} in "
                    f"this run. {_remedy(folder)}"
                )
        joined = bytes.fromhex(theirs["samples"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, str(error)) from error
    return [joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)]


def _damaged(folder: Path, why: str) -> OrreryError:
    return OrreryError(
        f"The manifest of the activation cache in {folder} is damaged ({why}), so nobody knows what its entries are "
        f"of. {_remedy(folder)}"
    )


def _remedy(folder: Path) -> str:
    return f"Name another folder with --cache-dir, or remove {folder}."


def _digest(keys: Sequence[bytes]) -> str:
    return hashlib.blake2b(b"".join(sorted(set(keys))), digest_size=KEY_BYTES).hexdigest()


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
