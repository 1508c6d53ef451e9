"""What every entry of a manifest must be before a path is made of it or memory set aside for it.

A manifest may come from anywhere, and its hash of itself proves no good will: names must stay inside their folder, and
what is declared of a shard must fit into the bytes that are declared for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.manifest import FileEntry, Manifest, ShardEntry, SplitEntry, TokenizerEntry

TOKENIZER_FILES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}  # kind -> its file's name
ITEMSIZES = {"uint16": 2, "uint32": 4}  # dtype -> bytes of a token
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FOLDER = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,64}")
_XXH64, _SHA256 = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{64}")
_LARGEST_FILE = 1 << 50
_LARGEST_SHARD = 1 << 32  # MDS offsets are uint32
_LARGEST_VOCABULARY = 1 << 31
_SAMPLE_BYTES = 12  # of an MDS file for each sample: its offset and the sizes of its two columns
_HEAD_BYTES = 8  # and for all: their number, the last offset
_LENGTHS_HEAD = 128  # of an .npy file of one short shape


def problems(manifest: Manifest) -> Iterator[str]:
    """All that makes a manifest unusable, each with its place."""
    if not isinstance(manifest.dtype, str) or manifest.dtype not in ITEMSIZES:
        yield f"dtype {shown(manifest.dtype)} is neither uint16 nor uint32"
        return
    if not isinstance(manifest.tool, str) or not manifest.tool.isprintable() or len(manifest.tool) > 100:
        yield f"tool is {shown(manifest.tool)}, expected a text"
    for name in ("settings", "report"):
        if not isinstance(getattr(manifest, name), dict):
            yield f"{name} is {shown(getattr(manifest, name))}, expected an object"
    yield from tokenizer_problems(manifest.tokenizer)
    for file in manifest.others:
        yield from _file(file, "others")
    for split, sources in manifest.splits.items():
        for source, entry in sources.items():
            if _FOLDER.fullmatch(source):
                yield from _split(entry, f"{split}/{source}", ITEMSIZES[manifest.dtype])
            else:
                yield f"{split}: {shown(source)} is no name of a source (letters, digits, '.', '_' and '-')"


def tokenizer_problems(entry: TokenizerEntry) -> Iterator[str]:
    yield from _text(entry.kind, "tokenizer/kind", re.compile(r"[a-z0-9]{1,32}"), "a word")
    yield from _text(entry.sha256, "tokenizer/sha256", _SHA256, "64 hexadecimal digits")
    yield from _number(entry.vocabulary, "tokenizer/vocabulary", _LARGEST_VOCABULARY, least=1)
    yield from _number(entry.end_of_document, "tokenizer/end_of_document", _LARGEST_VOCABULARY)
    if entry.file is not None:
        yield from _file(entry.file, "tokenizer/file")
    expected, found = TOKENIZER_FILES.get(str(entry.kind)), entry.file and entry.file.name
    if expected is not None and found != expected:
        yield f"tokenizer/file is {shown(found)}, expected {expected}"


def _split(entry: SplitEntry, where: str, itemsize: int) -> Iterator[str]:
    found = [
        *_number(entry.documents, f"{where}/documents", _LARGEST_FILE),
        *_number(entry.tokens, f"{where}/tokens", _LARGEST_FILE),
        *_number(entry.text_bytes, f"{where}/text_bytes", _LARGEST_FILE),
        *_file(entry.index, f"{where}/index"),
        *_file(entry.lengths, f"{where}/lengths"),
    ]
    for number, shard in enumerate(entry.shards):
        found += _shard(shard, f"{where}/shards/{number}", itemsize)
    yield from found or _sums(entry, where)


def _sums(entry: SplitEntry, where: str) -> Iterator[str]:
    """Of numbers that are numbers."""
    for unit in ("documents", "tokens"):
        total, stated = sum(getattr(shard, unit) for shard in entry.shards), getattr(entry, unit)
        if total != stated:
            yield f"the shards of {where} hold {total} {unit}, the manifest says {stated}"
    if entry.lengths.bytes > _LENGTHS_HEAD + 8 * entry.documents:
        yield f"{where}/lengths has {entry.lengths.bytes} bytes, {entry.documents} documents have less"
    names = [shard.raw.name for shard in entry.shards]
    names += [shard.compressed.name for shard in entry.shards if shard.compressed is not None]
    if len({*names, entry.index.name, entry.lengths.name}) != len(names) + 2:
        yield f"{where}: a file is named twice"


def _shard(shard: ShardEntry, where: str, itemsize: int) -> Iterator[str]:
    found = [
        *_number(shard.documents, f"{where}/documents", _LARGEST_SHARD, least=1),
        *_number(shard.tokens, f"{where}/tokens", _LARGEST_SHARD, least=1),
        *_file(shard.raw, f"{where}/raw", _LARGEST_SHARD),
        *(_file(shard.compressed, f"{where}/compressed", _LARGEST_SHARD) if shard.compressed is not None else ()),
    ]
    least = 0 if found else _HEAD_BYTES + _SAMPLE_BYTES * shard.documents + itemsize * shard.tokens
    if not found and shard.raw.bytes < least:
        found.append(
            f"{where}: {shard.documents} documents of {shard.tokens} tokens need {least} bytes or more, raw/bytes is "
            f"{shard.raw.bytes}"
        )
    yield from found


def _file(entry: FileEntry, where: str, limit: int = _LARGEST_FILE) -> Iterator[str]:
    yield from _text(entry.name, f"{where}/name", _NAME, "a plain file name (letters, digits, '.', '_' and '-')")
    yield from _number(entry.bytes, f"{where}/bytes", limit)
    yield from _text(entry.xxh64, f"{where}/xxh64", _XXH64, "16 hexadecimal digits")


def _number(value: Any, where: str, limit: int, least: int = 0) -> Iterator[str]:
    if type(value) is not int or not least <= value < limit:
        yield f"{where} is {shown(value)}, expected a number from {least} to below {limit}"


def _text(value: Any, where: str, form: re.Pattern[str], words: str) -> Iterator[str]:
    if not isinstance(value, str) or not form.fullmatch(value):
        yield f"{where} is {shown(value)}, expected {words}"


def shown(value: object) -> str:
    """As it may stand in a message: quoted, so that no control character reaches a terminal, and short."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
