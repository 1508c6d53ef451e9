"""Tokens to text as they are made: whole characters only, and an end where the user has named one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

HALF = "\ufffd"  # what a decoder gives for bytes that are no character (yet)
_LONGEST = 3  # such signs that the bytes of one unfinished character may show as
_CONTEXT, _WINDOW = 16, 64  # tokens that are decoded again with each new one


class Decoder(Protocol):
    end_of_document: int

    def decode(self, ids: list[int]) -> str: ...


class TextStream:
    """The text of tokens that come one by one.

    before: ids of the text that these continue (the last few matter: a decoder leaves out the space before a first
    word). stops: texts at the first of which this text ends, without it. at_end: ends at an end-of-document token.
    """

    def __init__(
        self, tokenizer: Decoder, before: Sequence[int] = (), stops: Sequence[str] = (), at_end: bool = False
    ) -> None:
        if not all(stops):
            raise ValueError("a stop text has at least one character")
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._end = tokenizer.end_of_document if at_end else None
        self._tokens = [int(token) for token in before[-_CONTEXT:]]
        self._shown = tokenizer.decode(self._tokens)  # of the decoded tokens, what is out, or held
        self._waiting = 0  # tokens since that grew, which have text to come
        self._held = ""  # whole characters that may be the beginning of a stop text
        self.count = 0
        self.finish: str | None = None  # "stop" or "end" once the text has ended

    def add(self, token: int) -> str:
        """The text that is certain now and was not before, often none."""
        if self.finish is not None:
            return ""
        self.count += 1
        if token == self._end:
            self.finish = "end"
            return self._rest()
        self._tokens.append(token)
        self._waiting += 1
        text = self._decoded()
        certain = text[: len(text) - min(len(text) - len(text.rstrip(HALF)), _LONGEST)]
        new = certain[len(self._shown) :] if certain.startswith(self._shown) else ""
        if new or text == self._shown:
            self._shown, self._waiting = self._shown + new, 0
        self._shorten(text)
        return self._out(new) if new else ""

    def _decoded(self, whole: bool = False) -> str:
        """Of the tokens in the window; of the new ones alone where that changes what is out already, and further tokens
        have not mended it, or none follow (`whole`).

        A tokenizer.json with byte fallback shows a run of bytes that ends amid a character as U+FFFD throughout.
        """
        text = self._tokenizer.decode(self._tokens)
        if text.startswith(self._shown) or (self._waiting < _CONTEXT and not whole):
            return text
        if not self._waiting:
            return self._shown
        self._tokens, self._shown = self._tokens[-self._waiting :], ""
        return self._tokenizer.decode(self._tokens)

    def close(self) -> str:
        """What is left when no token follows; half a character is shown as U+FFFD."""
        return "" if self.finish is not None else self._rest()

    def _rest(self) -> str:
        decoded = self._decoded(whole=True)
        text = self._out(decoded[len(self._shown) :])
        if self.finish == "stop":
            return text
        held, self._held = self._held, ""
        return text + held

    def _out(self, new: str) -> str:
        """Of held and new text, what is before a stop text, or cannot be the beginning of one."""
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.finish, self._held = "stop", ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _shorten(self, text: str) -> None:
        """Forgets tokens long out, where the rest alone decodes to the same end."""
        if len(self._tokens) < _WINDOW:
            return
        for count in range(_CONTEXT, _CONTEXT + 4):  # the first of them may be in the middle of a character
            last = self._tokenizer.decode(self._tokens[-count:])
            gone = len(text) - len(last)
            if text.endswith(last) and gone <= len(self._shown) and self._waiting < count:
                self._tokens, self._shown = self._tokens[-count:], self._shown[gone:]
                return


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that a stop text begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
