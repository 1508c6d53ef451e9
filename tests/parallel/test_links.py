"""Between neighbouring shards: another message than expected, or none, is an error that says which."""

from __future__ import annotations

import pytest

from tests.torchrun import torchrun


def lines(*ways: str) -> tuple[int, dict[str, str], str]:
    """Exit status, what rank 1 said by way, everything on the error output."""
    done = torchrun(2, "-m", "tests.parallel.links_worker", *ways)
    said = [line.split(": ", 1) for line in done.stdout.splitlines() if ": rank 1 " in line]
    return done.returncode, dict(said), done.stderr  # type: ignore[arg-type]


def test_another_message_than_expected_is_an_error_that_names_both() -> None:
    status, said, _ = lines("right", "order", "direction", "longer")
    assert status == 0 and said["right"] == "rank 1 has it"
    expected = "expected message 0 ('state', layer 3, piece 1) of"
    assert all(expected in said[way] for way in ("order", "direction", "longer"))
    assert "got message 0 ('window', layer 3, piece 0) of 24 bytes" in said["order"]
    assert "got message 0 (the gradient of 'state', layer 3, piece 1) of 24 bytes" in said["direction"]
    assert "got message 0 ('state', layer 3, piece 1) of 24 bytes" in said["longer"]


def test_a_message_longer_than_expected_ends_the_job() -> None:
    """gloo itself ends the process that has no room for it."""
    status, _, errors = lines("shorter")
    assert status != 0 and "64 vs 48" in errors


@pytest.mark.parametrize("way", ["hang", "die"])
def test_a_neighbour_that_hangs_or_dies_ends_the_job_with_layer_piece_and_rank(way: str) -> None:
    status, said, _ = lines(way)
    assert status != 0
    if way == "hang":  # the launcher ends all ranks when one has died, perhaps before it can speak
        assert "after 4 s" in said[way]
        assert "waited for 'window', layer 1, piece 0 from its left neighbour, rank 0, in vain" in said[way]
