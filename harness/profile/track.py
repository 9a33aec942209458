"""Watches every operator that torch dispatches: its FLOPs, its kernels, and the life of each storage it makes."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    conv_flop_count,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

aten = torch.ops.aten

#: Operators that make a tensor without writing it: no kernel runs.
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


class Tracker(TorchDispatchMode):
    """Counts what runs under it.

    `flops`: operator class -> FLOPs. `kernels`: operators that compute something, so no views and allocations.
    Storages made under it are numbered. `changes`: (bytes, storage number) in order, positive where a storage
    begins to live, negative where it ends. `alive`: bytes by the numbers of those that live.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = {"matmul": 0, "conv": 0, "depthwise": 0}
        self.kernels = 0
        self.changes: list[tuple[int, int]] = []
        self.alive: dict[int, int] = {}
        self._entries: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._numbers = count(1)  # one step even where several threads make storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":
            return out
        packet = func.overloadpacket
        known = {storage_id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        fresh = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and storage_id(leaf) not in known]
        for tensor in fresh:
            self._begin(tensor.untyped_storage())
        if (fresh or func._schema.is_mutable) and packet not in ALLOCATIONS:
            self.kernels += 1
        work = operator_flops(packet, args, kwargs, out)
        if work is not None:
            self.flops[work[0]] += work[1]
        return out

    def number(self, tensor: Tensor) -> int | None:
        """The number of the tensor's storage, or None if it was not made here."""
        entry = self._entries.get(storage_id(tensor))
        return entry[0] if entry else None

    def levels(self, without: Collection[int | None] = (), only: Collection[int] | None = None) -> Iterator[int]:
        """Bytes alive after each change, `without` some storages, or of some `only`; zero before the first."""
        level = 0
        yield level
        for change, number in self.changes:
            if number not in without and (only is None or number in only):
                level += change
            yield level

    def watch(self, tensor: Tensor) -> None:
        """Count a tensor made elsewhere, in another thread for one, as if it had been made here."""
        self._begin(tensor.untyped_storage())

    def _begin(self, storage: Any) -> None:
        identity, nbytes = storage._cdata, storage.nbytes()
        if identity in self._entries:
            return
        number = next(self._numbers)
        self.changes.append((nbytes, number))
        self.alive[number] = nbytes
        self._entries[identity] = number, weakref.ref(storage, partial(self._end, identity, number))

    def _end(self, identity: int, number: int, _: Any) -> None:
        del self._entries[identity]
        self.changes.append((-self.alive.pop(number), number))


def storage_id(tensor: Tensor) -> int:
    """What tells two living storages apart."""
    return tensor.untyped_storage()._cdata


def operator_flops(packet: Any, args: Any, kwargs: Any, out: Any) -> tuple[str, int] | None:
    """(operator class, FLOPs) of one operator by torch's own formulas; None for what torch gives no FLOPs.

    Two corrections: torch 2.13 has no formula for CPU flash attention, and its formula for the weight gradient
    of a grouped convolution forgets the groups (each group sees only its own input channels).
    """
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return "matmul", sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return "matmul", sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    if packet is aten.convolution_backward:
        gradient, x, weight = args[:3]
        flops = conv_flop_count(x.shape, weight.shape, gradient.shape, transposed=args[7])
        return _conv_class(x, groups=args[9]), flops * sum(args[10][:2])
    if packet is aten.convolution:
        flops = conv_flop_count(args[0].shape, args[1].shape, out.shape, transposed=args[6])
        return _conv_class(args[0], groups=args[8]), flops
    if packet in flop_registry:
        return "matmul", flop_registry[packet](*args, **kwargs, out_val=out)
    return None


def _conv_class(x: Tensor, groups: int) -> str:
    return "depthwise" if groups == x.shape[1] > 1 else "conv"
