"""The verb `generate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from titans_train.errors import UserError
from titans_train.inference.sampling import Reading, Sampler, generate, read
from titans_train.inference.source import find, tokenizer_of


def _arguments(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m titans_train generate", description="Text from a checkpoint.")
    parser.add_argument("source", metavar="CONFIG.yaml|RUN|CHECKPOINT")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", help="text to continue")
    text.add_argument("--prompt-file", type=Path, help="file with the text to continue")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-state", type=Path, help="the state after everything read and generated")
    parser.add_argument("--load-state", type=Path, help="go on from a saved state")
    options = parser.parse_intermixed_args(list(args))
    if options.temperature < 0 or not 0 < options.top_p <= 1 or options.tokens < 0:
        parser.error("temperature is at least 0, top-p above 0 and at most 1, tokens at least 0")
    return options


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt_file is None:
        return options.prompt or ""
    try:
        return str(options.prompt_file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{options.prompt_file} cannot be read as UTF-8 text: {error}") from error


def main(args: Sequence[str]) -> int:
    from titans_train.models.state import ModelState, load_tensor
    from titans_train.training.checkpoint import load_model

    options = _arguments(args)
    prompt = _prompt(options)
    if not prompt and options.load_state is None:
        raise UserError("there is nothing to continue: give --prompt, --prompt-file or --load-state")
    source = find(options.source, options.overrides)
    tokenizer = tokenizer_of(source.config)
    model, _ = load_model(source.checkpoint)
    reading, state = None, None
    if options.load_state is not None:
        try:
            state = ModelState.load(options.load_state, model.shape)
            reading = Reading(state, load_tensor(options.load_state, "next_logits"))
        except (ValueError, OSError) as error:
            raise UserError(str(error)) from error
    if prompt:
        reading = read(model, [int(i) for i in tokenizer.encode([prompt])[0]], state)
    assert reading is not None
    out = []
    sampler = Sampler(options.temperature, options.top_p, tokenizer.vocabulary)
    for token, after in generate(model, reading, options.tokens, sampler, options.seed):
        out.append(token)
        reading = after
    sys.stdout.write(prompt + tokenizer.decode(out) + "\n")
    if options.save_state is not None:
        reading.state.save(options.save_state, model.shape, next_logits=reading.logits)
        print(f"state saved to {options.save_state}", file=sys.stderr)
    return 0
