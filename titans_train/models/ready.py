"""What computes a model on this machine, looked at before a run starts: kernels, torch.compile."""

from __future__ import annotations

import torch

from titans_train import fusion
from titans_train.errors import UserError
from titans_train.memory import kernels
from titans_train.memory.peers import kernels as peer_kernels
from titans_train.shape import ModelShape


def check_ready(shape: ModelShape, dtype: torch.dtype, documents: bool) -> str | None:
    """UserError where what the shape asks for cannot be had, and a remark where a slower way has to do. Builds what is
    built. dtype: of the model; documents: sequences hold documents of their own.
    """
    cuda, memory = torch.cuda.is_available(), shape.memory
    if shape.attention.kernels == "flex" and not cuda:
        raise UserError("attention.kernels is flex, but there is no CUDA device: use auto or plain")
    if shape.compile:
        fusion.check(torch.device("cuda" if cuda else "cpu"))
    if memory is None:
        return None
    if memory.rule == "titans":
        return kernels.check(memory.kernels, kernels.Trial(memory, shape.head_dim, dtype, documents), cuda)
    peer_kernels.check(memory.peer_kernels)
    return None
