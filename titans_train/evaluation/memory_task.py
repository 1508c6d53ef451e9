"""What the memories do while one text is read: surprise, gates and state norms over the text, layer by layer, and the
loss with the memory as trained and switched off (read, not written); as PNG, TensorBoard figures and JSON.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titans_train.data.sample import IGNORE
from titans_train.errors import UserError
from titans_train.evaluation.context import Context
from titans_train.evaluation.introspection import HEADS, figures, introspect
from titans_train.evaluation.streaming_task import split_tokens, text_tokens
from titans_train.parallel.launch import device

OF_SPLIT = 8192  # tokens of the validation split, where no number is given
TOLD = 10  # tokens of each list on the console
SAID_EVERY = 1 << 18  # tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, help="UTF-8 file (default: the run's validation data)")
    parser.add_argument(
        "--tokens", type=int, help=f"read at most so many (default: the whole text; {OF_SPLIT} of validation data)"
    )
    parser.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="folder for the pictures as events")


def run(context: Context, options: argparse.Namespace) -> dict[str, Any]:
    check(context, options)
    tokens, labels = text_of_task(context, options)
    if not bool((labels != IGNORE).any()):
        raise UserError(f"the text has {len(tokens)} tokens: there is nothing to predict; give at least 2")
    text_of = reader(context)

    def tell(done: int) -> None:
        if done < len(tokens) and done % SAID_EVERY == 0:
            context.say(f"  {done:,} of {len(tokens):,} tokens")

    context.say(f"{context.source.checkpoint} (step {context.about['step']}) reads {len(tokens):,} tokens")
    found = introspect(context.model, tokens, labels, device(), tell=tell)
    result = {"text": None if options.text is None else str(options.text), **figures(found, text_of)}
    say(context, result)
    if options.picture or options.tensorboard:
        from titans_train.evaluation.introspection_plot import picture, to_tensorboard

        title = f"{context.source.config.run.name}, step {context.about['step']}, {len(tokens):,} tokens"
        if options.picture:
            picture(found, options.picture, title, text_of)
        if options.tensorboard:
            to_tensorboard(found, options.tensorboard, context.about["step"], text_of)
    return result


def check(context: Context, options: argparse.Namespace) -> None:
    """UserError: what cannot be watched, or written, so that nothing is read in vain."""
    memory = context.model.shape.memory
    if memory is None or memory.rule != "titans":
        has = "none" if memory is None else f"one with the rule {memory.rule}"
        raise UserError(
            f"--task memory looks into a Titans memory; {context.source.checkpoint} (block {context.about['block']}) "
            f"has {has}. Use --task perplexity or stream",
            agreed=True,
        )
    if context.mesh.world_size > 1:
        raise UserError(f"one process reads one text; {context.mesh.world_size} were started: start one", agreed=True)
    if options.tokens is not None and options.tokens < 2:
        raise UserError(f"--tokens is {options.tokens}; it is at least 2")
    folder = options.tensorboard
    if folder and not (folder.is_dir() or (not folder.exists() and folder.absolute().parent.is_dir())):
        raise UserError(
            f"--tensorboard {folder}: is no folder, and there is no {folder.absolute().parent} to make it in"
        )


def text_of_task(context: Context, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Tokens [N] and the label of each: of a file, of the validation split, or one sequence of a synthetic task."""
    if options.text is None and context.config.data.source != "shards":
        from titans_train.data import open_dataset

        sample = open_dataset(context.config, "validation").sequence(0)
        first = int((sample.labels != IGNORE).nonzero()[0])
        if options.tokens is not None and options.tokens <= first:
            raise UserError(
                f"the first token that is asked for in a sequence of this run's task is token {first + 1}; --tokens is "
                f"{options.tokens}: give at least {first + 1}, or leave it out"
            )
        return sample.tokens[: options.tokens], sample.labels[: options.tokens]
    if options.text is None:
        found, most = split_tokens(context), options.tokens or OF_SPLIT
    else:
        found, most = text_tokens(options.text, context.tokenizer), options.tokens
    tokens = torch.from_numpy(np.fromiter(islice(found, most), np.int64))
    return tokens, torch.cat([tokens[1:], tokens.new_full((1,), IGNORE)])[: len(tokens)]


def reader(context: Context) -> Any:
    """Text of token ids; of a synthetic task their numbers."""
    if context.config.data.source != "shards":
        return lambda ids: "".join(f" {i}" for i in ids)
    return context.tokenizer.decode


def say(context: Context, result: dict[str, Any]) -> None:
    context.say("means over the text and over heads (distance: at its end):")
    context.say("  layer  surprise     alpha       eta     theta  |weights|  |momentum|  distance")
    for n, layer in enumerate(result["layers"]):
        context.say(f"  {n:>5}  {_summary(layer)}")
    context.say("  loss by position, with the memory as trained and switched off:")
    for row in result["by_position"]:
        place = f"{row['first']:>10,} to {row['last']:>10,}"
        context.say(f"  {place}  {_number(row['on'])}  {_number(row['off'])}")
    context.say(f"  whole text: {_number(result['loss']['on'])} on, {_number(result['loss']['off'])} off")
    for title, rows in (("most surprising", result["most_surprising"]), ("most missed", result["most_missed"])):
        context.say(f"  {title} tokens, by position:")
        for row in rows[:TOLD]:
            values = "  ".join(f"{name} {_number(row[name])}" for name in ("surprise", "on", "off") if name in row)
            context.say(f"  {row['position']:>10,}  {values}  {row['before']!r} > {row['text']!r}")


def _summary(layer: dict[str, Any]) -> str:
    mean = HEADS[0]

    def of(name: str, width: int) -> str:
        values = [x for x in layer[name][mean] if x is not None]
        if not values:
            return f"{'-':>{width}}"
        return f"{values[-1] if name == 'distance' else sum(values) / len(values):>{width}.4g}"

    widths = {"surprise": 8, "alpha": 8, "eta": 8, "theta": 8, "weight_norm": 9, "momentum_norm": 10, "distance": 8}
    return "  ".join(of(name, width) for name, width in widths.items())


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
