"""Imported once by the process that shard writers are forked from: streaming takes seconds to import."""

from data_prep import shards  # noqa: F401  what a worker unpickles
from titans_train.data.shim import import_streaming

import_streaming("streaming.base.format.mds.writer")
