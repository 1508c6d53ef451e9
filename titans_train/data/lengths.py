"""lengths.npy: how many tokens each document of a source has. One plain int64 array, as numpy writes it.

Read here, since numpy evaluates a header as Python, sets aside what it declares, and takes archives and pickles too.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

_HEAD = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([^'\n]{1,16})', 'fortran_order': False, 'shape': (\([0-9, ]{0,99}\)), \} *\n",
    re.DOTALL,
)


def read_lengths(content: bytes, documents: int) -> NDArray[np.int64]:
    """[documents], each at least 1. ValueError: anything else, before memory is set aside for it."""
    head = _HEAD.match(content)
    if head is None:
        raise ValueError("it is not an array as numpy saves it (.npy, version 1.0)")
    dtype, shape = head[1].decode("ascii", "backslashreplace"), head[2].decode()
    if dtype != "<i8" or shape != f"({documents},)":
        raise ValueError(f"it is of type {dtype!r} and shape {shape}, expected int64 '<i8' ({documents},)")
    if (size := len(content) - head.end()) != 8 * documents:
        raise ValueError(f"it holds {size} bytes of numbers, {documents} documents have {8 * documents}")
    lengths = np.frombuffer(content, "<i8", offset=head.end()).astype(np.int64)
    if documents and int(lengths.min()) < 1:
        raise ValueError(f"document {int(lengths.argmin())} has {int(lengths.min())} tokens, expected 1 or more")
    return lengths
