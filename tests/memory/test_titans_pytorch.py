"""An independent referee: the PyPI package titans-pytorch in its exact mode, with the same weights."""

from __future__ import annotations

import pytest

from titans_train.benchmark.titans_pytorch_peer import exactness


@pytest.mark.parametrize("chunk,length", [(4, 16), (8, 24), (16, 32)])
def test_the_scan_equals_titans_pytorch_in_its_exact_mode(chunk: int, length: int) -> None:
    errors = exactness(chunk, length)
    assert len(errors) > 10
    assert max(errors.values()) <= 1e-9, {n: e for n, e in errors.items() if e > 1e-9}
