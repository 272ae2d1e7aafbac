"""k-NN of standardised features by cosine: exact, block by block, so that no matrix of all pairs stands in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS, TEMPERATURE, BLOCK = (10, 20, 100, 200), 0.07, 512


class Nearest:
    """The images of a training set `[n, D]` with their `labels` `[n]`, on a device.

    Features are standardised by training statistics first: an encoder without class token has a large common mean
    (its positions), beside which the cosines of any two images differ by rounding alone.
    """

    def __init__(self, train: np.ndarray, labels: np.ndarray, device: torch.device | str = "cpu"):
        mean, std = statistics(train)
        self.mean, self.std = (torch.from_numpy(one).float().to(device) for one in (mean, std))
        self.device, self.labels = device, torch.from_numpy(np.asarray(labels, np.int64)).to(device)
        self.classes = int(self.labels.max()) + 1
        self.train = torch.empty(train.shape, device=device)
        for first in range(0, len(train), 1 << 14):
            part = slice(first, first + (1 << 14))
            self.train[part] = self._unit(train[part])

    def _unit(self, features: np.ndarray) -> Tensor:
        found = torch.from_numpy(np.array(features, np.float32)).to(self.device)
        return F.normalize(found.sub_(self.mean).div_(self.std), dim=1)

    def neighbours(self, features: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and places `[m, count]` of the nearest training images of `features` `[m, D]`, nearest first."""
        found = [
            torch.topk(self._unit(features[i : i + BLOCK]) @ self.train.T, min(count, len(self.train)))
            for i in range(0, len(features), BLOCK)
        ]
        return torch.cat([cosines for cosines, _ in found]), torch.cat([places for _, places in found])

    def votes(self, features: np.ndarray, ks: Sequence[int] = NEIGHBOURS) -> Tensor:
        """The votes for each class `[len(ks), m, classes]`: of the k nearest, weighted by exp(cosine / 0.07).

        As exp((cosine - 1) / 0.07), which is the same vote, in float64.
        """
        cosines, places = self.neighbours(features, max(ks))
        weights = torch.exp((cosines.double() - 1) / TEMPERATURE)
        labels = self.labels[places]
        out = torch.zeros(len(ks), len(cosines), self.classes, dtype=torch.float64, device=self.device)
        for votes, k in zip(out, ks, strict=True):
            votes.scatter_add_(1, labels[:, :k], weights[:, :k])
        return out


def statistics(train: np.ndarray, ddof: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation `[D]` of features `[n, D]`, in float64; 1 for a deviation of 0."""
    total, squares = np.zeros(train.shape[1]), np.zeros(train.shape[1])
    for first in range(0, len(train), 1 << 14):
        total += train[first : first + (1 << 14)].sum(axis=0, dtype=np.float64)
    mean = total / len(train)
    for first in range(0, len(train), 1 << 14):
        squares += np.square(train[first : first + (1 << 14)] - mean).sum(axis=0)
    std = np.sqrt(squares / max(1, len(train) - ddof))
    # What is constant but for rounding is left alone, too.
    std[std <= 10 * np.finfo(np.float32).eps * np.abs(mean)] = 1.0
    return mean, std
