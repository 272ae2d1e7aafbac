"""Semantic segmentation: a pre-trained encoder under UperNet, with an auxiliary head, trained as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.stochastic_positions import position_noise
from .drop_path import BLOCK, draw_paths
from .method import IMAGENET_MEAN, IMAGENET_STD, Method
from .upernet import Pyramid, UperHead, convolution, resized
from .vit import Encoder, encoder_flops
from .windows import attend_in_windows

IGNORED = 255  # the label of pixels that count nowhere
_DROPOUT = BLOCK + 1  # the block number of the heads' draws, after that of drop path


class LabelledMaps(Protocol):
    """What `Segmenter` reads of a batch: images, and label maps in `truth` `[B, H, W]` int64."""

    images: Tensor
    sample_ids: Tensor
    epochs: Tensor
    truth: Tensor | list[dict[str, Tensor]] | None


def quarters(depth: int) -> list[int]:
    """The blocks that the pyramid takes: those published for 12 and 24 blocks, else the last of each quarter."""
    known = {12: [3, 5, 7, 11], 24: [7, 11, 15, 23]}
    return known.get(depth) or [max(0, round(depth * part / 4) - 1) for part in (1, 2, 3, 4)]


class Segmenter(Method):
    """An encoder under UperNet, trained on the cross entropy of every pixel (BEiT, MAE: the ADE20K recipe).

    `blocks` are the four depths of the pyramid (None: `quarters`), `channels` the heads' width (None: the encoder's),
    `norm` is batch (over all ranks) or group, `dropout` the share of feature maps dropped before a classifier,
    `auxiliary` the weight of a second head's loss on the third depth (0: no such head). Intermediate outputs enter
    without the encoder's last norm, which is left out. All blocks but `global_blocks` evenly spread ones attend in
    windows of `window` patches (0: none does). `seed` keys what is dropped. Raises ValueError for what does not fit
    together.
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        blocks: Sequence[int] | None = None,
        channels: int | None = None,
        norm: str = "batch",
        dropout: float = 0.1,
        auxiliary: float = 0.4,
        auxiliary_channels: int = 256,
        window: int = 0,
        global_blocks: int = 4,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        super().__init__(encoder, mean, std)
        depth, width = len(encoder.blocks), encoder.num_features
        self.depths = list(blocks) if blocks is not None else quarters(depth)
        if (
            len(self.depths) != 4
            or self.depths != sorted(self.depths)
            or not 0 <= self.depths[0] <= self.depths[3] < depth
        ):
            raise ValueError(
                f"method.segmenter.blocks={self.depths}: name four of the blocks 0 … {depth - 1}, ascending."
            )
        self.classes, self.dropout, self.auxiliary, self.seed = classes, dropout, auxiliary, seed
        if window and encoder.num_prefix_tokens:
            raise ValueError(
                f"method.segmenter.window={window} has no place for a class token: set model.class_token=false, or "
                "window=0."
            )
        attend_in_windows(encoder.blocks, window, global_blocks)
        encoder.norm = nn.Identity()
        for block in encoder.blocks[self.depths[3] + 1 :]:  # they come to nothing
            block.requires_grad_(False)
        channels = channels or width
        self.pyramid = Pyramid(width, norm)
        self.head = UperHead(width, channels, norm)
        self.classifier = nn.Conv2d(channels, classes, 1)
        self.auxiliary_head = convolution(width, auxiliary_channels, 3, norm) if auxiliary else None
        self.auxiliary_classifier = nn.Conv2d(auxiliary_channels, classes, 1) if auxiliary else None
        for layer in (self.classifier, self.auxiliary_classifier):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)  # pyright: ignore

    def maps(self, images: Tensor) -> list[Tensor]:
        """The pyramid of images `[B, C, H, W]`, uint8 or in 0…255: four of `[B, D, ·, ·]`, finest first."""
        depths = sorted(set(self.depths))
        found: list = self.encoder.forward_intermediates(  # pyright: ignore
            self.normalise(images), depths, intermediates_only=True, stop_early=True
        )
        return self.pyramid([found[depths.index(depth)] for depth in self.depths])

    def logits(self, images: Tensor, batch: LabelledMaps | None = None) -> list[Tensor]:
        """`[B, classes, H, W]` float32 of the head and, in training on `batch`, of the auxiliary head."""
        with self.autocast():
            maps = self.maps(images)
            found = [self.classifier(self._dropped(self.head(maps), batch, 0))]
            if batch is not None and self.auxiliary_head is not None and self.auxiliary_classifier is not None:
                found.append(self.auxiliary_classifier(self._dropped(self.auxiliary_head(maps[2]), batch, 1)))
        return [resized(one.float(), images.shape[-2:]) for one in found]

    def _dropped(self, features: Tensor, batch: LabelledMaps | None, head: int) -> Tensor:
        """Whole maps of `[B, C, h, w]` dropped in training, the others enlarged; which ones is keyed by sample."""
        if batch is None or not self.training or not self.dropout:
            return features
        block = torch.full_like(batch.sample_ids, _DROPOUT)
        place = torch.full_like(batch.sample_ids, head)[:, None]
        noise = position_noise(self.seed, batch.epochs, batch.sample_ids, block, place, features.shape[1])[:, 0]
        kept = (torch.special.ndtr(noise) >= self.dropout).to(features.dtype) / (1 - self.dropout)
        return features * kept[:, :, None, None]

    def objective(self, batch: LabelledMaps) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the head and `auxiliary` times that of the second one; and the share of pixels that are right.

        A loss is summed over the labelled pixels and divided by all, as published: then it is the same however a
        batch is divided, and 0 without a labelled pixel.
        """
        truth = batch.truth
        assert isinstance(truth, Tensor)
        draw_paths(self.encoder.blocks, self.seed, batch.epochs, batch.sample_ids)
        found = self.logits(batch.images, batch)
        losses = [F.cross_entropy(one, truth, ignore_index=IGNORED, reduction="sum") / truth.numel() for one in found]
        known = truth != IGNORED
        right = ((found[0].detach().argmax(dim=1) == truth) & known).sum() / known.sum().clamp(min=1)
        scalars = {"pixel_accuracy": right}
        if len(losses) == 1:
            return losses[0], scalars
        scalars |= {"loss_head": losses[0].detach(), "loss_auxiliary": losses[1].detach()}
        return losses[0] + self.auxiliary * losses[1], scalars

    def predict(self, images: Tensor) -> Tensor:
        """Logits `[B, classes, H, W]` float32 of images, uint8 or in 0…255, with nothing dropped."""
        with self.evaluating(), torch.no_grad():
            return self.logits(images)[0]

    def flops_per_image(self) -> float:
        """Floating-point operations of forward and backward for one image, but for what is below a per cent."""
        rows, columns = self.encoder.grid
        tokens, width = rows * columns + self.encoder.num_prefix_tokens, self.encoder.num_features
        sizes = [(4 * rows, 4 * columns), (2 * rows, 2 * columns), (rows, columns), (-(-rows // 2), -(-columns // 2))]
        found = encoder_flops(self.encoder.size, tokens, self.encoder.relative) + self.head.flops(sizes)
        found += 2.0 * width**2 * rows * columns * (4 + 16 + 4)  # transposed convolutions: each output from one input
        found += 2.0 * self.classes * self.classifier.in_channels * 16 * rows * columns
        if self.auxiliary_head is not None:
            found += 2.0 * rows * columns * sum(p.numel() for p in self.auxiliary_head.parameters() if p.ndim == 4)
        return 3 * found
