"""A text without end, of so many tokens as are wanted, with a needle in it: as the tokenizer would read it in one."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from itertools import accumulate, chain

from titans_train.evaluation.encoding import Encoder, all_behind, behind, encode, pieces

# A needle stands between two sentences that are so near to its depth, else between two words, else anywhere
NEAR_TOKENS, NEAR_SHARE = 16, 0.02  # the larger: of tokens, or of the haystack
LONGEST = 2000  # characters that are kept as one sentence
_CONTEXT = 32  # characters before a text that may change its tokens
_END = re.compile(r"(?<=[.!?])(?= )|(?<=[。！？])")


def sentences(text: str) -> list[str]:
    """Of each line, with the space in front of them, which stands for any white space; joined they are the text again.
    What goes on for longer than LONGEST is cut.
    """
    lines = [f" {' '.join(line.split())}" for line in text.splitlines() if line.strip()]
    return [piece for line in lines for part in _END.split(line) if part for piece in pieces(part, LONGEST)]


class Haystack:
    """Sentences over and over."""

    def __init__(self, tokenizer: Encoder, texts: list[str]) -> None:
        """texts: each with what parts it from the one before it, the first from the last."""
        self.tokenizer, self.texts = tokenizer, texts
        found = all_behind(tokenizer, [texts[n - 1][-_CONTEXT:] for n in range(len(texts))], texts)
        self.tokens: list[list[int]] = [tokens.tolist() for tokens in found]

    def around(self, before: str, needle: str, room: int, depth: float, start: int) -> list[int]:
        """`room` tokens behind the text `before`, which ends a line: sentences from number `start` on, with the needle
        at a depth of 0 (start) to 1 (end). Cut to fit is the last sentence, or the first where the needle is the last.
        """
        found = self._behind(before, needle)
        free = room - len(found)
        if free < NEAR_TOKENS:
            return [*found, *chain(*self._enough(start + 1, free)[1])][:room]
        texts, tokens = self._enough(start, free)
        following = start + len(texts)
        border = self._border(texts, tokens, free, depth)
        # what stands at a seam is encoded as it stands there
        if border:
            texts[0] = texts[0].lstrip()
            tokens[0] = self._behind(before, texts[0])
            before = texts[border - 1]
            needle = needle if before[-1].isspace() else f" {needle}"
        if border < len(texts):
            if not texts[border][0].isspace():
                if needle[0].isspace():
                    texts[border] = f" {texts[border]}"
                else:
                    needle += "\n"
            tokens[border] = self._behind(needle, texts[border])
        left, found, right = [*chain(*tokens[:border])], self._behind(before, needle), [*chain(*tokens[border:])]
        # seams may have become shorter
        while len(left) + len(found) + len(right) < room:
            if right:
                right += self.tokens[following % len(self.tokens)]
                following += 1
            else:
                start -= 1
                left[:0] = self.tokens[start % len(self.tokens)]
        if not right:
            return [*left[len(left) + len(found) - room :], *found]
        return [*left, *found, *right][:room]

    def _enough(self, start: int, count: int) -> tuple[list[str], list[list[int]]]:
        """At least so many tokens of whole sentences."""
        texts: list[str] = []
        tokens: list[list[int]] = []
        size = 0
        while size < count:
            n = (start + len(texts)) % len(self.texts)
            texts.append(self.texts[n])
            tokens.append(self.tokens[n])
            size += len(tokens[-1])
        return texts, tokens

    def _border(self, texts: list[str], tokens: list[list[int]], free: int, depth: float) -> int:
        """How many texts stand before the needle; the one that it stands in is parted."""
        place, near = depth * free, max(NEAR_TOKENS, NEAR_SHARE * free)
        ends = [min(end, free) for end in accumulate(map(len, tokens), initial=0)]
        border = min(range(len(ends)), key=lambda n: abs(ends[n] - place))
        if abs(ends[border] - place) <= near:
            return border
        n = bisect_right(ends, place) - 1
        left, right = self._parted(texts[n], round(place) - ends[n], near)
        before = texts[n - 1] if n else ""
        texts[n : n + 1], tokens[n : n + 1] = [left, right], [self._behind(before, left), self._behind(left, right)]
        return n + 1

    def _parted(self, text: str, count: int, near: float) -> tuple[str, str]:
        """After about `count` tokens: at the nearest space, or, where that is not near, at any character."""
        at = bisect_left(range(len(text)), count, key=lambda end: len(encode(self.tokenizer, text[:end])))
        at = min(max(at, 2), len(text) - 1)  # behind the first character that is no space
        spaces = [space for space in (text.rfind(" ", 2, at + 1), text.find(" ", at)) if space > 0]
        if spaces:
            space = min(spaces, key=lambda end: abs(end - at))
            if len(encode(self.tokenizer, text[min(space, at) : max(space, at)])) <= near:
                at = space
        return text[:at], text[at:]

    def _behind(self, before: str, text: str) -> list[int]:
        found: list[int] = behind(self.tokenizer, before[-_CONTEXT:], text).tolist()
        return found
