"""Imported once by the process that reader workers are forked from, so that each starts with all it needs.

That process lives as long as any of its workers, and torch's workers live as long as it: after a kill of the rank both
would stay for ever. So the kernel ends it with its rank.
"""

from titans_train.data.parent import end_with_parent

end_with_parent()

from titans_train.data import loader, shards  # noqa: E402, F401  what a worker unpickles
