"""Attentive probes of cached tokens, one for each learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...models.attentive_pool import AttentivePool, loss_of
from .linear import epoch_batches

RATES, EPOCHS, BATCH, WEIGHT_DECAY, WARMUP = (3e-4, 1e-3, 3e-3), 20, 256, 0.01, 0.05


class AttentiveProbes:
    """An `AttentivePool` for each rate on the same tokens, with the same first weights, by AdamW.

    Rates rise over the first 5 % of the steps and fall to 0 along a cosine.
    """

    def __init__(
        self, width: int, heads: int, classes: int, rates: Sequence[float], device: torch.device | str, seed: int = 0
    ):
        self.device, self.rates = device, list(rates)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first = AttentivePool(width, heads, classes)
        self.pools = []
        for _ in rates:
            pool = AttentivePool(width, heads, classes)
            pool.load_state_dict(first.state_dict())
            self.pools.append(pool.to(device))
        self.optimizers = [
            torch.optim.AdamW(pool.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
            for pool, rate in zip(self.pools, rates, strict=True)
        ]

    def fit(self, tokens: np.ndarray, labels: np.ndarray, epochs: int = EPOCHS, seed: int = 0) -> None:
        """Train all on tokens `[n, N, width]` with labels `[n]`."""
        truth = torch.from_numpy(labels)
        steps = epochs * -(-len(labels) // BATCH)
        step = 0
        for epoch in range(epochs):
            for rows in epoch_batches(len(labels), seed, epoch, BATCH):
                part = torch.from_numpy(tokens[rows]).to(self.device).float()
                loss = loss_of(self.pools, part, truth[torch.from_numpy(rows)].to(self.device))
                loss.backward()
                for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
                    for group in optimizer.param_groups:
                        group["lr"] = rate * schedule(step, steps)
                    optimizer.step()
                    optimizer.zero_grad()
                step += 1

    @torch.no_grad()
    def scores(self, tokens: Tensor) -> Tensor:
        """`[rates, B, classes]` of tokens `[B, N, width]`."""
        return torch.stack([pool(tokens.float()) for pool in self.pools])


def schedule(step: int, steps: int) -> float:
    """The share of the peak rate at a step: linear warm-up over 5 % of them, then a cosine to 0."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
