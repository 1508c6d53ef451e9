"""The verb `evaluate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from titans_train.errors import UserError
from titans_train.evaluation.perplexity import evaluate


def main(args: Sequence[str]) -> int:
    from titans_train.config import RunConfig
    from titans_train.data import open_dataset
    from titans_train.inference.source import check_tokenizer, find, load_checked

    parser = argparse.ArgumentParser(prog="python -m titans_train evaluate", description=__doc__)
    parser.add_argument("source", metavar="CONFIG.yaml|RUN|CHECKPOINT|EXPORT")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--checkpoint", help="a checkpoint of the run, as step-00000100 (default: the newest)")
    parser.add_argument("--data", help="prepared folder (default: the run's own)")
    parser.add_argument("--split", default="validation", choices=["train", "validation"])
    parser.add_argument("--sequences", type=int, help="how many (default: all of the split)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_intermixed_args(list(args))
    if options.sequences is not None and options.sequences < 1:
        raise UserError(f"--sequences is {options.sequences}; it is at least 1")
    if options.json and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: there is no folder {options.json.parent}; create it")
    source = find(options.source, options.overrides, options.checkpoint)
    config = source.config
    if options.data:
        changed = config.model_dump(mode="json")
        changed["data"] |= {"source": "shards", "path": options.data, "recall": None}
        changed["data"] |= {"sources": None, "weights_from": None}
        config = RunConfig.model_validate(changed)
    model, state = load_checked(source)
    dataset = open_dataset(config, options.split, model.shape.document_alignment, carried=False)
    check_tokenizer(source, config)
    figures = evaluate(model, dataset, options.sequences, config.training.micro_batch_size)
    print(f"{source.checkpoint} (step {state['step']}), {figures['sequences']} sequences of the {options.split} split:")
    for name, value in figures.items():
        print(f"  {name:14} {value:,.4f}" if isinstance(value, float) else f"  {name:14} {value:,}")
    if options.json:
        options.json.write_text(json.dumps({"checkpoint": str(source.checkpoint), **figures}, indent=1) + "\n")
    return 0
