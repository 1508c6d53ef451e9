"""Old place of `split_of`, for callers that have not moved yet."""

from data_prep.settings import split_of

__all__ = ["split_of"]
