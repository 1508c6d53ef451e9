"""Reading: prepared shards (or a synthetic task) in, the same verified token batches out on any layout.

`open_dataset` says what sequence i is; `loader` hands each rank its rows of each step. Which sequences form a
global batch is a function of (seed, data, step) only, so there is no reading state to save.
"""

from titans_train.data.dataset import TokenDataset, open_dataset
from titans_train.data.errors import DataError
from titans_train.data.loader import Batch, loader
from titans_train.data.sample import Sample
from titans_train.data.synthetic import SyntheticDataset

__all__ = ["Batch", "DataError", "SyntheticDataset", "Sample", "TokenDataset", "loader", "open_dataset"]
