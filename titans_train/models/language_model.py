"""The language model: embedding, blocks, final norm, head.

Shapes: B batch, L tokens, N = B L tokens of the residual stream (flat, batch major), D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titans_train.memory.layer import NeuralMemory
from titans_train.models.blocks import Block, BlockState, LMMBlock, MAGBlock, MALBlock, TransformerBlock
from titans_train.models.layers import RMSNorm
from titans_train.models.mac import MACBlock, MACState
from titans_train.models.parts import Parts, SingleDevice
from titans_train.models.state import ModelState
from titans_train.shape import ModelShape

BLOCK_TYPES: dict[str, type[Block]] = {
    "transformer": TransformerBlock,
    "lmm": LMMBlock,
    "mac": MACBlock,
    "mag": MAGBlock,
    "mal": MALBlock,
}


@dataclass(frozen=True)
class ModelOutput:
    loss_sum: Tensor | None = None  # sum of token cross-entropies, float32 or better
    logits: Tensor | None = None  # [B, L, V], only where no labels were given
    losses: Tensor | None = None  # [B, L] cross-entropies, only where scores were asked for; 0: no label
    right: Tensor | None = None  # [B, L] bool: the likeliest token is the label
    state: ModelState | None = None


class LanguageModel(nn.Module):
    def __init__(self, shape: ModelShape, parts: Parts | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.parts = SingleDevice() if parts is None else parts
        self.activation_checkpointing = False
        std = shape.initializer_std
        table = (shape.vocabulary, shape.padded_vocabulary, shape.width, std)
        self.embedding = self.parts.table(*table)
        block = BLOCK_TYPES[shape.block]
        self.blocks = nn.ModuleList(block(shape, self.parts, self.parts.neighbours(n)) for n in range(shape.layers))
        self.norm = RMSNorm(shape.width, shape.norm_eps, self.parts)
        self.head = None if shape.tied_head else self.parts.table(*table)

    def hidden(
        self, tokens: Tensor, document_starts: Tensor | None, state: ModelState | None
    ) -> tuple[Tensor, list[BlockState | MACState]]:
        """[B, L] tokens -> [N, D] (this device's share), normalised, and each block's new state."""
        x, states, batch = self.embedding(tokens), [], tokens.shape[0]
        for n, block in enumerate(self.blocks):
            carried = None if state is None else state.blocks[n]
            if self.activation_checkpointing and torch.is_grad_enabled():
                assert isinstance(block, Block)
                again = block.across.contexts
                x, new = checkpoint(block, x, batch, carried, document_starts, use_reentrant=False, context_fn=again)
            else:
                x, new = block(x, batch, carried, document_starts)
            states.append(new)
        return self.norm(x), states

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        document_starts: Tensor | None = None,
        state: ModelState | None = None,
        return_state: bool = False,
        scores: bool = False,
    ) -> ModelOutput:
        """tokens, labels [B, L] int64 (label t is the token after t; -100: none); document_starts [B, L] bool.

        With `state`, tokens continue an earlier call. Labels given: loss_sum, or with `scores` losses and right; else
        logits.
        """
        x, states = self.hidden(tokens, document_starts, state)
        head = self.embedding if self.head is None else self.head
        logits = head(x, as_head=True)
        carried = ModelState(tuple(states)) if return_state else None
        if labels is None:
            by_token = logits[:, : self.shape.vocabulary].unflatten(0, tokens.shape)
            return ModelOutput(logits=by_token, state=carried)
        if scores:
            losses, right = self.parts.token_scores(logits, labels.flatten())
            return ModelOutput(losses=losses.view(tokens.shape), right=right.view(tokens.shape), state=carried)
        return ModelOutput(loss_sum=self.parts.cross_entropy_sum(logits, labels.flatten()), state=carried)


def _mean(entries: list[tuple[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Of each figure over the entries that have it, by their numbers of rows."""
    keys = dict.fromkeys(key for _, figures in entries for key in figures)
    having = {key: [(rows, figures[key]) for rows, figures in entries if key in figures] for key in keys}
    return {
        key: torch.stack([rows * value for rows, value in found]).sum() / sum(rows for rows, _ in found)
        for key, found in having.items()
    }


@contextmanager
def recording(model: nn.Module) -> Iterator[dict[int, dict[str, Tensor]]]:
    """At its end {layer: {surprise, alpha, eta, theta, weight_norm, momentum_norm}}, 0-d tensors, is filled.

    Values are means over the forwards within (over MAC's segments), and over batch, heads and tokens of each; norms
    are of the states that sequences (or shards of them) end with. Persistent tokens do not count.
    """
    memories = [m for m in model.modules() if isinstance(m, NeuralMemory)]
    means: dict[int, dict[str, Tensor]] = {}
    for memory in memories:
        memory.records = []
    try:
        yield means
    finally:
        for n, memory in enumerate(memories):
            entries, memory.records = memory.records or [], None
            if entries:
                means[n] = _mean(entries)
