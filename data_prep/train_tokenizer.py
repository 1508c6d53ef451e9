"""python -m data_prep.train_tokenizer: a byte-level BPE tokenizer.json from a corpus.

The same corpus and settings give the same file, byte for byte.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_prep.errors import PrepareError
from data_prep.readers import ReadSettings, Rejected, UnitReader, read_unit
from data_prep.sizes import parse_size
from data_prep.sources import Unit, default_corpus, find_files, make_units
from data_prep.storage import printable, write_bytes

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
        self.first: dict[str, str] = {}  # reason -> place and detail of the first record rejected for it
        self._lines: Counter[str] = Counter()  # of each file, in the units before
        self._units, self._settings, self._max_bytes, self._say = units, settings, max_bytes, say

    def __iter__(self) -> Iterator[str]:
        said = time.monotonic()
        for unit in self._units:
            reader = read_unit(unit, self._settings)
            for record in reader:
                if isinstance(record, Rejected):
                    self._reject(unit, record)
                    continue
                size = len(record.text.encode("utf-8"))
                if self._max_bytes is not None and self.bytes + size > self._max_bytes:
                    reader.check()
                    return
                self.documents, self.bytes = self.documents + 1, self.bytes + size
                yield record.text
                if time.monotonic() - said > _SAY_SECONDS:
                    said = time.monotonic()
                    self._say(f"read {self.summary()}, unit {unit.number + 1} of {len(self._units)}")

            self._count_lines(unit, reader)

    def _reject(self, unit: Unit, record: Rejected) -> None:
        self.rejected[record.reason] += 1
        file = unit.files[record.file]
        line = "" if file.is_one_document(self._settings.separator) else f":{self._lines[file.path] + record.line}"
        self.first.setdefault(record.reason, f"{printable(file.path)}{line} ({record.detail})")

    def _count_lines(self, unit: Unit, reader: UnitReader) -> None:
        for file, lines in zip(unit.files, reader.lines, strict=True):
            self._lines[file.path] += lines

    def rejections(self) -> list[str]:
        """Per reason how many records, and the first of them."""
        return [f"{count:,} x {reason}, first {self.first[reason]}" for reason, count in sorted(self.rejected.items())]

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
        rejected = "; ".join(texts.rejections()) or "none"
        raise PrepareError(f"no text to learn from (rejected: {rejected}); check --input and --text-field")
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
    result.add_argument(
        "--max-document-size",
        type=parse_size,
        default=ReadSettings().max_document_bytes,
        metavar="SIZE",
        help="a longer document is rejected; default: 16mb",
    )
    result.add_argument("--document-separator", metavar="TEXT", help="cuts text files into documents")
    return result  # fmt: skip


def check_output(text: str) -> Path:
    """The path of a file that is not there yet and can be written; PrepareError otherwise."""
    output = Path(text).expanduser().absolute()
    if "://" in text:
        raise PrepareError(f"--output {text}: must be a local file")
    if output.exists():
        raise PrepareError(f"--output {output} exists; remove it or name another file")
    folder = next(folder for folder in output.parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise PrepareError(f"--output {output}: nothing can be written in {folder}; name another folder")
    return output


def _beside(work: Callable[[], tokenizers.Tokenizer]) -> tokenizers.Tokenizer:
    """In a thread of its own: while the library works the main thread would not hear Ctrl-C."""
    result: Future[tokenizers.Tokenizer] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # raised again by result()
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: written. 2: refused, the reason on stderr. 130: stopped by Ctrl-C."""
    options = parser().parse_args(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        output = check_output(options.output)
        settings = ReadSettings(
            text_field=options.text_field, separator=options.document_separator,
            max_document_bytes=options.max_document_size,
        )  # fmt: skip
        files, _, _ = default_corpus() if options.default_corpus else find_files(options.input)
        texts = Texts(make_units(files, separator=options.document_separator), settings, options.max_bytes, say)
        tokenizer = _beside(lambda: train(texts, options.vocabulary))
        write_bytes(str(output), tokenizer.to_str(pretty=True).encode("utf-8"))
    except PrepareError as error:
        say(f"train_tokenizer: {error}")
        return 2
    except KeyboardInterrupt:
        say("train_tokenizer: stopped, nothing is written; run the same command again")
        return 128 + signal.SIGINT
    print(f"wrote {printable(str(output))}: {tokenizer.get_vocab_size():,} tokens from {texts.summary()}")
    for line in texts.rejections():
        print(f"  rejected: {line}")
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # the library cannot be stopped: it may still be at work after Ctrl-C
