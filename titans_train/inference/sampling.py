"""Reading a text and sampling after it, token by token, on the model's carried state.

Shapes: B rows (texts), L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from titans_train.errors import UserError
from titans_train.inference.sampler import Sampler
from titans_train.inference.text import TextStream
from titans_train.models.state import ModelState
from titans_train.models.tree import map_tensors

PREFILL = 4096  # tokens per forward of a prompt: bounds the memory that a long one takes


class Tokenizer(Protocol):
    vocabulary: int
    end_of_document: int

    def encode(self, texts: list[str]) -> list[Any]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Reading:
    """Where a text has been read to: the carried state and the logits [V] of the next token."""

    state: ModelState
    logits: Tensor
    seen: Tensor | None = None  # [V] bool: the tokens of the text, for the repetition penalty; None: not known


@torch.inference_mode()
def read(model: Any, tokens: list[int], before: ModelState | Reading | None = None) -> Reading:
    """Feeds tokens (at least one) in pieces of bounded length, after `before`.

    UserError for a token outside the vocabulary.
    """
    return read_rows(model, [tokens], before)[0]


@torch.inference_mode()
def read_rows(model: Any, texts: Sequence[list[int]], before: ModelState | Reading | None = None) -> list[Reading]:
    """Several texts, each read alone after `before`; those of one length share their forwards. Errors as `read`."""
    for tokens in texts:
        _check(tokens, model.shape.vocabulary)
    state, seen = (before.state, before.seen) if isinstance(before, Reading) else (before, None)
    found: dict[int, Reading] = {}
    for length in dict.fromkeys(map(len, texts)):
        rows = [number for number, tokens in enumerate(texts) if len(tokens) == length]
        same = torch.tensor([texts[number] for number in rows], device=next(model.parameters()).device)
        after, logits = _feed(model, same, _repeat(state, len(rows)))
        for place, number in enumerate(rows):
            own = after if len(rows) == 1 else map_tensors(lambda t, n=place: t[n : n + 1], after)
            found[number] = Reading(own, logits[place], _also(seen, same[place], model.shape.vocabulary))
    return [found[number] for number in range(len(texts))]


def _check(tokens: list[int], limit: int) -> None:
    if not tokens:
        raise ValueError("there is nothing to read: give at least one token")
    if max(tokens) >= limit:
        raise UserError(
            f"the prompt has token {max(tokens)}, the model's vocabulary is {limit}: another tokenizer made it; "
            "set data.path to the folder that the training data was prepared in"
        )


def _feed(model: Any, tokens: Tensor, state: ModelState | None) -> tuple[ModelState, Tensor]:
    """tokens [B, L] -> the state after them and the logits [B, V] of the next."""
    piece = max(PREFILL // len(tokens), 1)
    for first in range(0, tokens.shape[1], piece):
        x, blocks = model.hidden(tokens[:, first : first + piece], None, state)
        state = ModelState(tuple(blocks))
    assert state is not None
    head = model.embedding if model.head is None else model.head
    last = x.unflatten(0, (len(tokens), -1))[:, -1]  # logits of every position would take more than all the rest
    return state, head(last, as_head=True)[:, : model.shape.vocabulary].clone()


def _repeat(state: ModelState | None, rows: int) -> ModelState | None:
    """One text's state for several rows, without copying."""
    if state is None or rows == 1:
        return state
    repeated: ModelState = map_tensors(lambda t: t.expand(rows, *t.shape[1:]), state)
    return repeated


def _also(seen: Tensor | None, tokens: Tensor, vocabulary: int) -> Tensor:
    """[V] bool, with these tokens [L] too."""
    seen = torch.zeros(vocabulary, dtype=torch.bool, device=tokens.device) if seen is None else seen.to(tokens.device)
    return seen.index_fill(0, tokens, True)


@torch.inference_mode()
def generate(
    model: Any, reading: Reading, count: int, sampler: Sampler, seed: int | torch.Generator = 0
) -> Iterator[tuple[int, Reading]]:
    """Yields `count` pairs of a token id and the reading that includes it. A CPU generator as seed goes on."""
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    for _ in range(count):
        seen = None if reading.seen is None else reading.seen.cpu()
        token = sampler.draw(reading.logits.cpu(), generator, seen)
        reading = read(model, [token], reading)
        yield token, reading


def sample_text(
    model: Any, tokenizer: Tokenizer, prompt: str, tokens: int, sampler: Sampler | None = None, seed: int = 0
) -> str:
    """The prompt and `tokens` sampled tokens after it. The global random state stays as it was."""
    ids = [int(i) for i in tokenizer.encode([prompt])[0]]
    if not ids:
        raise UserError("the prompt is empty, and a model continues a text; give at least one character")
    sampler = Sampler(vocabulary=tokenizer.vocabulary) if sampler is None else sampler
    text = TextStream(tokenizer, ids)
    made = [text.add(token) for token, _ in generate(model, read(model, ids), tokens, sampler, seed)]
    return prompt + "".join(made) + text.close()
