"""Refuses wrong settings before ranks start (status 2), and leaves the run's folder in NOTES-run for the job file.

Usage: run_folder.py WORLD CONFIG.yaml [key.path=value ...]    with NOTES from lib.sh
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from titans_train.config import load_config
from titans_train.errors import UserError
from titans_train.plan import make_plan


def main(world: int, config: str, overrides: list[str]) -> int:
    try:
        plan = make_plan(load_config(config, overrides, world), world)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    Path(f"{os.environ['NOTES']}-run").write_bytes(os.fsencode(plan.run_directory))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
