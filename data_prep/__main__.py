"""python -m data_prep: text to token shards, from the command line. A run that was stopped goes on when repeated."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import data_prep.early_stop
from data_prep.errors import PrepareError
from data_prep.job import Job
from data_prep.manifest import SPLITS, Manifest
from data_prep.prepare import prepare
from data_prep.readers import ReadSettings
from data_prep.settings import COMPRESSION, Settings
from data_prep.sizes import parse_size
from data_prep.sources import SUFFIXES, default_corpus, find_files
from data_prep.tokenizer import load_tokenizer
from data_prep.work import find_place

_BAD_SHARE = 0.01
_DEFAULT_CORPUS_BAD_SHARE = 0.05  # the standard library carries test data in other encodings


def parser() -> argparse.ArgumentParser:
    settings, read = Settings(), ReadSettings()
    result = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help=f"files, folders, glob patterns, s3://BUCKET/KEY or @LIST of them; {' '.join(SUFFIXES)}",
    )
    source.add_argument("--default-corpus", action="store_true", help="the running Python's standard library")
    result.add_argument("--output", required=True, metavar="FOLDER|s3://BUCKET/KEY")

    reading = result.add_argument_group("reading")
    reading.add_argument(
        "--text-field",
        default=read.text_field,
        metavar="NAME",
        help="JSON Lines and Parquet field of the text, may be dotted; default: text",
    )
    reading.add_argument("--source-field", metavar="NAME", help="field of the data source; each gets its own shards")
    reading.add_argument("--document-separator", metavar="TEXT", help="cuts text files; default: a file is a document")
    reading.add_argument(
        "--max-document-size",
        type=parse_size,
        default=read.max_document_bytes,
        metavar="SIZE",
        help="a longer document is rejected; default: 16mb",
    )
    reading.add_argument(
        "--max-bad-share", type=float, metavar="SHARE", help=f"more rejected records end the run; default: {_BAD_SHARE}"
    )
    reading.add_argument("--skip-damaged-files", action="store_true", help="keep what can be read of damaged files")
    reading.add_argument("--max-bytes", type=parse_size, metavar="SIZE", help="stop after this much text")
    reading.add_argument("--keep-duplicates", action="store_true", help="exact copies of a document stay")

    writing = result.add_argument_group("tokens and shards")
    writing.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="bytes|FILE",
        help="tokenizer.json of Hugging Face or a SentencePiece .model; default: bytes",
    )
    writing.add_argument("--end-token", metavar="TEXT", help="the tokenizer file's end-of-document token, if unusual")
    writing.add_argument(
        "--validation-share",
        type=float,
        default=settings.validation_share,
        metavar="SHARE",
        help=f"default: {settings.validation_share}",
    )
    writing.add_argument("--seed", type=int, default=settings.seed, help="of the split by document hash; default: 0")
    writing.add_argument(
        "--shard-size", type=parse_size, default=settings.shard_size, metavar="SIZE", help="decompressed; default: 16mb"
    )
    writing.add_argument("--compression", choices=sorted(COMPRESSION), default=settings.compression)

    running = result.add_argument_group("running")
    running.add_argument(
        "--workers", type=int, metavar="N", help="processes; default: one per CPU, fewer for little input"
    )
    running.add_argument(
        "--work", metavar="FOLDER", help="for unfinished work; default: .NAME.partial beside the output, here for s3://"
    )
    running.add_argument("--restart", action="store_true", help="throw unfinished work away")
    running.add_argument("--quiet", action="store_true", help="no progress, no notes")
    return result  # fmt: skip


def summary(manifest: Manifest, output: str) -> str:
    """What lies in the output, for people."""
    lines = [f"prepared {output}: {manifest.tokenizer.kind} tokenizer, vocabulary {manifest.tokenizer.vocabulary}"]
    for name in SPLITS:
        for source, split in manifest.splits[name].items():
            stored = sum(shard.stored.bytes for shard in split.shards)
            lines.append(
                f"  {name}/{source}: {split.documents:,} documents, {split.tokens:,} tokens, "
                f"{split.text_bytes / 1e6:.1f} MB of text in {len(split.shards)} shards of {stored / 1e6:.1f} MB"
            )
    report = manifest.report
    if report.get("without_source"):
        field = manifest.settings["source_field"]
        lines.append(f"  {report['without_source']:,} documents name no source in field {field}")
    if report["duplicates"]:
        kept = "kept" if manifest.settings["keep_duplicates"] else "left out"
        lines.append(f"  {kept}: {report['duplicates']:,} exact duplicates")
    lines += [f"  left out: {count:,} x {reason}" for reason, count in sorted(report["left_out"].items())]
    for reason, entry in report["rejected"].items():
        lines.append(f"  rejected: {entry['records']:,} x {reason}, first {entry['first']} ({entry['detail']})")
    return "\n".join(lines)


def make_job(options: argparse.Namespace) -> Job:
    """Looks at the input and loads the tokenizer. PrepareError where that or a setting cannot be."""
    limit = _DEFAULT_CORPUS_BAD_SHARE if options.default_corpus else _BAD_SHARE
    settings = Settings(
        options.validation_share, options.seed, options.shard_size, options.compression, options.max_bytes,
        options.keep_duplicates,
    )  # fmt: skip
    settings.check()
    read = ReadSettings(options.text_field, options.source_field, options.document_separator, options.max_document_size)
    tokenizer = load_tokenizer(options.tokenizer, options.end_token)
    place = find_place(options.output, options.work)
    own = (place.output, str(place.work))
    found = default_corpus() if options.default_corpus else find_files(options.input, without=own)
    return Job(
        *found, tokenizer, options.output, read, settings, options.work, options.restart, options.workers,
        limit if options.max_bad_share is None else options.max_bad_share, options.quiet,
        options.skip_damaged_files,
    )  # fmt: skip


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM stops the run as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: its owner hears signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: prepared, now or before. 2: refused, the reason on stderr. 130, 143: stopped by a signal."""
    options = parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers says how much of the machine is used

    def say(text: str) -> None:
        if not options.quiet:
            print(text, flush=True)

    try:
        with _terminable():
            print(summary(prepare(make_job(options), say), options.output))
    except PrepareError as error:
        print(f"data_prep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        work = find_place(options.output, options.work).work
        remedy = "run the same command again to go on"
        print(f"data_prep: stopped; what is done is kept in {work}: {remedy}", file=sys.stderr)
        return 128 + int(stop.args[0] if stop.args else signal.SIGINT)
    return 0


if __name__ == "__main__":
    data_prep.early_stop.end()
    sys.exit(main())
