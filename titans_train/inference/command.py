"""The verb `generate`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from titans_train.errors import UserError
from titans_train.host import flush_denormals
from titans_train.inference.arguments import arguments
from titans_train.inference.batch import generate_rows
from titans_train.inference.incoming import read_stream
from titans_train.inference.prompts import Prompt, read_prompts, read_questions
from titans_train.inference.sampler import Sampler
from titans_train.inference.sampling import Reading, generate, read, read_rows
from titans_train.inference.source import encode, find, load_checked, tokenizer_of
from titans_train.inference.state_file import check_place, load_reading, save_reading
from titans_train.inference.text import TextStream
from titans_train.models.stored import fingerprint


@dataclass(frozen=True)
class Speaker:
    """The model, and how it is to go on."""

    model: Any
    tokenizer: Any
    sampler: Sampler
    count: int  # tokens of a text, at most
    stops: Sequence[str]
    at_end: bool

    def stream(self, before: Sequence[int]) -> TextStream:
        return TextStream(self.tokenizer, before, self.stops, self.at_end)


def main(args: Sequence[str]) -> int:
    options = arguments(args)
    prompt, lines = _prompt(options), _lines(options)
    anything = prompt or options.prompts_file or options.load_state or options.stdin
    if not anything:
        raise UserError("there is nothing to continue: give --prompt, --prompt-file, --stdin or --load-state")
    if options.save_state is not None:
        check_place(options.save_state)
    source = find(options.source, options.overrides, options.checkpoint)
    tokenizer = tokenizer_of(source)
    model, _ = load_checked(source)
    sampler = replace(options.sampler, vocabulary=tokenizer.vocabulary)
    speaker = Speaker(model, tokenizer, sampler, options.tokens, options.stop, options.stop_at_end)
    weights = fingerprint(model) if options.load_state or options.save_state else None
    flush_denormals()
    random = torch.Generator().manual_seed(0)
    reading = load_reading(options.load_state, model, random, weights) if options.load_state else None
    if options.seed is not None:
        random.manual_seed(options.seed)
    if options.stdin:
        reading, count = read_stream(model, tokenizer, sys.stdin.buffer, reading)
        print(f"read {count:,} tokens", file=sys.stderr)
    if options.several:
        _several(speaker, lines, prompt, reading, random, options)
        return 0
    reading = _one(speaker, prompt, reading, random, options)
    if options.save_state is not None:
        save_reading(options.save_state, reading, model, random, weights)
        print(f"state saved to {options.save_state}", file=sys.stderr)
    return 0


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt_file is None:
        return options.prompt or ""
    try:
        return str(options.prompt_file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{options.prompt_file} cannot be read as UTF-8 text: {error}") from error


def _lines(options: argparse.Namespace) -> list[Prompt]:
    """The texts of --prompts-file or --ask."""
    if options.ask:
        return read_questions(options.ask)
    if not options.prompts_file:
        return []
    prompts = read_prompts(options.prompts_file)
    empty = next((p.line for p in prompts if not p.text), None)
    if empty is not None and not options.load_state and not options.stdin:
        raise UserError(f"{options.prompts_file} line {empty}: the prompt is empty, and there is nothing else to go on")
    return prompts


def _one(
    speaker: Speaker, prompt: str, reading: Reading | None, random: torch.Generator, options: argparse.Namespace
) -> Reading:
    """One text; what is printed before it has ended is not if an error comes first, unless it is streamed."""
    ids = encode(speaker.tokenizer, prompt) if prompt else []
    reading = read(speaker.model, ids, reading) if ids else reading
    if reading is None:
        raise UserError(f"the prompt {prompt[:20]!r} has no tokens in this tokenizer; give a longer one")
    text = speaker.stream(ids)
    made: list[str] = []
    say: Callable[[str], object] = _say_at_once if options.stream else made.append
    say("" if options.jsonl else prompt)
    for token, after in generate(speaker.model, reading, speaker.count, speaker.sampler, random):
        reading = after
        say(text.add(token))
        if text.finish:
            break
    say(text.close())
    if options.jsonl:
        _say_json(Prompt(0, prompt), 0, "".join(made), text)
    else:
        sys.stdout.write("".join(made) + "\n")
    return reading


def _say_at_once(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def _say_json(prompt: Prompt, sample: int, made: str, text: TextStream) -> None:
    about = {"line": prompt.line, "sample": sample, "prompt": prompt.text, "text": made, "tokens": text.count}
    sys.stdout.write(json.dumps({**about, "finish": text.finish or "length"}, ensure_ascii=False) + "\n")


def _several(
    speaker: Speaker, lines: list[Prompt], prompt: str, reading: Reading | None, random: torch.Generator,
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """All samples of all lines, or of the prompt alone; printed in their order, each batch when it has ended."""
    if lines and prompt:  # a document, and questions about it
        reading, prompt = read(speaker.model, encode(speaker.tokenizer, prompt), reading), ""
    prompts = lines or [Prompt(0, prompt)]
    whole = len(prompts) * options.samples
    for number, (which, sample, made, text) in enumerate(_texts(speaker, prompts, reading, random, options), 1):
        if options.jsonl:
            _say_json(which, sample, made, text)
        else:
            name = f"line {which.line}, sample {sample}" if which.line else f"sample {sample}"
            sys.stdout.write(f"--- {number} of {whole}: {name} ---\n{which.text}{made}\n")
        sys.stdout.flush()


def _texts(
    speaker: Speaker, prompts: list[Prompt], before: Reading | None, random: torch.Generator,
    options: argparse.Namespace,
) -> Iterator[tuple[Prompt, int, str, TextStream]]:  # fmt: skip
    """(prompt, sample, text made, its stream) of each, `options.batch` side by side."""
    every = [(number, sample) for number in range(len(prompts)) for sample in range(options.samples)]
    for first in range(0, len(every), options.batch):
        batch = every[first : first + options.batch]
        numbers = list(dict.fromkeys(number for number, _ in batch))
        ids = {number: encode(speaker.tokenizer, prompts[number].text) for number in numbers}
        readings = _readings(speaker.model, ids, prompts, before)
        streams = [speaker.stream(ids[number]) for number, _ in batch]
        made: list[list[str]] = [[] for _ in batch]

        def take(row: int, token: int, made: list[list[str]] = made, streams: list[TextStream] = streams) -> bool:
            made[row].append(streams[row].add(token))
            return streams[row].finish is None

        generators = [_generator(random, sample) for _, sample in batch]
        rows = [readings[number] for number, _ in batch]
        generate_rows(speaker.model, rows, speaker.count, speaker.sampler, generators, take)
        for (number, sample), pieces, stream in zip(batch, made, streams, strict=True):
            yield prompts[number], sample, "".join(pieces) + stream.close(), stream


def _readings(
    model: Any, ids: dict[int, list[int]], prompts: list[Prompt], before: Reading | None
) -> dict[int, Reading]:
    """Of each prompt, after `before`."""
    some = [number for number, tokens in ids.items() if tokens]
    if before is None and len(some) < len(ids):
        line = next(prompts[number].line for number, tokens in ids.items() if not tokens)
        raise UserError(f"the prompt of line {line} has no tokens in this tokenizer; give a longer one")
    found = dict(zip(some, read_rows(model, [ids[number] for number in some], before), strict=True))
    return {number: found[number] if number in found else _given(before) for number in ids}


def _given(reading: Reading | None) -> Reading:
    assert reading is not None
    return reading


def _generator(random: torch.Generator, sample: int) -> torch.Generator:
    """Sample 0 goes on with `random`'s numbers, sample n with those of a seed n higher: for every prompt alike."""
    own = torch.Generator()
    if sample:
        return own.manual_seed((random.initial_seed() + sample) % (1 << 63))
    own.set_state(random.get_state())
    return own
