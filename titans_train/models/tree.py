"""Nested states: dataclasses and tuples with tensors at the leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def map_tensors(function: Callable[..., Tensor], *values: Any) -> Any:
    """The first value with every tensor replaced by function(it, and those in its place in the other values)."""
    value = values[0]
    if isinstance(value, Tensor):
        return function(*values)
    if isinstance(value, tuple):
        return tuple(map_tensors(function, *same) for same in zip(*values, strict=True))
    if is_dataclass(value):
        kind: Any = type(value)
        names = [field.name for field in fields(value)]
        return kind(**{name: map_tensors(function, *(getattr(v, name) for v in values)) for name in names})
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """Its tensors, in order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, value)
    return found


def join_rows(parts: list[Any]) -> Any:
    """One state of all rows, from those of neighbouring rows."""
    return parts[0] if len(parts) == 1 else map_tensors(lambda *tensors: torch.cat(tensors), *parts)


def take_rows(state: Any, rows: slice) -> Any:
    return map_tensors(lambda tensor: tensor[rows], state)
