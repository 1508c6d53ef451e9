"""What computes a model on this machine, looked at before a run starts: kernels, torch.compile."""

from __future__ import annotations

import torch

from titans_train import fusion
from titans_train.errors import UserError
from titans_train.memory import kernels
from titans_train.memory.peers import kernels as peer_kernels
from titans_train.plan import Plan


def check_ready(plan: Plan, cuda: bool | None = None) -> str | None:
    """UserError where what the plan asks for cannot be had, and a remark where a slower way has to do. Builds what is
    built. cuda: it will run on a GPU; None: if there is one.
    """
    cuda, shape = torch.cuda.is_available() if cuda is None else cuda, plan.shape
    memory = shape.memory
    if shape.attention.kernels == "flex" and not cuda:
        raise UserError("attention.kernels is flex, but there is no CUDA device: use auto or plain")
    if shape.compile:
        fusion.check(torch.device("cuda" if cuda else "cpu"))
    if memory is None:
        return None
    if memory.rule == "titans":
        dtype, documents = getattr(torch, plan.config.run.dtype), plan.config.data.packing == "isolate"
        return kernels.check(memory.kernels, kernels.Trial(memory, shape.head_dim, dtype, documents), cuda)
    peer_kernels.check(memory.peer_kernels)
    return None
