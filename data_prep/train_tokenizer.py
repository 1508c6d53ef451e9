"""python -m data_prep.train_tokenizer: a byte-level BPE tokenizer.json from a corpus.

The same corpus and settings give the same file, byte for byte.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_prep.errors import PrepareError
from data_prep.readers import ReadSettings, Rejected, read_unit
from data_prep.sizes import parse_size
from data_prep.sources import Unit, default_corpus, find_files, make_units
from data_prep.storage import write_bytes

END_TOKEN = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # 256 bytes and the end token
_SAY_SECONDS = 5.0


class Texts:
    """An iterator over a corpus's texts: those that together have at most `max_bytes` bytes of UTF-8."""

    def __init__(
        self, units: Sequence[Unit], settings: ReadSettings, max_bytes: int | None, say: Callable[[str], None]
    ) -> None:
        self.documents = self.bytes = 0
        self.rejected: Counter[str] = Counter()
        self._units, self._settings, self._max_bytes, self._say = units, settings, max_bytes, say

    def __iter__(self) -> Iterator[str]:
        said = time.monotonic()
        for unit in self._units:
            for record in read_unit(unit, self._settings):
                if isinstance(record, Rejected):
                    self.rejected[record.reason] += 1
                    continue
                size = len(record.text.encode("utf-8"))
                if self._max_bytes is not None and self.bytes + size > self._max_bytes:
                    return
                self.documents, self.bytes = self.documents + 1, self.bytes + size
                yield record.text
                if time.monotonic() - said > _SAY_SECONDS:
                    said = time.monotonic()
                    self._say(f"read {self.summary()}, unit {unit.number + 1} of {len(self._units)}")

    def summary(self) -> str:
        return f"{self.documents:,} documents, {self.bytes / 1e6:,.1f} MB of text"


def train(texts: Texts, vocabulary: int) -> tokenizers.Tokenizer:
    """A byte-level BPE with at most `vocabulary` tokens, <|endoftext|> the first of them.

    PrepareError: the vocabulary is too small, or there is no text.
    """
    if vocabulary < SMALLEST_VOCABULARY:
        raise PrepareError(f"--vocabulary {vocabulary}: must be at least {SMALLEST_VOCABULARY}: all bytes and the end")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if not texts.documents:
        raise PrepareError(f"no text to learn from (rejected: {dict(texts.rejected)}); check --input and --text-field")
    return tokenizer


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m data_prep.train_tokenizer", description=__doc__)
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="files, folders, patterns, @LIST; local or s3://")
    source.add_argument("--default-corpus", action="store_true", help="the running Python's standard library")
    result.add_argument("--output", required=True, metavar="FILE.json")
    result.add_argument("--vocabulary", type=int, default=32000, metavar="TOKENS", help="at most; default: 32000")
    result.add_argument("--max-bytes", type=parse_size, metavar="SIZE", help="learn from this much text, as 2gb")
    result.add_argument("--text-field", default="text", metavar="NAME", help="JSONL and Parquet field; default: text")
    result.add_argument("--document-separator", metavar="TEXT", help="cuts text files into documents")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: written. 2: refused, the reason on stderr."""
    options = parser().parse_args(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        output = Path(options.output).expanduser()
        if "://" in options.output:
            raise PrepareError(f"--output {options.output}: must be a local file")
        if output.exists():
            raise PrepareError(f"--output {output} exists; remove it or name another file")
        settings = ReadSettings(text_field=options.text_field, separator=options.document_separator)
        files, _, _ = default_corpus() if options.default_corpus else find_files(options.input)
        texts = Texts(make_units(files, separator=options.document_separator), settings, options.max_bytes, say)
        tokenizer = train(texts, options.vocabulary)
        write_bytes(str(output), tokenizer.to_str(pretty=True).encode("utf-8"))
    except PrepareError as error:
        say(f"train_tokenizer: {error}")
        return 2
    print(f"wrote {output}: {tokenizer.get_vocab_size():,} tokens from {texts.summary()}")
    for reason, count in sorted(texts.rejected.items()):
        print(f"  rejected: {count:,} x {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
