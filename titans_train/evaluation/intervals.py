"""How sure a share of right answers is."""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson(right: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of the share `right` / `count`: (low, high) within 0 to 1.

    z: normal quantile, 1.96 for 95 %. Also holds near 0 and 1 and for few cases. ValueError unless 0 <= right <= count
    and count >= 1.
    """
    if count < 1 or not 0 <= right <= count:
        raise ValueError(f"{right} right of {count} is no share")
    share = right / count
    scale = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # exactly 0 and 1 at the ends, where rounding would leave a trace
    return 0.0 if right == 0 else middle - half, 1.0 if right == count else middle + half


def clustered(right: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the share of right answers where counts[i] were given in sequence i, right[i] of them right.

    Answers in one sequence go wrong together: Wilson's interval, of as many independent answers as would spread as much
    as these do between sequences (their number over Kish's design effect, and never more than there are).
    """
    count, groups = sum(counts), len(counts)
    share = sum(right) / count
    if not 0 < share < 1 or groups < 2:
        return wilson(sum(right), count)
    spread = sum((r - share * n) ** 2 for r, n in zip(right, counts, strict=True)) * groups / (groups - 1)
    effect = max(spread / (count * share * (1 - share)), 1.0)
    alone = max(count / effect, 1.0)
    return wilson(share * alone, alone)
