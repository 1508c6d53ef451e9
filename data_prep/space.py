"""Room on the disks: what preparing needs at most, and whether it is there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from data_prep.errors import PrepareError
from data_prep.settings import COMPRESSION, token_dtype
from data_prep.sources import SourceFile
from data_prep.tokenizer import ByteTokenizer, Tokenizer

_SPARE_BYTES = 16 << 20  # kept free on the disk besides what is written
_ZSTD_SHARE = 0.6  # compressed bytes / token bytes, from above: measured 0.15 to 0.45 on text and code
_RAW_SHARE = 1.05  # with names and places of the documents
_EXPANSION = 4  # text bytes / bytes of a compressed file
_BYTES_PER_TOKEN = 2  # of any tokenizer but bytes, from below for the languages it was trained on


def text_bytes(files: list[SourceFile], limit: int | None) -> int:
    """Bytes of text to expect from files: an estimate where they are compressed."""
    total = sum(file.bytes * (_EXPANSION if _is_compressed(file) else 1) for file in files)
    return total if limit is None else min(total, limit)


def _is_compressed(file: SourceFile) -> bool:
    return file.compression is not None or file.kind == "parquet"


def token_bytes(text_bytes: int, tokenizer: Tokenizer) -> int:
    """Bytes of the tokens of a text: what the intermediates need."""
    tokens = text_bytes if tokenizer.kind == ByteTokenizer.kind else text_bytes // _BYTES_PER_TOKEN
    return tokens * token_dtype(tokenizer).itemsize


def shard_bytes(token_bytes: int, compression: str) -> int:
    """Bytes of the shards of that many bytes of tokens, from above."""
    return int(token_bytes * (_ZSTD_SHARE if COMPRESSION[compression] else _RAW_SHARE))


def check_free_space(needs: list[tuple[Path, int]]) -> None:
    """`needs`: folder, bytes. PrepareError when a disk has less (and some spare) free than its folders need."""
    disks: dict[int, list[tuple[Path, int]]] = {}
    for folder, needed in needs:
        disks.setdefault(os.stat(folder).st_dev, []).append((folder, needed))
    for folders in disks.values():
        folder, needed = folders[0][0], sum(needed for _, needed in folders) + _SPARE_BYTES
        if (free := shutil.disk_usage(folder).free) < needed:
            raise PrepareError(
                f"the disk of {folder} has {free / 1e6:,.0f} MB free, preparing may need {needed / 1e6:,.0f} MB; free "
                "space, or name an --output or --work folder on another disk"
            )


def used_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
