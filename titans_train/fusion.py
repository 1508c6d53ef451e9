"""Stretches of element-wise work as one loop each (`model.compile`): of a plain function of tensors by torch.compile.

What is a stretch stands beside the module that uses it, as a function of its inputs and parameters; the module asks for
it here. A collective, the memory's scan and products stay outside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def fused(function: Callable[P, Tensor], on: bool) -> Callable[P, Tensor]:
    """`function`, or with `on` what torch.compile makes of it: once per process, and again for other shapes."""
    return _compiled(function) if on else function


@functools.cache
def _compiled(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    return torch.compile(function)
