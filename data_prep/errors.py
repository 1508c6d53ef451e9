"""The errors of preparing: their text is written for the person who typed the command."""

from __future__ import annotations


class PrepareError(ValueError):
    """Input, settings or disk do not allow preparing; the text names the value and the remedy."""


class InputChangedError(PrepareError):
    """A file changed while it was read: what is done belongs to another input, so that only --restart helps."""
