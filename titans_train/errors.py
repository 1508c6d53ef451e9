"""The error that is the user's to mend: printed without a traceback, exit status 2."""

from __future__ import annotations


class UserError(ValueError):
    """Names the value, the limit and the remedy. `agreed`: every rank raises the same, so one may print it."""

    def __init__(self, message: str, *, agreed: bool = False) -> None:
        super().__init__(message)
        self.agreed = agreed
