"""Blocks and layers that are measured side by side: how each is built, what it computes, and its FLOPs.

All blocks have the same feed-forward; `layer` has none, as titans-pytorch's layers: pre-norm, the memory, a gate, the
output projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from titans_train.benchmark.cost import Work
from titans_train.benchmark.device import DTYPES
from titans_train.config import ConfigError, RunConfig, check_config
from titans_train.config.schema import Memory
from titans_train.errors import UserError
from titans_train.models.blocks import Block, BlockState
from titans_train.models.language_model import BLOCK_TYPES
from titans_train.models.parts import SingleDevice
from titans_train.plan import resolve_shape
from titans_train.plan_counts import flops_per_token
from titans_train.shape import ModelShape

KERNELS: tuple[str, ...] = get_args(Memory.model_fields["kernels"].annotation)
TITANS = {"lmm": "LMM", "mac": "MAC", "mag": "MAG", "mal": "MAL", "layer": "LMM layer alone"}
PEERS = {
    "transformer": "Transformer++", "window": "Transformer++, window", "gated_deltanet": "Gated DeltaNet",
    "titans_pytorch": "titans-pytorch layer, exact", "titans_pytorch_gated": "titans-pytorch layer, chunk-gated",
}  # fmt: skip
LABELS = TITANS | PEERS
LAYER_PEERS = ("titans_pytorch", "titans_pytorch_gated")
CHUNKED = (*TITANS, *LAYER_PEERS)  # what a chunk changes the function of


@dataclass(frozen=True)
class Sizes:
    """Of every case. window: of sliding attention, and MAC's segment; kernels, compile: as memory.kernels and
    model.compile."""

    dim: int
    heads: int
    window: int = 512
    batch: int = 1
    kernels: str = "auto"
    compile: bool = False
    dtype: str = "float32"
    device: str = "cpu"


def shape_of(what: str, chunk: int, length: int, sizes: Sizes) -> ModelShape | None:
    """Of one block; None: of titans-pytorch, which has its own. ConfigError: no model has these sizes."""
    if what in LAYER_PEERS:
        return None
    block = {"layer": "lmm", "gated_deltanet": "lmm", "window": "transformer"}.get(what, what)
    sections: dict[str, Any] = {
        "run": {"name": "layers", "dtype": sizes.dtype}, "data": {"path": "none"},
        "model": {
            "block": block, "layers": 1, "width": sizes.dim, "heads": sizes.heads, "vocabulary": 264,
            "compile": sizes.compile,
        },
        "training": {"steps": 1, "sequence_length": length, "global_batch_size": 1, "micro_batch_size": 1},
        "attention": {"persistent_tokens": 0},
    }  # fmt: skip
    window = min(sizes.window, length)
    sections["attention"] |= {"mac": {"segment": window}, "lmm": {}, "transformer": {}}.get(what, {"window": window})
    if what == "gated_deltanet":
        sections["memory"] = {"rule": "gated_deltanet"}
    elif block != "transformer":
        sections["memory"] = {"chunk_size": chunk, "kernels": sizes.kernels}
    config = RunConfig.model_validate(sections)
    if problems := check_config(config):
        raise ConfigError(problems, f"{LABELS[what]} with --dim {sizes.dim}, chunk {chunk}, length {length}")
    return resolve_shape(config)


def flops_of(what: str, shape: ModelShape, length: int) -> float:
    """Of a token, forward and backward, products only, recomputation left out (plan_counts.py)."""
    parts = flops_per_token(shape, length)
    without = ("head", "feed_forward") if what == "layer" else ("head",)
    return sum(flops for part, flops in parts.items() if part not in without)


class LayerAlone(nn.Module):
    """An LMM block without its feed-forward and its residual."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.block = BLOCK_TYPES["lmm"](shape, SingleDevice())
        self.block.feed_forward, self.block.feed_forward_norm = nn.Identity(), nn.Identity()  # type: ignore[assignment]

    def forward(self, x: Tensor, batch: int) -> tuple[Tensor, BlockState]:
        return self.block.mix(x, batch, None, None)


def _built(what: str, shape: ModelShape | None, chunk: int, sizes: Sizes) -> Any:
    """A module: [B, L, D] -> ([B, L, D], ...), or a Block's or LayerAlone's forward."""
    if shape is None:
        try:
            from titans_train.benchmark.titans_pytorch_peer import peer

            exact = what == "titans_pytorch"  # its exact mode goes token by token; its chunked one shares the gates
            return peer(sizes.dim, sizes.heads, chunk if exact else None, 1 if exact else chunk, True)
        except ImportError as error:
            raise UserError(f"titans-pytorch cannot be imported ({error}): install the extra peers") from error
    return LayerAlone(shape) if what == "layer" else BLOCK_TYPES[shape.block](shape, SingleDevice())


def prepared(what: str, shape: ModelShape | None, chunk: int, sizes: Sizes) -> Callable[[int], Work]:
    """A function of a length: forward and backward with the gradients of the input and of all parameters."""
    module = _built(what, shape, chunk, sizes).to(sizes.device, DTYPES[sizes.dtype])
    parameters = list(module.parameters())

    def prepare(length: int) -> Work:
        x = torch.randn(sizes.batch, length, sizes.dim, device=sizes.device, dtype=DTYPES[sizes.dtype])
        x.requires_grad_()

        def forward() -> Tensor:
            ours = isinstance(module, Block | LayerAlone)
            out = module(x.flatten(0, 1), sizes.batch) if ours else module(x)
            y: Tensor = out[0] if isinstance(out, tuple) else out
            return y

        return Work(forward, [x, *parameters], parameters, countable=shape is not None)

    return prepare
