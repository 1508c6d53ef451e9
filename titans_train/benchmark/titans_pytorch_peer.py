"""The PyPI package titans-pytorch as a referee and a peer: its own modules, and our scan run on its weights.

In its exact mode (chunk_size=1, batch_size=b, no norm around the memory) it computes the function of `memory_scan`:
its loss is a mean over the head width d, so its step size is theta * d / 2. Needs the extra `peers`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titans_train.memory import MemoryState, memory_scan


def peer(dim: int, heads: int, batch_size: int | None, chunk_size: int = 1, norm: bool = False) -> Any:
    """Its NeuralMemory with a 2-layer memory, expansion 4. batch_size b is our chunk; None: every gradient at W_0."""
    from titans_pytorch import NeuralMemory  # type: ignore[import-untyped]

    return NeuralMemory(
        dim, dim_head=dim // heads, heads=heads, chunk_size=chunk_size, batch_size=batch_size,
        mem_model_norm_add_residual=norm, default_step_transform_max_lr=0.1,
        default_model_kwargs={"depth": 2, "expansion_factor": 4.0},
    )  # fmt: skip


def ours_on_its_weights(module: Any, x: Tensor, chunk_size: int) -> Tensor:
    """The output of the peer's layer for x [batch, length, dim], with our scan in place of its own."""
    batch, length, _ = x.shape
    normed = module.store_norm(x)

    def heads(gate: Tensor) -> Tensor:
        return gate.reshape(batch, module.heads, length)

    k, v = module.split_kv_heads(module.to_keys(normed)), module.split_kv_heads(module.to_values(normed))
    read = module.retrieve_norm(x)
    q = module.split_heads(module.to_queries(read))
    theta = heads(module.adaptive_step_transform(module.to_adaptive_step(normed))) * 2 / q.shape[-1]
    alpha = heads(module.to_decay_factor(normed).sigmoid())
    eta = heads(module.to_momentum(normed).sigmoid())
    weights = tuple(w[None].expand(batch, -1, -1, -1) for w in module.memory_model_parameters)
    state = MemoryState.start(weights)
    y, _ = memory_scan(q, k, v, alpha, eta, theta, state, chunk_size=chunk_size, activation="gelu")
    return module.combine_heads(module.merge_heads(y * module.retrieve_gate(read)))


def exactness(chunk_size: int, length: int, dim: int = 16, heads: int = 2, seed: int = 0) -> dict[str, float]:
    """Largest relative difference to the peer's exact mode in float64, for the output and every gradient."""
    torch.manual_seed(seed)
    module = peer(dim, heads, batch_size=chunk_size).double()
    x = torch.randn(2, length, dim, dtype=torch.float64, requires_grad=True)
    leaves = {"x": x} | dict(module.named_parameters())
    results = []
    for output in (module(x)[0], ours_on_its_weights(module, x, chunk_size)):
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
        gradients = torch.autograd.grad((output * cotangent).sum(), list(leaves.values()), allow_unused=True)
        results.append({"output": output.detach()} | dict(zip(leaves, gradients, strict=True)))
    theirs, ours = results
    errors = {}
    for name, want in theirs.items():
        if want is not None:
            got = ours[name]
            errors[name] = float((got - want).abs().max() / want.abs().max()) if got is not None else float("inf")
    return errors
