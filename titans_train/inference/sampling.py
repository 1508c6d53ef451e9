"""Reading a prompt and sampling after it, token by token, on the model's carried state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from titans_train.errors import UserError
from titans_train.models.state import ModelState

PREFILL = 4096  # tokens per forward of a prompt: bounds the memory that a long one takes


class Tokenizer(Protocol):
    vocabulary: int

    def encode(self, texts: list[str]) -> list[Any]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Sampler:
    """temperature 0 takes the likeliest token; top_p keeps the smallest set of tokens with that probability."""

    temperature: float = 0.8
    top_p: float = 1.0
    vocabulary: int | None = None  # ids from here on are padding and never drawn

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """logits: [V] -> a token id. UserError where they are not finite."""
        logits = logits.float()[: self.vocabulary]
        if not bool(logits.isfinite().all()):
            raise UserError("the model's logits are not finite: it has diverged; use an earlier checkpoint")
        if self.temperature == 0:
            return int(logits.argmax())
        probabilities, order = (logits / self.temperature).softmax(-1).sort(descending=True)
        kept = probabilities.cumsum(-1) - probabilities < self.top_p
        return int(order[torch.multinomial(probabilities * kept, 1, generator=generator)])


@dataclass(frozen=True)
class Reading:
    """Where a text has been read to: the carried state and the logits [V] of the next token."""

    state: ModelState
    logits: Tensor


@torch.inference_mode()
def read(model: Any, tokens: list[int], state: ModelState | None = None) -> Reading:
    """Feeds tokens (at least one) in pieces of bounded length. UserError for a token outside the vocabulary."""
    where, limit = next(model.parameters()).device, model.shape.vocabulary
    if max(tokens, default=0) >= limit:
        raise UserError(
            f"the prompt has token {max(tokens)}, the model's vocabulary is {limit}: another tokenizer made it; "
            "set data.path to the folder that the training data was prepared in"
        )
    logits = None
    for first in range(0, len(tokens), PREFILL):
        piece = torch.tensor([tokens[first : first + PREFILL]], device=where)
        output = model(piece, state=state, return_state=True)
        state, logits = output.state, output.logits[0, -1]
    if state is None or logits is None:
        raise ValueError("there is nothing to read: give at least one token")
    return Reading(state, logits)


@torch.inference_mode()
def generate(
    model: Any, reading: Reading, count: int, sampler: Sampler, seed: int | torch.Generator = 0
) -> Iterator[tuple[int, Reading]]:
    """Yields `count` pairs of a token id and the reading that includes it. A CPU generator as seed goes on."""
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    for _ in range(count):
        token = sampler.draw(reading.logits.cpu(), generator)
        reading = read(model, [token], reading.state)
        yield token, reading


def sample_text(
    model: Any, tokenizer: Tokenizer, prompt: str, tokens: int, sampler: Sampler | None = None, seed: int = 0
) -> str:
    """The prompt and `tokens` sampled tokens after it. The global random state stays as it was."""
    ids = [int(i) for i in tokenizer.encode([prompt])[0]]
    if not ids:
        raise UserError("the prompt is empty, and a model continues a text; give at least one character")
    sampler = Sampler(vocabulary=tokenizer.vocabulary) if sampler is None else sampler
    out = [token for token, _ in generate(model, read(model, ids), tokens, sampler, seed)]
    return prompt + tokenizer.decode(out)
