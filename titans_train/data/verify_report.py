"""What `verify-data` found: what a prepared folder holds, and all that is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_prep.manifest import SplitEntry


@dataclass(frozen=True)
class SourceRow:
    """What one source of one split holds, as the manifest says. `stored_bytes`: of its shards, as they lie there."""

    split: str
    source: str
    documents: int
    tokens: int
    text_bytes: int
    bytes_per_token: float
    shards: int
    stored_bytes: int


@dataclass(frozen=True)
class Report:
    """`problems`: everything that is wrong, each with its file. `notes`: what could not be looked at."""

    path: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    sources: tuple[SourceRow, ...]
    tokenizer: dict[str, Any]
    tool: str
    settings: dict[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {"ok": not self.problems, **asdict(self)}


def source_row(split: str, source: str, entry: SplitEntry) -> SourceRow:
    """The row of one source."""
    stored = sum(shard.stored.bytes for shard in entry.shards)
    ratio = entry.text_bytes / entry.tokens if entry.tokens else 0.0
    return SourceRow(split, source, entry.documents, entry.tokens, entry.text_bytes, ratio, len(entry.shards), stored)


def lines(report: Report) -> Iterator[str]:
    """The report in words."""
    tokenizer = report.tokenizer
    yield f"{report.path}: written by titans-train {report.tool}"
    yield (
        f"tokenizer {tokenizer['kind']}, vocabulary {tokenizer['vocabulary']:,}, end of document "
        f"{tokenizer['end_of_document']}, sha256 {tokenizer['sha256']}"
    )
    yield "settings " + json.dumps(report.settings, sort_keys=True)
    yield from _table(report.sources)
    for text in report.notes:
        yield f"note: {text}"
    for text in report.problems:
        yield f"WRONG: {text}"
    tokens, stored = (sum(getattr(row, name) for row in report.sources) for name in ("tokens", "stored_bytes"))
    rate = f"{tokens / report.seconds / 1e6:,.1f} M tokens/s, {stored / report.seconds / 1e6:,.1f} MB/s stored"
    state = f"{len(report.problems)} problems" if report.problems else "all is right"
    yield f"{state}: {tokens:,} tokens in {report.seconds:.1f} s, {rate}"


def _table(rows: Sequence[SourceRow]) -> Iterator[str]:
    head = ("source", "documents", "tokens", "text bytes", "bytes/token", "shards", "stored bytes")
    cells = [head] + [
        (
            f"{row.split}/{row.source}", f"{row.documents:,}", f"{row.tokens:,}", f"{row.text_bytes:,}",
            f"{row.bytes_per_token:.3f}", f"{row.shards:,}", f"{row.stored_bytes:,}",
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    for line in cells:
        first, *others = (text.rjust(width) for text, width in zip(line, widths, strict=True))
        yield "  ".join([first.strip().ljust(widths[0]), *others])
