"""python -m data_prep: text to token shards, from the command line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import PrepareError
from data_prep.manifest import SPLITS, Manifest
from data_prep.sources import Corpus, default_corpus, find_files
from data_prep.tokenizer import load_tokenizer
from data_prep.write import COMPRESSION, Settings, prepare

_UNITS = {"": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes of "65536", "512kb", "16mb" or "1gb" (units of 1024)."""
    match = re.fullmatch(r"(\d+)\s*(|kb|mb|gb)", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write bytes or a number with kb, mb or gb, as 16mb")
    return int(match[1]) * _UNITS[match[2]]


def parser() -> argparse.ArgumentParser:
    defaults = Settings()
    result = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="folders or .txt .md .py .jsonl .parquet files")
    source.add_argument("--default-corpus", action="store_true", help="the running Python's standard library")
    result.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    result.add_argument("--tokenizer", default="bytes", metavar="bytes|FILE.json", help="default: bytes")
    result.add_argument("--end-token", metavar="TEXT", help="the tokenizer file's end-of-document token, if unusual")
    result.add_argument("--text-field", default="text", metavar="NAME", help="JSONL and Parquet field; default: text")
    result.add_argument("--validation-share", type=float, default=defaults.validation_share, metavar="SHARE")
    result.add_argument("--seed", type=int, default=defaults.seed, help="of the split by document hash")
    result.add_argument(
        "--shard-size", type=parse_size, default=defaults.shard_size, help="decompressed; default: 16mb"
    )
    result.add_argument("--compression", choices=sorted(COMPRESSION), default=defaults.compression)
    result.add_argument("--max-bytes", type=parse_size, metavar="SIZE", help="stop after this much text")
    return result


def summary(manifest: Manifest, corpus: Corpus, output: Path) -> str:
    """What lies in the folder, for people."""
    lines = [f"prepared {output}: {manifest.tokenizer.kind} tokenizer, vocabulary {manifest.tokenizer.vocabulary}"]
    for name in SPLITS:
        for source, split in manifest.splits[name].items():
            stored = sum(shard.stored.bytes for shard in split.shards)
            lines.append(
                f"  {name}/{source}: {split.documents:,} documents, {split.tokens:,} tokens, {split.text_bytes / 1e6:.1f} MB of text"
                f" in {len(split.shards)} shards of {stored / 1e6:.1f} MB together"
            )
    lines += [f"  left out: {count:,} x {reason}" for reason, count in sorted(corpus.skipped.items())]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: prepared, now or before. 2: refused, the reason on stderr."""
    options = parser().parse_args(arguments)
    settings = Settings(options.validation_share, options.seed, options.shard_size, options.compression)
    try:
        settings.check()
        tokenizer = load_tokenizer(options.tokenizer, options.end_token)
        if options.default_corpus:
            corpus = default_corpus(options.max_bytes)
        else:
            corpus = find_files(options.input, options.text_field)
            corpus.max_bytes = options.max_bytes
        print(summary(prepare(corpus, tokenizer, settings, options.output), corpus, options.output))
    except PrepareError as error:
        print(f"data_prep: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
