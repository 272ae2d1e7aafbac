"""Confidence intervals of shares."""

from __future__ import annotations

import math

_Z = 1.959963984540054  # of 95 %, both sides


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share of `right` in `total` independent trials (Wilson 1927)."""
    if not total:
        return 0.0, 1.0
    share, square = right / total, _Z * _Z
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = _Z / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)
