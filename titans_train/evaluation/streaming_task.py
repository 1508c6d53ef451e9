"""Perplexity of one long text, read in one pass with carried state at constant memory, also by position; with the time
per token and the memory along the way.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_train.errors import UserError
from titans_train.evaluation.context import Context
from titans_train.evaluation.streaming import Row, read_stream, together
from titans_train.inference.incoming import texts_of
from titans_train.inference.source import encode
from titans_train.parallel.launch import device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, help="UTF-8 file (default: the run's validation split, end to end)")
    parser.add_argument("--tokens", type=int, help="read at most so many")
    parser.add_argument("--piece", type=int, default=4096, help="tokens per forward")


def text_tokens(path: Path, tokenizer: Any) -> Iterator[int]:
    """Tokens of a file of any length, encoded piece by piece just as `generate --stdin` does. UserError."""
    try:
        with path.open("rb") as file:
            for text in texts_of(file, name=f"--text {path}"):
                yield from encode(tokenizer, text)
    except OSError as error:
        raise UserError(f"--text {path} cannot be read: {error.strerror}; give a UTF-8 text file") from error


def split_tokens(context: Context) -> Iterator[int]:
    """The sequences of the validation split after each other: with packing concatenate they follow in the text."""
    from titans_train.data import TokenDataset, open_dataset

    dataset = open_dataset(context.config, "validation", context.model.shape.document_alignment, carried=False)
    if not isinstance(dataset, TokenDataset) or context.config.data.packing != "concatenate":
        raise UserError("the run's sequences do not follow each other (data.packing isolate, or a task): give --text")
    for number in range(dataset.sequences_total):
        yield from dataset.sequence(number).tokens.tolist()


def pieces_of(tokens: Iterator[int], size: int) -> Iterator[Tensor]:
    while piece := list(islice(tokens, size)):
        yield torch.tensor(piece)


def run(context: Context, options: argparse.Namespace) -> dict[str, Any]:
    if context.mesh.world_size > 1:
        raise UserError(f"one process reads one text; {context.mesh.world_size} were started")
    if options.piece < 1 or (options.tokens is not None and options.tokens < 2):
        raise UserError("--piece is at least 1 and --tokens at least 2")
    tokens = split_tokens(context) if options.text is None else text_tokens(options.text, context.tokenizer)
    if options.tokens is not None:
        tokens = islice(tokens, options.tokens)
    context.say(f"{'position':>23}  {'loss':>7}  {'ms/token':>8}  {'state':>10}  {'resident':>10}")
    rows = read_stream(context.model, pieces_of(tokens, options.piece), device(), lambda r: context.say(_line(r)))
    if not rows:
        raise UserError("the text has fewer than two tokens: there is nothing to predict")
    whole = together(rows)
    context.say(f"{whole['tokens']:,} tokens: loss {whole['loss']:.4f}, perplexity {whole['perplexity']:,.3f}")
    return {"piece": options.piece, "text": None if options.text is None else str(options.text), **whole, "rows": rows}


def _line(r: Row) -> str:
    place = f"{r['first']:>10,} to {r['last']:>9,}"
    sizes = f"{r['state_bytes'] / 2**20:>6.1f} MiB  {r['resident_bytes'] / 2**20:>6.0f} MiB"
    return f"{place}  {r['loss']:7.4f}  {1000 * r['seconds_per_token']:8.3f}  {sizes}"


def draw(figures: dict[str, Any], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = figures["rows"]
    figure, axes = pyplot.subplots(3, 1, figsize=(7, 8), sharex=True)
    at = [r["last"] + 1 for r in rows]
    axes[0].plot(at, [r["loss"] for r in rows], marker="o")
    axes[0].set(ylabel="loss, nats per token", title=title)
    axes[1].plot(at, [1000 * r["seconds_per_token"] for r in rows], marker="o")
    axes[1].set(ylabel="CPU ms per token", ylim=(0, None))
    axes[2].plot(at, [r["resident_bytes"] / 2**20 for r in rows], marker="o", label="process")
    axes[2].plot(at, [r["state_bytes"] / 2**20 for r in rows], marker="s", label="carried state")
    axes[2].set(ylabel="MiB", xlabel="tokens read", xscale="log", ylim=(0, None))
    axes[2].legend()
    for each in axes:
        each.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
