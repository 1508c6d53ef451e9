"""Imported once by the process that reader workers are forked from, so that each starts with all it needs."""

from titans_train.data import loader, shards  # noqa: F401  what a worker unpickles
from titans_train.data.shim import import_streaming

import_streaming("streaming.base.format.mds.reader")
