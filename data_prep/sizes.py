"""Sizes as people write them on a command line."""

from __future__ import annotations

import argparse
import re

_UNITS = {"": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes of "65536", "512kb", "16mb" or "1gb" (units of 1024)."""
    match = re.fullmatch(r"(\d+)\s*(|kb|mb|gb|tb)", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write bytes or a number with kb, mb or gb, as 16mb")
    return int(match[1]) * _UNITS[match[2]]
