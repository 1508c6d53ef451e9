"""The chunks of a segment as one Triton kernel each way (CUDA; any dtype in Triton's interpreter).

`segment.py` launches them; `tiles.py` has the functions of a tile. They compute what ../gates.py, ../chunk.py and
../chunk_backward.py say, with the same names. This file can be imported without Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from titans_train.errors import UserError
from titans_train.memory.walk import Segment, Sequence
from titans_train.shape import beyond_kernels

if TYPE_CHECKING:
    from titans_train.memory.kernels.segment import Launch


def launch(seq: Sequence, segment: Segment, depth: int) -> Launch | None:
    """The kernels for a segment; None where plain PyTorch is to do it: unasked for, a single chunk (which may have been
    entered before, or be asked for its anchor), or one of those that the kernels do not take.
    """
    if seq.precision is None or segment.chunks == 1 or seq.base:
        return None
    if beyond_kernels(depth, segment.size, seq.k.shape[-1], seq.precision == "ieee"):
        return None
    from titans_train.memory.kernels.segment import Launch

    return Launch.of(seq, segment, seq.precision)


def check(kernels: str) -> None:
    """UserError where "triton" is asked for and cannot be had; for a training to ask before it starts."""
    if kernels != "triton":
        return
    reason = None
    if not torch.cuda.is_available():
        reason = "there is no CUDA device: start on a machine with one"
    else:
        try:
            import titans_train.memory.kernels.segment  # noqa: F401
        except ImportError as error:
            reason = f"Triton cannot be imported ({error}): install it as your torch wants it"
    if reason is not None:
        raise UserError(f"memory.kernels is triton, but {reason}; or use auto or plain")
