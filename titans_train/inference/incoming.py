"""Text as it arrives, of any length: decoded, cut and read piece by piece, at constant memory.

Where the text is cut follows from the text alone, never from how it arrived: after a line, in front of a character
that is no space, the last such place in a piece; there every usual tokenizer parts tokens anyway. A SentencePiece model
puts the sign of a word's beginning in front of each piece. Without such a place the cut is before a space, or anywhere.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any, BinaryIO

from titans_train.errors import UserError
from titans_train.inference.sampling import Reading, read
from titans_train.inference.source import encode

PIECE = 16384  # characters that are tokenised at once
_BLOCK = 1 << 16  # bytes taken from the stream at once, at most


def texts_of(stream: BinaryIO, piece: int = PIECE, name: str = "standard input") -> Iterator[str]:
    """A UTF-8 stream in pieces of at most so many characters. UserError: `name` is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, taken = "", 0
    read_some = getattr(stream, "read1", stream.read)
    while True:
        block = read_some(_BLOCK)
        begun = len(decoder.getstate()[0])
        try:
            text += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name} is not UTF-8 text at byte {taken - begun + error.start}; convert it first (iconv)"
            ) from error
        taken += len(block)
        while len(text) > piece:
            end = _cut(text, piece)
            yield text[:end]
            text = text[end:]
        if not block:
            break
    if text:
        yield text


def _cut(text: str, piece: int) -> int:
    """Characters of the first piece; text: longer than one."""
    for end in range(piece, 0, -1):
        if text[end - 1] == "\n" and not text[end].isspace():
            return end
    for end in range(piece, 0, -1):
        if text[end].isspace() and not text[end - 1].isspace():
            return end
    return piece


def read_stream(model: Any, tokenizer: Any, stream: BinaryIO, before: Reading | None = None) -> tuple[Reading, int]:
    """Reads a stream to its end; returns the reading and the number of tokens. UserError: not UTF-8, or no text."""
    reading, count = before, 0
    for text in texts_of(stream):
        tokens = encode(tokenizer, text)
        if tokens:
            reading = read(model, tokens, reading)
            count += len(tokens)
    if reading is None:
        raise UserError("there was no text on standard input; pipe one in, as: cat book.txt | ... generate ... --stdin")
    return reading, count
