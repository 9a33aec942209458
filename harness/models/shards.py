"""A model's tensors in one file, and of them only what a device's units hold: no device ever has more in memory.

Every device builds the same model on "meta", where it costs nothing, and fills in its own range.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from harness import models
from harness.errors import OrreryError
from harness.models.cuts import cut
from harness.models.layered import Layered
from harness.store import write_whole
from harness.workload import Workload


def write(workload: Workload, path: Path) -> None:
    """Build the workload's model, and write its parameters and buffers by name, each tied one once (safetensors).

    Raises OrreryError if the model can't be built or the file can't be written.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in named(models.build(workload).root)}
    write_whole(path, lambda part: save_file(tensors, part))


def load(
    workload: Workload,
    path: Path,
    first: int,
    last: int,
    widths: Mapping[int, tuple[int, int]] | None = None,
    biases: Collection[str] = (),
) -> Layered:
    """The workload's model with the tensors of units [first, last), and of the local units they need, on the CPU.

    Of the units in `widths` with some channels only, as `cut` takes them. All other tensors stay on "meta", and their
    bytes are not read. `path` is what `write` made of the same workload.
    Raises OrreryError for a file that is not there, is damaged, or holds a model of other shapes.
    """
    layered = cut(models.build(workload, device="meta"), widths or {}, biases)
    units = layered.units[first:last]
    held = {
        id(tensor): tensor
        for unit in (*layered.locals_of(units), *units)
        for tensor in (*unit.parameters(), *unit.buffers())
        if tensor.is_meta
    }
    complete(layered, workload, path, list(held.values()))
    return layered


def complete(layered: Layered, workload: Workload, path: Path, tensors: Sequence[Tensor]) -> None:
    """Give the model's `tensors`, which are on "meta", what the file has of them. Raises as `load`."""
    names = {id(tensor): name for name, tensor in named(layered.root)}
    try:
        with safe_open(path, framework="pt") as file:
            for tensor in tensors:
                name = names[id(tensor)]
                piece = layered.pieces.get(name)
                fill(tensor, file.get_tensor(name) if piece is None else piece.read(file, name))
    except (OSError, SafetensorError, ValueError) as error:
        raise OrreryError(
            f"The weights of {workload.model} can't be read from {path}: {error} Write them again for this workload."
        ) from error


def frozen_digest(workload: Workload, path: Path) -> str:
    """Of all that is not trained: names and content. `path` is what `write` made of the workload."""
    found = named(models.build(workload, device="meta").root)
    digest = hashlib.blake2b(digest_size=16)
    with safe_open(path, framework="pt") as file:
        for name in sorted(name for name, tensor in found if not tensor.requires_grad):
            digest.update(name.encode())
            digest.update(file.get_tensor(name).reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def named(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, those too that a state dict leaves out; tied ones once."""
    yield from root.named_parameters()
    yield from root.named_buffers()


def absent(tensor: Tensor) -> bool:
    """Whether the tensor has a shape and no content: it never had one, or it was let go."""
    return tensor.is_meta or tensor.untyped_storage().nbytes() < tensor.nbytes


def fill(tensor: Tensor, stored: Tensor) -> None:
    """Give a tensor on "meta" its content. It stays the object that all modules tied to it hold.

    `stored` is copied: it is a view of the file, which may be removed.
    """
    if (stored.shape, stored.dtype) != (tensor.shape, tensor.dtype):
        raise ValueError(
            f"it holds a tensor of {list(stored.shape)} {stored.dtype} where the model has {list(tensor.shape)} "
            f"{tensor.dtype}."
        )
    content = stored.clone()
    if isinstance(tensor, nn.Parameter):
        content = nn.Parameter(content, tensor.requires_grad)
    torch.utils.swap_tensors(tensor, content)
