"""Fine-tuning: the whole encoder and a linear head on pooled tokens (MAE, AdPE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .drop_path import draw_paths
from .method import IMAGENET_MEAN, IMAGENET_STD, Method
from .vit import Encoder, encoder_flops, norm_layer

POOLS = ("mean", "token")


class LabelledBatch(Protocol):
    """What `Classifier` reads of a batch: `labels` `[B]`, or soft ones in `truth` `[B, classes]`."""

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    epochs: Tensor
    truth: Tensor | list[dict[str, Tensor]] | None


class Classifier(Method):
    """An encoder with a linear head over `classes`, trained as a whole on the cross entropy.

    `pool="mean"` norms the mean of the patch tokens, which the encoder leaves as they are; `pool="token"` takes the
    normed class token. Raises ValueError for a class token that the encoder has not. `seed` keys its drop path.
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        pool: str = "mean",
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        super().__init__(encoder, mean, std)
        if pool not in POOLS:
            raise ValueError(f"method.classifier.pool={pool!r} is not known; choose one of {', '.join(POOLS)}.")
        if pool == "token" and not encoder.num_prefix_tokens:
            raise ValueError("method.classifier.pool=token, but this encoder has no class token; choose pool=mean.")
        self.pool, self.seed, self.classes = pool, seed, classes
        if pool == "mean":
            encoder.norm = nn.Identity()
            self.fc_norm = norm_layer()(encoder.num_features)
        self.head = nn.Linear(encoder.num_features, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def logits(self, images: Tensor) -> Tensor:
        """`[B, classes]` float32 of images `[B, C, H, W]`, uint8 or in 0…255."""
        with self.autocast():
            tokens = self.encoder(self.normalise(images))
            if self.pool == "token":
                pooled = tokens[:, 0]
            else:
                pooled = self.fc_norm(tokens[:, self.encoder.num_prefix_tokens :].mean(dim=1))
            return self.head(pooled).float()

    def objective(self, batch: LabelledBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean cross entropy with the batch's soft or hard labels, and the share of images that are right."""
        draw_paths(self.encoder.blocks, self.seed, batch.epochs, batch.sample_ids)
        logits = self.logits(batch.images)
        target = batch.truth if isinstance(batch.truth, Tensor) else batch.labels
        right = (logits.detach().argmax(dim=1) == batch.labels).float().mean()
        return F.cross_entropy(logits, target), {"accuracy": right}

    def classify(self, images: Tensor) -> Tensor:
        """Logits `[B, classes]` of uint8 images, with nothing dropped."""
        with self.evaluating(), torch.no_grad():
            return self.logits(images)

    def flops_per_image(self) -> float:
        """Floating-point operations of forward and backward for one image."""
        rows, columns = self.encoder.grid
        tokens = rows * columns + self.encoder.num_prefix_tokens
        return 3 * encoder_flops(self.encoder.size, tokens, self.encoder.relative)
