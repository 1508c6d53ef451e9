"""What `generate` is asked on the command line, checked before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from titans_train.errors import UserError
from titans_train.inference.sampler import Sampler

SEEDS = range(1 << 63)
_ABOUT = """\
Continues text with a checkpoint's model. Everything is read with the carried state of the memory: documents of any
length, at constant memory (a transformer with full attention keeps every key).

What is read, in this order: the state of --load-state, standard input (--stdin), the prompt. Then one text is
continued, or several side by side: --samples of it, or one for each line of --prompts-file or --ask.
"""
_EXAMPLES = """\
examples:
  generate runs/mine --prompt "Once" --temperature 0.7 --min-p 0.05 --repetition-penalty 1.2 --stream
  generate runs/mine --prompts-file prompts.jsonl --samples 4 --jsonl > texts.jsonl
  cat book.txt | generate runs/mine --stdin --prompt "The moral of this story:" --stop "." --tokens 100
  cat book.txt | generate runs/mine --stdin --tokens 0 --save-state book.safetensors     # read once ...
  generate runs/mine --load-state book.safetensors --ask questions.txt --temperature 0   # ... ask many
"""


def arguments(args: Sequence[str]) -> argparse.Namespace:
    """`sampler` is made of the sampling options. UserError, or argparse's leaving, for what cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m titans_train generate", description=_ABOUT, epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("source", metavar="CONFIG.yaml|RUN|CHECKPOINT|EXPORT")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--checkpoint", help="a checkpoint of the run, as step-00000100 (default: the newest)")
    _add_reading(parser)
    _add_several(parser)
    _add_sampling(parser)
    _add_output(parser)
    options = parser.parse_intermixed_args(list(args))
    try:
        options.sampler = Sampler(
            options.temperature, options.top_p, None, options.top_k, options.min_p, options.repetition_penalty
        )
        _check(options)
    except UserError as error:
        parser.error(str(error))
    return options


def _add_reading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reading")
    text = group.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT", help="text to continue")
    text.add_argument("--prompt-file", type=Path, metavar="FILE", help="file with the text to continue")
    text.add_argument(
        "--prompts-file", type=Path, metavar="FILE",
        help='JSON Lines, each a string or {"prompt": ...}: texts to continue, each by itself',
    )  # fmt: skip
    group.add_argument("--stdin", action="store_true", help="read standard input to its end first, as it arrives")
    group.add_argument("--load-state", type=Path, metavar="FILE", help="go on from a saved state")
    group.add_argument(
        "--save-state", type=Path, metavar="FILE",
        help="keep the state after everything read and generated, a stop text too (--tokens 0: read only)",
    )  # fmt: skip


def _add_several(parser: argparse.ArgumentParser) -> None:
    about = "each as it would be alone with the same --seed, but for rounding"
    group = parser.add_argument_group("several texts", about)
    group.add_argument(
        "--ask", type=Path, metavar="FILE",
        help="one question a line: each goes on from what was read before, and none sees another",
    )  # fmt: skip
    group.add_argument("--samples", type=int, default=1, metavar="N", help="texts for each prompt, of seeds --seed on")
    group.add_argument("--batch", type=int, default=16, metavar="N", help="texts side by side, at most (default: 16)")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    length = parser.add_argument_group("length")
    length.add_argument("--tokens", type=int, default=200, metavar="N", help="to generate, at most (default: 200)")
    length.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    length.add_argument("--stop-at-end", action="store_true", help="end at the end of a document")
    group = parser.add_argument_group("sampling", "options apply in this order")
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X",
        help="makes tokens of the prompt and the text so far less likely (default: 1, none; 1.2 is usual)",
    )  # fmt: skip
    group.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="default: 0.8; 0: always the likeliest token"
    )
    group.add_argument("--top-k", type=int, metavar="N", help="only the N likeliest tokens")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest tokens that reach P")
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="only tokens at least P times as likely as the likeliest"
    )
    group.add_argument("--seed", type=int, metavar="N", help="default: 0, or where the loaded state left off")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--stream", action="store_true",
        help="print each character as soon as it is made (with --stdin always, where it is one text)",
    )  # fmt: skip
    group.add_argument(
        "--jsonl", action="store_true",
        help='one JSON object a text: line, sample, prompt, text (what was generated), tokens, and finish: "length", '
        '"stop" or "end"',
    )  # fmt: skip


def _check(options: argparse.Namespace) -> None:
    if options.tokens < 0:
        raise UserError(f"--tokens is {options.tokens}; it is at least 0")
    for name in ("samples", "batch"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; it is at least 1")
    if options.seed is not None and options.seed not in SEEDS:
        raise UserError(f"--seed is {options.seed}; it is from 0 to {SEEDS[-1]}")
    if "" in options.stop:
        raise UserError("--stop is empty; it is a text of at least one character")
    if options.ask and options.prompts_file:
        raise UserError("--ask and --prompts-file are both lists of texts to continue; give one of them")
    options.several = bool(options.ask or options.prompts_file or options.samples > 1)
    if options.several and options.save_state:
        raise UserError(
            "--save-state keeps the state of one text, not of several; read first with --tokens 0 and --save-state, "
            "then go on with --load-state"
        )
    if options.stream and (options.several or options.jsonl):
        raise UserError("--stream prints one text as it is made; leave out --samples, --prompts-file, --ask, --jsonl")
    options.stream = options.stream or (options.stdin and not options.several and not options.jsonl)
