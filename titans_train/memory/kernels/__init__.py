"""The whole chunks of a segment at once, in place of plain PyTorch's calls one by one: on a CPU compiled C++, on a GPU
one Triton kernel each way.

They compute what ../gates.py, ../chunk.py and ../chunk_backward.py say, with the same names: cpp/ (compiled.py builds
and calls it) row by row; forward.py, backward.py and coefficients.py (segment.py launches them, tiles.py has what a
tile needs) in Triton, also in its interpreter on a CPU. This file can be imported without Triton and a compiler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from titans_train.errors import UserError
from titans_train.memory.kernels import compiled
from titans_train.memory.walk import Segment, Sequence, SequenceGradients
from titans_train.shape import beyond_kernels

if TYPE_CHECKING:
    from collections.abc import Callable

    from titans_train.memory.chunk import Adjoints


class Kernel(Protocol):
    """For one segment of a call."""

    def forward(self, weights: list[Tensor], momentum: list[Tensor], y: Tensor) -> None:
        """Moves the state over the segment, in place, and fills y [rows, L, D] there."""

    def backward(
        self,
        weights: list[Tensor],
        momentum: list[Tensor],
        d_y: Tensor,
        adjoints: Callable[[], Adjoints],
        found: SequenceGradients,
    ) -> None:
        """From the state before the segment. adjoints: asked for, as late as can be, those of the state after it, which
        move to before it, in place. found: filled there, and added to.
        """


@dataclass(frozen=True)
class Chosen:
    """Who does segments, and how Triton's products are to be rounded."""

    name: str  # "compiled" or "triton"
    precision: str = "ieee"  # ieee, tf32 or tf32x3


def choose(kernels: str, device: torch.device, dtype: torch.dtype) -> Chosen | None:
    """None: plain PyTorch. auto: compiled on a CPU that has a compiler. dtype: of the model; 16-bit inputs and outputs
    are rounded more coarsely than TF32 rounds.
    """
    if kernels == "triton":
        return Chosen("triton", "tf32" if dtype.itemsize == 2 else "ieee")
    if kernels == "plain" or device.type != "cpu":
        return None
    reason = compiled.why_not()
    if reason is None:
        return Chosen("compiled")
    if kernels == "compiled":
        raise UserError(f"memory.kernels is compiled, but {reason}; or use auto or plain")
    return None


def launch(seq: Sequence, segment: Segment, depth: int) -> Kernel | None:
    """The kernel for a segment; None where plain PyTorch is to do it: unasked for, a part of a chunk, or what the
    kernels do not take.
    """
    if seq.kernels is None or not segment.whole or seq.base:
        return None
    if seq.kernels.name == "compiled":
        return compiled.Launch(seq, segment)
    if beyond_kernels(depth, segment.size, seq.k.shape[-1], seq.kernels.precision == "ieee"):
        return None
    from titans_train.memory.kernels.segment import Launch

    return Launch.of(seq, segment, seq.kernels.precision)


def check(kernels: str) -> None:
    """UserError where what is asked for cannot be had; for a training to ask before it starts. Builds what is built."""
    reason = None
    if kernels == "compiled":
        reason = "it is for CPUs, and there is a CUDA device" if torch.cuda.is_available() else compiled.why_not()
    elif kernels == "auto" and not torch.cuda.is_available():
        compiled.why_not()
    elif kernels == "triton":
        reason = _no_triton()
    if reason is not None:
        raise UserError(f"memory.kernels is {kernels}, but {reason}; or use auto or plain")


def _no_triton() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device: start on a machine with one"
    try:
        import titans_train.memory.kernels.segment  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}): install it as your torch wants it"
    return None
