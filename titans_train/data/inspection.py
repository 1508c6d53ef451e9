"""Everything that one raw shard must fulfil besides its hash: all that is wrong with it, not only the first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.manifest import ShardEntry, TokenizerEntry
from data_prep.manifest_checks import shown
from titans_train.data.mds import check_offsets
from titans_train.untrusted import parse_json

_COLUMNS = {"column_names": ["name", "tokens"], "column_encodings": ["str", "bytes"]}
_HEADER = 8


def shard_problems(
    raw: bytes, shard: ShardEntry, lengths: NDArray[np.int64] | None, dtype: np.dtype[Any], tokenizer: TokenizerEntry
) -> list[str]:
    """`raw`: the file's content. `lengths`: tokens of each of its documents, None where that file is not to be had."""
    documents = shard.documents
    table = np.frombuffer(raw, "<u4", min(documents + 2, len(raw) // 4))
    if len(table) < documents + 2 or int(table[0]) != documents:
        return [f"holds {int(table[0]) if len(table) else 0} documents, the manifest says {documents}"]
    offsets = table[1:].astype(np.int64)
    if not check_offsets(table[1:], len(raw)):
        return ["has offsets out of order or outside of the file"]
    found = _column_problems(raw[4 * (documents + 2) : offsets[0]])
    headers = np.frombuffer(raw, np.uint8)[offsets[:-1, None] + np.arange(_HEADER)].view("<u4").astype(np.int64)
    names, sizes = headers[:, 0], headers[:, 1]
    if (wrong := names + sizes + _HEADER != np.diff(offsets)).any():
        return [*found, f"{_which(wrong)}: its header contradicts the table of offsets"]
    if (wrong := (sizes % dtype.itemsize != 0) | (sizes == 0)).any():
        return [*found, f"{_which(wrong)}: {sizes[wrong][0]} bytes are no tokens of {dtype.itemsize}"]
    return found + _token_problems(raw, offsets[:-1] + _HEADER + names, sizes, shard, lengths, dtype, tokenizer)


def _token_problems(
    raw: bytes,
    begins: NDArray[np.int64],
    sizes: NDArray[np.int64],
    shard: ShardEntry,
    lengths: NDArray[np.int64] | None,
    dtype: np.dtype[Any],
    tokenizer: TokenizerEntry,
) -> list[str]:
    view, found, counts = memoryview(raw), [], sizes // dtype.itemsize
    pieces = zip(begins.tolist(), (begins + sizes).tolist(), strict=True)
    tokens = np.frombuffer(b"".join([view[begin:end] for begin, end in pieces]), dtype)
    if len(tokens) != shard.tokens:
        found.append(f"holds {len(tokens)} tokens, the manifest says {shard.tokens}")
    if lengths is not None and (wrong := counts != lengths).any():
        first = int(np.argmax(wrong))
        found.append(f"{_which(wrong)}: {counts[first]} tokens, lengths.npy says {lengths[first]}")
    last = tokens[np.cumsum(counts) - 1]
    if (wrong := last != tokenizer.end_of_document).any():
        found.append(f"{_which(wrong)}: ends with token {last[wrong][0]}, expected {tokenizer.end_of_document}")
    if int(tokens.max()) >= tokenizer.vocabulary:
        above = np.repeat(np.arange(len(counts)), counts)[tokens >= tokenizer.vocabulary]
        wrong = np.isin(np.arange(len(counts)), above)
        found.append(f"{_which(wrong)}: token {int(tokens.max())}, expected below {tokenizer.vocabulary}")
    return found


def _column_problems(text: bytes) -> list[str]:
    try:
        columns = parse_json(text)
        found = {name: columns[name] for name in _COLUMNS}
    except (ValueError, KeyError, TypeError) as error:
        return [f"has no description of its columns ({shown(str(error))})"]
    return [] if found == _COLUMNS else [f"has columns {found}, expected {_COLUMNS}"]


def _which(wrong: NDArray[np.bool_]) -> str:
    """The first document in error, and how many."""
    count = int(wrong.sum())
    return f"document {int(np.argmax(wrong))}" + (f" and {count - 1} more" if count > 1 else "")
