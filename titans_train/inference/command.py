"""The verb `generate`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from titans_train.errors import UserError
from titans_train.inference.sampling import Reading, Sampler, generate, read
from titans_train.inference.source import encode, find, load_checked, tokenizer_of
from titans_train.models import LanguageModel
from titans_train.models.state import ModelState, load_tensor
from titans_train.models.stored import fingerprint
from titans_train.models.tree import tensors_of


def _arguments(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m titans_train generate", description="Text from a checkpoint.")
    parser.add_argument("source", metavar="CONFIG.yaml|RUN|CHECKPOINT|EXPORT")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--checkpoint", help="a checkpoint of the run, as step-00000100 (default: the newest)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", help="text to continue")
    text.add_argument("--prompt-file", type=Path, help="file with the text to continue")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, help="default: 0, or where the loaded state left off")
    parser.add_argument("--save-state", type=Path, help="the state after everything read and generated")
    parser.add_argument("--load-state", type=Path, help="go on from a saved state")
    options = parser.parse_intermixed_args(list(args))
    possible = 0 <= options.temperature < math.inf and 0 < options.top_p <= 1 and options.tokens >= 0
    if not possible:
        parser.error("temperature is at least 0, top-p above 0 and at most 1, tokens at least 0")
    return options


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt_file is None:
        return options.prompt or ""
    try:
        return str(options.prompt_file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{options.prompt_file} cannot be read as UTF-8 text: {error}") from error


def _load(path: Path, model: LanguageModel, weights: torch.Tensor, random: torch.Generator) -> Reading:
    """The reading of a state file; `random` goes on where it was. UserError names what does not fit."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; write one with --save-state")
    try:
        reading = Reading(ModelState.load(path, model.shape), load_tensor(path, "next_logits"))
        found, state = load_tensor(path, "weights"), load_tensor(path, "random")
        _check(reading, model)
    except (UserError, OSError) as error:
        raise UserError(f"{error}; --load-state takes a file that generate saved with the same model") from error
    if found.dtype != weights.dtype or not torch.equal(found, weights):
        raise UserError(
            f"{path} was saved by another checkpoint: same architecture, other parameters; name the one that made it"
        )
    try:
        random.set_state(state)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path} holds no state of torch's random numbers ({error}); give --seed") from error
    return reading


def _check(reading: Reading, model: LanguageModel) -> None:
    """UserError for a state of several rows or another dtype than the model's, or logits that are not this model's."""
    dtype, rows = next(model.parameters()).dtype, {tensor.shape[0] for tensor in tensors_of(reading.state)}
    dtypes = {tensor.dtype for tensor in tensors_of(reading.state)} - {torch.bool}
    if rows != {1} or dtypes != {dtype}:
        raise UserError(f"its state is {', '.join(map(str, dtypes))} of {rows} rows, expected {dtype} of one")
    logits, expected = reading.logits, (model.shape.vocabulary,)
    if logits.shape != expected or logits.dtype != dtype:
        raise UserError(f"its logits are {logits.dtype} {list(logits.shape)}, expected {dtype} {list(expected)}")


def _save(path: Path, reading: Reading, model: LanguageModel, weights: torch.Tensor, random: torch.Generator) -> None:
    """Written beside and renamed, so that an earlier file stays whole if the disk is full."""
    beside = path.with_name(f".{path.name}.partial")
    extra = {"next_logits": reading.logits, "weights": weights, "random": random.get_state()}
    try:
        reading.state.save(beside, model.shape, **extra)
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error}); free space or name another file") from error
    finally:
        beside.unlink(missing_ok=True)


def main(args: Sequence[str]) -> int:
    options = _arguments(args)
    prompt = _prompt(options)
    if not prompt and options.load_state is None:
        raise UserError("there is nothing to continue: give --prompt, --prompt-file or --load-state")
    if options.save_state is not None and not options.save_state.absolute().parent.is_dir():
        raise UserError(f"--save-state {options.save_state}: there is no folder {options.save_state.parent}; create it")
    source = find(options.source, options.overrides, options.checkpoint)
    tokenizer = tokenizer_of(source)
    model, _ = load_checked(source)
    weights = fingerprint(model) if options.load_state or options.save_state else None
    random = torch.Generator().manual_seed(0)
    reading = None
    if options.load_state is not None and weights is not None:
        reading = _load(options.load_state, model, weights, random)
    if options.seed is not None:
        random.manual_seed(options.seed)
    if prompt:
        reading = read(model, encode(tokenizer, prompt), reading.state if reading is not None else None)
    assert reading is not None
    out = []
    sampler = Sampler(options.temperature, options.top_p, tokenizer.vocabulary)
    for token, after in generate(model, reading, options.tokens, sampler, random):
        out.append(token)
        reading = after
    sys.stdout.write(prompt + tokenizer.decode(out) + "\n")
    if options.save_state is not None and weights is not None:
        _save(options.save_state, reading, model, weights, random)
        print(f"state saved to {options.save_state}", file=sys.stderr)
    return 0
