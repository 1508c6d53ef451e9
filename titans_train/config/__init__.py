"""The run config: a typed schema, YAML files with a base, overrides, and refusals that name all problems at once.

Here belongs what a user may write and what is wrong with it. What follows from a config (mesh, counts, memory)
belongs to `plan.py`. Nothing here imports torch: login nodes check configs.
"""

from titans_train.config.checks import check_config
from titans_train.config.errors import ConfigError, Problem
from titans_train.config.load import dump_config, load_config
from titans_train.config.schema import RunConfig

__all__ = ["ConfigError", "Problem", "RunConfig", "check_config", "dump_config", "load_config"]
