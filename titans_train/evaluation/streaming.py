"""Reading a document of any length in one pass with carried state: loss by position, time and memory along the way."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_train.evaluation.perplexity import stretches
from titans_train.models.tree import tensors_of

Row = dict[str, Any]


def resident_bytes() -> int:
    """Of this process now (Linux), or at its peak elsewhere."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.inference_mode()
def read_stream(
    model: Any, pieces: Iterator[Tensor], where: torch.device, tell: Callable[[Row], object] = lambda row: None
) -> list[Row]:
    """Loss of each next token of one document, [n] int64 tokens piece by piece; the model starts from nothing.

    Rows of stretches of positions, each twice as long as the one before: first, last, tokens, loss in nats per token,
    seconds (CPU time of this process) per token, state_bytes (carried into the next piece) and resident_bytes at its
    end. Pieces are parted where a stretch ends. tell: called with each row as it is done.
    """
    state, last, rows = None, None, []
    first, done, loss, seconds = 0, 0, 0.0, 0.0
    ends = iter(end for _, end in stretches(1 << 48))
    end = next(ends)

    def close() -> None:
        nonlocal first, loss, seconds, end
        tokens = done - first
        state_bytes = sum(t.numel() * t.element_size() for t in tensors_of(state))
        rows.append({
            "first": first, "last": done - 1, "tokens": tokens, "loss": loss / tokens,
            "seconds_per_token": seconds / tokens, "state_bytes": state_bytes, "resident_bytes": resident_bytes(),
        })  # fmt: skip
        tell(rows[-1])
        first, loss, seconds = done, 0.0, 0.0
        end = next(ends)

    for piece in pieces:
        tokens = piece if last is None else torch.cat([last, piece])  # a token is read with the one after it
        last = tokens[-1:]
        while len(tokens) > 1:
            begun = time.process_time()
            row = tokens[None, : end - done + 1].to(where)
            out = model(row[:, :-1], labels=row[:, 1:], state=state, return_state=True, scores=True)
            read = row.shape[1] - 1
            state, done, tokens = out.state, done + read, tokens[read:]
            loss += float(out.losses.double().sum())
            seconds += time.process_time() - begun
            if done == end:
                close()
    if done > first:
        close()
    return rows


def together(rows: list[Row]) -> Row:
    """tokens, loss and perplexity of the whole."""
    tokens = sum(r["tokens"] for r in rows)
    loss = sum(r["tokens"] * r["loss"] for r in rows) / max(tokens, 1)
    return {"tokens": tokens, "loss": loss, "perplexity": math.exp(min(loss, 700))}
