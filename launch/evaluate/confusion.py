"""How good predicted label maps are: a confusion matrix, and what is read from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int, ignored: int = 255) -> np.ndarray:
    """Counts `[classes, classes]` int64 of pixels of each true class (row) predicted as each class (column)."""
    known = truth != ignored
    places = truth[known].astype(np.int64) * classes + predicted[known]
    return np.bincount(places, minlength=classes**2).reshape(classes, classes)


def figures(matrix: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """mIoU, mAcc and aAcc (0 … 1), and of each class IoU, accuracy and its share of the labelled pixels.

    A class that is neither in the truth nor predicted has no IoU and counts in no mean; one that is not in the truth
    has no accuracy.
    """
    matrix = matrix.astype(np.float64)
    right, true, said = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, as it should be
        iou, accuracy, share = right / (true + said - right), right / true, true / true.sum()

    def number(value: float) -> float | None:
        return None if np.isnan(value) else round(float(value), 6)

    def mean(values: np.ndarray) -> float | None:
        return number(values[~np.isnan(values)].mean()) if (~np.isnan(values)).any() else None

    return {
        "miou": mean(iou), "macc": mean(accuracy),
        "aacc": number(right.sum() / true.sum()) if true.sum() else None,
        "classes": {
            name: {"iou": number(iou[i]), "accuracy": number(accuracy[i]), "share": number(share[i])}
            for i, name in enumerate(names)
        },
    }  # fmt: skip
