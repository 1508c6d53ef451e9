"""Loss, perplexity, accuracy and bits per byte on prepared data or on the run's synthetic task, also by position. Of a
synthetic task the accuracy has a 95 % interval, of sequences drawn at random.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from titans_train.config import RunConfig
from titans_train.errors import UserError
from titans_train.evaluation.context import Context
from titans_train.evaluation.perplexity import evaluate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="prepared folder (default: the run's own)")
    parser.add_argument("--split", default="validation", choices=["train", "validation"])
    parser.add_argument("--sequences", type=int, help="how many (default: all of the split)")


def run(context: Context, options: argparse.Namespace) -> dict[str, Any]:
    from titans_train.data import open_dataset
    from titans_train.inference.source import check_tokenizer

    if options.sequences is not None and options.sequences < 1:
        raise UserError(f"--sequences is {options.sequences}; it is at least 1")
    config = context.config
    if options.data:
        changed = config.model_dump(mode="json")
        changed["data"] |= {"source": "shards", "path": options.data, "recall": None, "needles": None}
        changed["data"] |= {"sources": None, "weights_from": None}
        config = RunConfig.model_validate(changed)
    dataset = open_dataset(config, options.split, context.model.shape.document_alignment, carried=False)
    check_tokenizer(context.source, config)
    figures = evaluate(context.scorer, dataset, options.sequences)
    where = f"{context.source.checkpoint} (step {context.about['step']})"
    context.say(f"{where}, {figures['sequences']} sequences of the {options.split} split:")
    for name, value in figures.items():
        if name != "by_position":
            context.say(f"  {name:16} {value:,.4f}" if isinstance(value, float) else f"  {name:16} {value:,}")
    context.say("  by position in the context:")
    for row in figures["by_position"]:
        place = f"{row['first']:>8,} to {row['last']:>8,}"
        context.say(f"    {place}  loss {row['loss']:.4f}  accuracy {row['accuracy']:.4f}")
    return figures


def draw(figures: dict[str, Any], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = figures["by_position"]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([(r["first"] + r["last"]) / 2 + 1 for r in rows], [r["loss"] for r in rows], marker="o")
    axes.set(xscale="log", xlabel="tokens read before (log)", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
