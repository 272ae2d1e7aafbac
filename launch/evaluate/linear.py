"""Linear classifiers on frozen features by the VISSL protocol: all rates and decays at once, in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...data.streams import generator

# VISSL's benchmark of a frozen trunk, which StoP and I-JEPA report for ViT-B and L (its `vit_b16_no_cls` on
# `eval_resnet_8gpu_transfer_in1k_linear`): this batch, rate and decay, Nesterov's momentum, rates divided by ten after
# these epochs.
BATCH, MOMENTUM, EPOCHS, MILESTONES = 256, 0.9, 28, (8, 16, 24)
PUBLISHED = (0.01, 5e-4)
RATES, DECAYS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), (0.0, 5e-4)


@dataclass(frozen=True)
class Setting:
    """A learning rate for a batch of 256, and a weight decay."""

    lr: float
    weight_decay: float


def settings(rates: Sequence[float] = RATES, decays: Sequence[float] = DECAYS) -> list[Setting]:
    """Every rate with every decay."""
    return [Setting(lr, decay) for lr in rates for decay in decays]


class Heads:
    """Linear classifiers that share their input and one batch norm without parameters, each with a rate and a decay.

    Their weights stand in one matrix, so that a step is two matrix products for all. Each is trained as it would be
    alone, by SGD with Nesterov's momentum, its bias decayed as its weights. First weights are normal with std 0.01, as
    VISSL's, and the same for all.
    """

    def __init__(self, width: int, classes: int, chosen: Sequence[Setting], device: torch.device | str, seed: int = 0):
        self.chosen, self.classes, self.device = list(chosen), classes, device
        first = torch.from_numpy(generator(seed, "linear probe", 0).normal(0, 0.01, (classes, width))).float()
        self.weight = first.repeat(len(chosen), 1, 1).to(device)  # [S, classes, width]
        self.bias = torch.zeros(len(chosen), classes, device=device)
        self.norm = nn.BatchNorm1d(width, affine=False).to(device)
        self._momenta = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        self._rates = torch.tensor([one.lr for one in chosen], device=device)
        self._decays = torch.tensor([one.weight_decay for one in chosen], device=device)

    def logits(self, inputs: Tensor) -> Tensor:
        """`[S, B, classes]` of normalised inputs `[B, width]`."""
        flat = inputs @ self.weight.flatten(0, 1).T
        return flat.unflatten(1, (len(self.chosen), self.classes)).transpose(0, 1) + self.bias[:, None]

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor, factor: float = 1.0) -> None:
        """One step on a batch `[B, width]` with labels `[B]`, the rates times `factor`."""
        inputs = self.norm.train()(features)
        # Of the mean cross-entropy: softmax minus one at the label, over the batch.
        slope = self.logits(inputs).softmax(dim=-1)
        slope[:, torch.arange(len(labels), device=self.device), labels] -= 1
        slope /= len(labels)
        flat = slope.transpose(0, 1).flatten(1)  # [B, S · classes]
        gradients = [(flat.T @ inputs).view_as(self.weight), slope.sum(dim=1)]
        for value, gradient, momentum in zip((self.weight, self.bias), gradients, self._momenta, strict=True):
            each = (-1,) + (1,) * (value.dim() - 1)
            gradient += self._decays.view(each) * value
            momentum.mul_(MOMENTUM).add_(gradient)
            value -= factor * self._rates.view(each) * (gradient + MOMENTUM * momentum)

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """`[S, B, classes]` of features `[B, width]`, normalised by running statistics."""
        return self.logits(self.norm.eval()(features))


def epoch_batches(count: int, seed: int, epoch: int, batch: int = BATCH) -> Iterator[np.ndarray]:
    """The rows of each batch of an epoch: every one of `count` once, the last batch smaller, but never of one alone."""
    order = generator(seed, "linear probe order", epoch).permutation(count)
    cuts = list(range(batch, count, batch))
    if cuts and count - cuts[-1] == 1:
        cuts.pop()
    yield from np.split(order, cuts)


def decay(epoch: int, epochs: int) -> float:
    """What the rates are multiplied by in an epoch: a tenth after 8/28, 16/28 and 24/28 of them."""
    return 0.1 ** sum(epoch >= round(milestone * epochs / EPOCHS) for milestone in MILESTONES)


def train_epoch(
    heads: Heads, features: np.ndarray, labels: np.ndarray, seed: int, epoch: int, epochs: int, batch: int = BATCH
) -> None:
    """One epoch of `heads` over cached features `[n, width]` with their labels `[n]`, in an order of its own.

    Rates are for a batch of 256 and grow with `batch`.
    """
    truth = torch.from_numpy(labels)
    factor = decay(epoch, epochs) * batch / 256
    for rows in epoch_batches(len(labels), seed, epoch, batch):
        part = torch.from_numpy(features[rows]).to(heads.device)
        heads.step(part, truth[torch.from_numpy(rows)].to(heads.device), factor)
