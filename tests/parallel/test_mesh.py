"""The mesh: tensor fastest, then sequence, then data; worlds that do not fit are refused."""

from __future__ import annotations

import pytest

from titans_train.parallel import Mesh


def test_tensor_varies_fastest_then_sequence_then_data() -> None:
    places = [(m.tensor_rank, m.sequence_rank, m.data_rank) for m in (Mesh(r, 8, 2, 2) for r in range(8))]
    assert places == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)]
    assert Mesh(0, 8, 2, 2).data == 2


def test_a_world_that_does_not_fit_the_mesh_is_refused_with_numbers() -> None:
    with pytest.raises(ValueError, match="6 processes .* tensor 2 x sequence 2; start a multiple of 4"):
        Mesh(0, 6, 2, 2)
