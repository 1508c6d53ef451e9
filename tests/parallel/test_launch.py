"""titans_train/parallel/launch.py: joining; what several processes decide together is in tests/distributed."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from titans_train.parallel.launch import process_group


@pytest.mark.parametrize("place", [{}, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}], ids=["alone", "srun"])
def test_one_process_needs_no_meeting_place(monkeypatch: pytest.MonkeyPatch, place: dict[str, str]) -> None:
    """slurm/evaluate.sbatch starts its one task with a rank, and with no MASTER_ADDR."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with process_group() as mesh:
        assert dist.get_world_size() == 1 and mesh.is_first
    assert not dist.is_initialized()
