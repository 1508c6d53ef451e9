"""The one error of reading: it ends the run, and its text says which file, what was expected and what to do."""

from __future__ import annotations

from titans_train.errors import UserError


class DataError(UserError):
    """Data is missing, damaged or does not fit the run config."""
