"""How many bytes of text each token id stands for, so that a model's loss can be given per byte of any part of a text.

A table is float64 [vocabulary, 2]: bytes within a document, and as a document's first token, where the tokenizers that
put a space in front of a text take it away again. They are bytes of the text as the tokenizer's own `decode` gives it
back: what a normaliser changes (letters' case, repeated spaces) is not seen. Tokens that no text gives, and the end of
a document, have 0; a token for unknown text has NaN, as its bytes are lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # the name of a byte's token, where a model falls back to bytes
_BATCH = 4096  # tokens decoded at once


def of_bytes() -> Table:
    """Of ByteTokenizer."""
    table = np.ones((257, 2))
    table[256] = 0
    return table


def of_huggingface(tokenizer: Any, vocabulary: int, end: int) -> Table | None:
    """tokenizer: of the `tokenizers` library, whose special tokens no text gives. None: it does not take an "a"."""
    parts, added = json.loads(tokenizer.to_str()), tokenizer.get_added_tokens_decoder()
    names = [tokenizer.id_to_token(number) for number in range(vocabulary)]
    decoders = {part["type"] for part in _parts(parts["decoder"])}
    if "ByteLevel" in decoders:
        table = _of_letters(names, parts["pre_tokenizer"])
    elif anchor := tokenizer.encode("a", add_special_tokens=False).ids:
        table = _of_decoded(partial(tokenizer.decode_batch, skip_special_tokens=False), anchor[-1], vocabulary)
    else:
        return None
    for number, name in enumerate(names):
        if name is None:
            table[number] = 0
        elif "ByteFallback" in decoders and _BYTE.fullmatch(name):
            table[number] = 1
        elif number in added:
            table[number] = 0 if added[number].special else len(added[number].content.encode())
    unknown = parts["model"].get("unk_token", parts["model"].get("unk_id"))
    unknown = names.index(unknown) if unknown in names else unknown
    if isinstance(unknown, int):
        table[unknown] = np.nan
    table[end] = 0
    return table


def of_sentencepiece(model: Any) -> Table:
    """model: a SentencePieceProcessor."""
    vocabulary = int(model.get_piece_size())
    anchor = next(n for n in range(vocabulary) if _is_text(model, n) and not model.id_to_piece(n).endswith("\u2581"))
    table = _of_decoded(model.decode, anchor, vocabulary)
    for number in range(vocabulary):
        if model.is_byte(number):
            table[number] = 1
        elif model.is_unknown(number):
            table[number] = np.nan
        elif not _is_text(model, number):
            table[number] = 0
    return table


def _is_text(model: Any, number: int) -> bool:
    kinds = (model.is_control, model.is_unknown, model.is_unused, model.is_byte)
    return not any(kind(number) for kind in kinds)


def _parts(node: Any) -> Iterator[dict[str, Any]]:
    """A decoder or pre-tokenizer and those it is a sequence of."""
    if isinstance(node, dict):
        yield node
        for inner in (*node.get("decoders", ()), *node.get("pretokenizers", ())):
            yield from _parts(inner)


def _of_letters(names: Sequence[str | None], pre_tokenizer: Any) -> Table:
    """Byte-level BPE: each letter of a token's name is a byte; the name of a space is U+0120."""
    prefix = any(part["type"] == "ByteLevel" and part.get("add_prefix_space") for part in _parts(pre_tokenizer))
    sizes = [(len(name or ""), prefix and (name or "").startswith("\u0120")) for name in names]
    return np.array([(size, size - int(space)) for size, space in sizes], np.float64)


def _of_decoded(decode: Callable[[list[list[int]]], list[str]], anchor: int, vocabulary: int) -> Table:
    """By decoding each token alone, and behind `anchor`, a token of text."""
    (before,) = decode([[anchor]])
    sizes: list[tuple[int, int]] = []
    for first in range(0, vocabulary, _BATCH):
        ids = range(first, min(first + _BATCH, vocabulary))
        alone, behind = decode([[number] for number in ids]), decode([[anchor, number] for number in ids])
        sizes += [(len(b.encode()) - len(before.encode()), len(a.encode())) for a, b in zip(alone, behind, strict=True)]
    return np.array(sizes, np.float64)
