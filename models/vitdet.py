"""ViTDet: a plain vision transformer with a simple feature pyramid, and torchvision's Mask R-CNN on top of it.

Li et al., Exploring Plain Vision Transformer Backbones for Object Detection, ECCV 2022.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from ..kernels.dispatch import Choice
from .cascade import STAGES, CascadeHeads
from .drop_path import draw_paths
from .method import IMAGENET_MEAN, IMAGENET_STD, Method
from .vit import Encoder
from .windows import attend_in_windows, global_blocks

_PASTED = 16  # masks that are brought to the size of the image at once


class TruthBatch(Protocol):
    """What `Detector` reads of a batch: images `[B, C, H, W]`, of each the objects, and what it is keyed by."""

    images: Tensor
    truth: Tensor | list[dict[str, Tensor]] | None
    sample_ids: Tensor
    epochs: Tensor
    step: int


@dataclass(frozen=True)
class Heads:
    """Sizes and thresholds of the detector's heads; the defaults are the published ones."""

    cascade: bool = False
    masks: bool = True
    width: int = 256  # channels of the pyramid and of all convolutions
    hidden: int = 1024  # of the box head's linear layer
    anchors: int = 256  # sampled per image for the proposals' loss
    regions: int = 512  # sampled per image for the boxes' loss
    proposals: tuple[int, int] = (2000, 1000)  # of each level before suppression, in training and testing
    kept: int = 1000  # after it
    score: float = 0.05  # detections below are dropped
    overlap: float = 0.5  # of two detections of a class, above which the weaker one is dropped
    detections: int = 100  # per image


def _exact(x: Tensor) -> Tensor:
    """`x` in float32, or float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


class SimplePyramid(nn.Module):
    """Maps at 4, 2, 1 and ½ times the resolution of the last one, each by itself, and a coarser one (ViTDet, fig. 2).

    `[B, D, rows, columns]` to five of `[B, width, …]` float32; for patches of 16 the strides are 4, 8, 16, 32 and 64.
    """

    def __init__(self, features: int, width: int):
        super().__init__()
        half, quarter = features // 2, features // 4
        scalers = [
            [nn.ConvTranspose2d(features, half, 2, 2), LayerNorm2d(half), nn.GELU(),
             nn.ConvTranspose2d(half, quarter, 2, 2)],
            [nn.ConvTranspose2d(features, half, 2, 2)],
            [],
            [nn.MaxPool2d(2)],
        ]  # fmt: skip
        self.levels = nn.ModuleList(
            nn.Sequential(
                *scaler,
                nn.Conv2d(channels, width, 1, bias=False), LayerNorm2d(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width),
            )
            for scaler, channels in zip(scalers, (quarter, half, features, features), strict=True)
        )  # fmt: skip

    def forward(self, features: Tensor) -> list[Tensor]:
        # In float32 whatever the method computes in: anchors take their type from here.
        maps = [_exact(level(features)) for level in self.levels]
        return [*maps, nn.functional.max_pool2d(maps[-1], 1, 2)]


class _ProposalHead(RPNHead):
    """torchvision's head of two convolutions, whose outputs stay float32: boxes in half precision lose their pixels."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return [_exact(one) for one in objectness], [_exact(one) for one in deltas]


class _Predictor(FastRCNNPredictor):
    """torchvision's predictor, outputs in float32, first weights as in ViTDet's."""

    def __init__(self, hidden: int, classes: int, agnostic: bool):
        super().__init__(hidden, classes + 1)
        if agnostic:
            self.bbox_pred = nn.Linear(hidden, 4)
        for linear, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return _exact(scores), _exact(deltas)


class _MaskPredictor(MaskRCNNPredictor):
    """torchvision's predictor, outputs in float32."""

    def forward(self, input: Tensor) -> Tensor:
        return _exact(super().forward(input))


def _region_pool(strides: Sequence[int], size: int) -> MultiScaleRoIAlign:
    """torchvision's pooling from maps of known strides.

    By itself it finds the strides from the first images that it sees, and wrongly where these fill a part of the
    padded input.
    """
    pool = MultiScaleRoIAlign([str(level) for level in range(len(strides))], size, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = LevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))
    return pool


def _proposal_network(strides: Sequence[int], heads: Heads) -> RegionProposalNetwork:
    """torchvision's, with anchors of 8 strides at every level in three shapes."""
    anchors = AnchorGenerator(tuple((8 * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides))
    head = _ProposalHead(heads.width, 3, conv_depth=2)
    before: dict[str, int] = dict(zip(("training", "testing"), heads.proposals, strict=True))
    after = dict.fromkeys(before, heads.kept)
    return RegionProposalNetwork(anchors, head, 0.7, 0.3, heads.anchors, 0.5, before, after, 0.7)


def _region_heads(strides: Sequence[int], classes: int, heads: Heads) -> RoIHeads:
    """Four convolutions and a linear layer for boxes, four convolutions for masks, with LayerNorm after each."""
    width, convolutions = heads.width, [heads.width] * 4

    def box_head() -> nn.Module:
        return FastRCNNConvFCHead((width, 7, 7), convolutions, [heads.hidden], norm_layer=LayerNorm2d)

    def predictor() -> nn.Module:
        return _Predictor(heads.hidden, classes, agnostic=heads.cascade)

    last = {"score_thresh": heads.score, "nms_thresh": heads.overlap, "detections_per_img": heads.detections}
    if heads.masks:
        masks = _MaskPredictor(width, width, classes + 1)
        nn.init.normal_(masks.mask_fcn_logits.weight, std=0.001)  # pyright: ignore
        mask_head = MaskRCNNHeads(width, convolutions, 1, norm_layer=LayerNorm2d)
        last |= {"mask_roi_pool": _region_pool(strides, 14), "mask_head": mask_head, "mask_predictor": masks}
    pool = _region_pool(strides, 7)
    if heads.cascade:
        stages = range(len(STAGES))
        return CascadeHeads(
            pool, [box_head() for _ in stages], [predictor() for _ in stages], heads.regions, 0.25, **last
        )
    return RoIHeads(pool, box_head(), predictor(), 0.5, 0.5, heads.regions, 0.25, None, **last)


class Detector(Method):
    """Boxes and masks of `classes` kinds of objects; label 0 is the background.

    All blocks but `spread` evenly placed ones attend in windows of `window` patches (0: none does). The encoder's last
    norm has no part in it, as published, and stays as it is. `seed` draws which anchors and regions the losses sample.
    Raises ValueError for an encoder with a class token, and for patches that are no power of two of at least 4.
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        heads: Heads | None = None,
        window: int = 14,
        spread: int = 4,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        compute_dtype: torch.dtype = torch.float32,
    ):
        super().__init__(encoder, mean, std, compute_dtype)
        if encoder.num_prefix_tokens:
            raise ValueError("A detector's encoder has no class token: set model.class_token=false.")
        patch = encoder.patch_size
        if patch < 4 or patch & (patch - 1):
            raise ValueError(f"A detector needs patches of 4, 8, 16, … pixels, not model.patch_size={patch}.")
        self.heads, self.classes, self.window, self.spread, self.seed = heads or Heads(), classes, window, spread, seed
        attend_in_windows(encoder.blocks, window, spread)
        encoder.norm.requires_grad_(False)
        strides = [patch // 4, patch // 2, patch, 2 * patch]
        self.pyramid = SimplePyramid(encoder.size.width, self.heads.width)
        self.proposals = _proposal_network([*strides, 4 * patch], self.heads)
        self.regions = _region_heads(strides, classes, self.heads)

    def kernel_choices(self, device: torch.device) -> dict[str, Choice]:
        found = super().kernel_choices(device)
        if self.encoder.relative is None:
            return found
        blocks, whole = self.encoder.blocks, global_blocks(len(self.encoder.blocks), self.spread)
        windows = [i for i in range(len(blocks)) if self.window and i not in whole]
        for name, numbers, grid in (
            ("relative attention", whole, self.encoder.grid),
            ("relative attention in windows", windows, (self.window, self.window)),
        ):
            if numbers:
                attention = blocks[numbers[0]].attn
                found[name] = attention.choose(grid, device, self.compute_dtype, "none")  # pyright: ignore
        return found

    def features(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """The pyramid's maps, finest first, of normalised images `[B, C, H, W]`."""
        last = self.encoder.forward_intermediates(images, indices=1, intermediates_only=True)[0]
        return OrderedDict((str(level), one) for level, one in enumerate(self.pyramid(last)))

    def objective(self, batch: TruthBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of all losses (a float32 scalar), and each of them, detached.

        Each `truth` has `boxes` `[n, 4]` (left, top, right, bottom in pixels), `labels` `[n]` from 1 on, and, where
        masks are learned, `masks` `[n, H, W]`. An image without boxes is background. Every parameter takes part
        whatever is found, so that ranks exchange the same gradients.
        """
        draw_paths(self.encoder.blocks, self.seed, batch.epochs, batch.sample_ids)
        assert isinstance(batch.truth, list), "a detector's batch says what is on each image"
        targets = [dict(one) for one in batch.truth]
        with self._drawn_for(batch), self.autocast():
            images = self.normalise(batch.images)
            features = self.features(images)
            canvas = ImageList(images, [tuple(images.shape[-2:])] * len(images))  # pyright: ignore
            proposals, of_proposals = self.proposals(canvas, features, targets)
            _, of_regions = self.regions(features, proposals, canvas.image_sizes, targets)
        losses = of_proposals | of_regions
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        return total, {name: loss.detach().float() for name, loss in losses.items()}

    @contextmanager
    def _drawn_for(self, batch: TruthBatch) -> Iterator[None]:
        """The context in which torch's own random numbers are a function of seed, step and samples alone."""
        key = repr((self.seed, batch.step, batch.sample_ids.tolist())).encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        devices = [batch.images.device] if batch.images.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield

    def predict(self, images: Tensor, filled: Tensor, sizes: Tensor) -> list[dict[str, Tensor]]:
        """What is found in images `[B, C, H, W]`, of which the upper left `filled` `[B, 2]` (height, width) is image.

        Boxes, scores, labels (from 1 on) and, where they are learned, masks `[n, height, width]` bool of each, in
        pixels of the images at their own `sizes` `[B, 2]`; best scores first.
        """
        with self.evaluating(), torch.no_grad(), self.autocast():
            normalised = self.normalise(images)
            features = self.features(normalised)
            inside = ImageList(normalised, [(height, width) for height, width in filled.tolist()])
            proposals, _ = self.proposals(inside, features)
            found, _ = self.regions(features, proposals, inside.image_sizes)
        for one, inner, size in zip(found, filled, sizes, strict=True):
            down, across = (size / inner).tolist()
            one["boxes"] = one["boxes"] * one["boxes"].new_tensor([across, down, across, down])
            if "masks" in one:
                height, width = size.tolist()
                pieces = zip(one["masks"].split(_PASTED), one["boxes"].split(_PASTED), strict=True)
                pasted = [paste_masks_in_image(part, boxes, (height, width))[:, 0] > 0.5 for part, boxes in pieces]
                one["masks"] = torch.cat(pasted) if pasted else one["masks"].new_zeros((0, height, width), dtype=bool)
        return found

    def flops_per_image(self) -> float:
        """Floating-point operations of one training step per image: backward as two forwards, heads' sampled parts."""
        rows, columns = self.encoder.grid
        tokens, width, size = rows * columns, self.heads.width, self.encoder.size
        whole = len(global_blocks(size.depth, self.spread)) if self.window else size.depth
        padded = math.prod(-(-side // self.window) * self.window for side in (rows, columns)) if self.window else 0
        linear = 2 * size.width**2 * (4 * tokens + 2 * size.mlp_ratio * tokens)
        terms = 4 + (2 * len(self.encoder.relative.terms) if self.encoder.relative else 0)
        total = size.depth * linear + whole * terms * tokens**2 * size.width
        total += (size.depth - whole) * terms * padded * self.window**2 * size.width
        total += 2 * tokens * self.encoder.channels * self.encoder.patch_size**2 * size.width
        places = tokens * (16 + 4 + 1 + 0.25)
        convolution = 2 * 9 * width**2
        total += places * convolution * 3 + 2 * tokens * size.width**2 * (2 + 2 + 1)
        stages = len(STAGES) if self.heads.cascade else 1
        total += stages * self.heads.regions * 49 * (4 * convolution + 2 * width * self.heads.hidden)
        if self.heads.masks:
            total += self.heads.regions / 4 * (196 * 4 * convolution + 784 * 2 * width**2)
        return 3.0 * total
