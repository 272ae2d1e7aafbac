"""How many were right, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .intervals import wilson


def counts(scores: Tensor, truth: Tensor) -> np.ndarray:
    """How many of `truth` `[n]` have the highest of `scores` `[…, n, classes]`, and one of the five highest: `[…, 2]`.

    Of fewer than five classes there is no five highest: 0. A score that is not a number is never right.
    """
    finite = scores.isfinite().all(dim=-1)
    known = scores.gather(-1, truth.expand(scores.shape[:-1])[..., None])
    # Equal scores in the order of classes, as argmax and a stable sort have them: the first wins.
    classes = torch.arange(scores.shape[-1], device=scores.device)
    before = (scores == known) & (classes < truth[:, None])
    better = ((scores > known) | before).sum(dim=-1)
    top1 = ((better == 0) & finite).sum(dim=-1)
    top5 = ((better < 5) & finite).sum(dim=-1) if scores.shape[-1] >= 5 else torch.zeros_like(top1)
    return torch.stack([top1, top5], dim=-1).cpu().numpy().astype(np.int64)


def figure(right: np.ndarray, count: int, classes: int, **setting: Any) -> dict[str, Any]:
    """A row of results: the setting, top-1 and its interval, and top-5 where there are five classes."""
    low, high = wilson(int(right[0]), count)
    row = {**setting, "top1": round(int(right[0]) / count, 5), "interval": [round(low, 5), round(high, 5)]}
    if classes >= 5:
        row["top5"] = round(int(right[1]) / count, 5)
    return row


def over_draws(rows: Sequence[dict[str, Any]], **setting: Any) -> dict[str, Any]:
    """One row of several draws: the mean, its standard deviation over draws, and what each came to."""
    found = [row["top1"] for row in rows]
    row: dict[str, Any] = {**setting, "top1": round(float(np.mean(found)), 5)}
    if len(rows) == 1:
        row["interval"] = rows[0]["interval"]
    else:
        row |= {"std": round(float(np.std(found, ddof=1)), 5), "draws": found}
    if all("top5" in one for one in rows):
        row["top5"] = round(float(np.mean([one["top5"] for one in rows])), 5)
    return row
