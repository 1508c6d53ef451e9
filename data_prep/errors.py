"""The one error of preparing: its text is written for the person who typed the command."""

from __future__ import annotations


class PrepareError(ValueError):
    """Input, settings or disk do not allow preparing; the text names the value and the remedy."""
