"""What decides the content of a prepared folder, besides the input and the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from data_prep.errors import PrepareError
from data_prep.tokenizer import Tokenizer

COMPRESSION = {"zstd": "zstd:7", "none": None}
MAX_DOCUMENT_BYTES = 256 << 20  # its tokens, at most 4 bytes for each byte of text, have to fit one MDS shard


@dataclass(frozen=True)
class Settings:
    """Other values, other shards; so a working folder and a prepared folder belong to one set of them."""

    validation_share: float = 0.05
    seed: int = 0  # of the split by document hash
    shard_size: int = 16 << 20  # bytes of a decompressed shard, at most (a longer document gets its own)
    compression: str = "zstd"
    max_bytes: int | None = None  # of text; reading stops before the document that would pass it
    keep_duplicates: bool = False

    def check(self) -> None:
        """Raise PrepareError naming the value that cannot be."""
        if not 0 < self.validation_share < 1:
            raise PrepareError(f"--validation-share {self.validation_share}: must be above 0 and below 1, as 0.05")
        if not 0 <= self.seed < 2**63:
            raise PrepareError(f"--seed {self.seed}: must be from 0 to 2**63 - 1")
        if not 4096 <= self.shard_size < 2**31:
            raise PrepareError(f"--shard-size {self.shard_size}: must be from 4096 to 2**31 - 1 bytes")
        if self.compression not in COMPRESSION:
            raise PrepareError(f"--compression {self.compression}: must be one of {' '.join(COMPRESSION)}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise PrepareError(f"--max-bytes {self.max_bytes}: must be at least 1 byte, or left out for no limit")


def check_document_bytes(limit: int) -> None:
    """Raise PrepareError where --max-document-size allows documents that fit no shard."""
    if not 1 <= limit <= MAX_DOCUMENT_BYTES:
        raise PrepareError(f"--max-document-size {limit}: must be from 1 to {MAX_DOCUMENT_BYTES} bytes (256mb)")


def is_validation(text: bytes, share: float, seed: int) -> bool:
    """The split of a document, from its UTF-8 text alone: others do not move it, equal ones stay together."""
    return xxhash.xxh64_intdigest(text, seed=seed) < share * 2.0**64


def split_of(text: str, share: float, seed: int) -> str:
    """ "validation" or "train"."""
    return "validation" if is_validation(text.encode("utf-8"), share, seed) else "train"


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """Of stored tokens: 16 bits where the vocabulary allows it."""
    return np.dtype("<u2" if tokenizer.vocabulary <= 1 << 16 else "<u4")
