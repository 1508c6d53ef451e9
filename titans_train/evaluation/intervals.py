"""How sure a share of right answers is."""

from __future__ import annotations

import math


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
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
