"""When two units cost the same: a value made of everything their cost depends on, blind to weights and names."""

from __future__ import annotations

from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

#: Attributes that tell equal layers apart without changing what they do.
POSITIONS = {"layer_idx", "layer_id"}
PLAIN = (bool, int, float, complex, str, bytes, type(None))


def structure(value: Any, seen: dict[int, Any]) -> Any:
    """A hashable description of a function or module: code, constants, types, shapes, dtypes, flags.

    What can't be described stands for itself by identity, so that unequal things are never taken for equal.
    `seen` remembers modules by identity and must not outlive them.
    """
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(structure(item, seen) for item in value)
    if isinstance(value, dict):
        return ("dict", structure(list(value.items()), seen))
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype, value.requires_grad)
    if isinstance(value, nn.Module):
        if id(value) not in seen:
            seen[id(value)] = _module(value, seen)
        return seen[id(value)]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return (value.__code__, structure(cells, seen), structure(defaults, seen))
    if isinstance(value, MethodType):
        return (structure(value.__func__, seen), structure(value.__self__, seen))
    if isinstance(value, partial):
        arguments = [*value.args, *value.keywords.items()]
        return (structure(value.func, seen), structure(arguments, seen))
    return ("object", id(value))


def _module(module: nn.Module, seen: dict[int, Any]) -> Any:
    attributes = [
        (name, structure(value, seen))
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in POSITIONS
    ]
    tensors = [
        (name, structure(tensor, seen))
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
    ]
    children = [(name, structure(child, seen)) for name, child in module.named_children()]
    return (type(module), tuple(attributes), tuple(tensors), tuple(children))
