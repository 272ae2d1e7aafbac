"""Cascade R-CNN's heads on torchvision's parts: three stages of boxes, each from better ones than the stage before.

Cai and Vasconcelos, Cascade R-CNN: Delving into High Quality Object Detection, CVPR 2018; as ViTDet uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes

# Of each stage: the overlap from which a region is an object, and what offsets and log sizes are multiplied by.
STAGES = ((0.5, (10.0, 10.0, 5.0, 5.0)), (0.6, (20.0, 20.0, 10.0, 10.0)), (0.7, (30.0, 30.0, 15.0, 15.0)))


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied by `scale`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.scale, None


def stage_losses(logits: Tensor, deltas: Tensor, labels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `logits` `[n, classes + 1]`, and smooth L1 (β = 1/9) of class-agnostic `deltas` `[n, 4]`.

    Boxes count where `labels` `[n]` is an object, and are divided by all n, as torchvision does; 0 for no regions.
    """
    if not len(labels):
        return logits.sum() * 0, deltas.sum() * 0
    objects = torch.where(labels > 0)[0]
    of_boxes = F.smooth_l1_loss(deltas[objects], wanted[objects], beta=1 / 9, reduction="sum")
    return F.cross_entropy(logits, labels), of_boxes / len(labels)


class CascadeHeads(RoIHeads):
    """Three stages of class-agnostic boxes and one mask head, in the place of torchvision's `RoIHeads`.

    Stage k classifies and moves the boxes that stage k - 1 gave; scores are averaged over stages. Regions are sampled
    once, before the first stage. The features' gradient is divided by the number of stages.
    """

    def __init__(
        self,
        box_roi_pool: nn.Module,
        box_heads: Sequence[nn.Module],
        box_predictors: Sequence[nn.Module],
        samples: int,
        positive_share: float,
        **others: Any,
    ):
        first, weights = STAGES[0]
        super().__init__(
            box_roi_pool, nn.ModuleList(box_heads), nn.ModuleList(box_predictors), first, first, samples,
            positive_share, weights, **others,
        )  # fmt: skip
        self.matchers = [Matcher(overlap, overlap) for overlap, _ in STAGES]
        self.coders = [BoxCoder(weights) for _, weights in STAGES]

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As torchvision's: detections of each image in evaluation, losses by their names in training."""
        if not self.training:
            return self._detect(features, proposals, image_shapes), {}
        assert targets is not None, "training has targets"
        sampled, matched, labels, _ = self.select_training_samples(list(proposals), targets)
        losses = self._box_losses(features, sampled, image_shapes, targets)
        if self.has_mask():
            losses["loss_mask"] = self._mask_loss(features, sampled, matched, labels, image_shapes, targets)
        return [], losses

    def _stage(
        self, number: int, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Logits `[n, classes + 1]` and deltas `[n, 4]` of the regions of all images."""
        pooled = _Scaled.apply(self.box_roi_pool(features, boxes, shapes), 1 / len(self.coders))
        return self.box_predictor[number](self.box_head[number](pooled))  # pyright: ignore

    def refine(self, number: int, deltas: Tensor, boxes: list[Tensor], shapes: list[tuple[int, int]]) -> list[Tensor]:
        """The boxes of each image moved by the `deltas` `[n, 4]` of stage `number`, cut to the image; no gradient."""
        moved = self.coders[number].decode_single(deltas.detach(), torch.cat(boxes))
        parts = moved.split([len(one) for one in boxes])
        return [clip_boxes_to_image(part, shape) for part, shape in zip(parts, shapes, strict=True)]

    def assign(self, number: int, boxes: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of the regions `[n, 4]` of an image the labels of stage `number`, 0 for background, and their true boxes."""
        true, kinds = target["boxes"].to(boxes), target["labels"]
        if not len(true) or not len(boxes):
            return kinds.new_zeros(len(boxes)), boxes
        matched = self.matchers[number](box_iou(true, boxes))
        return kinds[matched.clamp(min=0)] * (matched >= 0), true[matched.clamp(min=0)]

    def _box_losses(
        self,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        losses = {}
        for number, coder in enumerate(self.coders):
            assigned = [self.assign(number, one, target) for one, target in zip(boxes, targets, strict=True)]
            labels, true = (torch.cat(parts) for parts in zip(*assigned, strict=True))
            logits, deltas = self._stage(number, features, boxes, shapes)
            wanted = coder.encode_single(true, torch.cat(boxes))
            of_classes, of_boxes = stage_losses(logits, deltas, labels, wanted)
            losses |= {f"loss_classifier_{number + 1}": of_classes, f"loss_box_reg_{number + 1}": of_boxes}
            if number < len(self.coders) - 1:
                refined = self.refine(number, deltas, boxes, shapes)
                boxes = [one[(one[:, 2:] > one[:, :2]).all(dim=1)] for one in refined]
        return losses

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> Tensor:
        """Of the objects among the sampled regions, as torchvision computes it."""
        objects = [torch.where(one > 0)[0] for one in labels]
        boxes = [one[chosen] for one, chosen in zip(boxes, objects, strict=True)]
        matched = [one[chosen] for one, chosen in zip(matched, objects, strict=True)]
        masks, kinds = [t["masks"] for t in targets], [t["labels"] for t in targets]
        return maskrcnn_loss(self._mask_logits(features, boxes, shapes), boxes, masks, kinds, matched)

    def _mask_logits(self, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]) -> Tensor:
        assert self.mask_roi_pool is not None and self.mask_head is not None and self.mask_predictor is not None
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, shapes)))

    def _detect(
        self, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        scores = 0.0
        for number in range(len(self.coders)):
            logits, deltas = self._stage(number, features, boxes, shapes)
            scores = scores + logits.softmax(dim=1) / len(self.coders)
            boxes = self.refine(number, deltas, boxes, shapes)
        assert isinstance(scores, Tensor)
        counts = [len(one) for one in boxes]
        found = [self._best(*pair) for pair in zip(boxes, scores.split(counts), strict=True)]
        if self.has_mask():
            logits = self._mask_logits(features, [one["boxes"] for one in found], shapes)
            masks = maskrcnn_inference(logits, [one["labels"] for one in found])
            for one, mask in zip(found, masks, strict=True):
                one["masks"] = mask
        return found

    def _best(self, boxes: Tensor, scores: Tensor) -> dict[str, Tensor]:
        """The detections of an image from its boxes `[n, 4]` and their `scores` `[n, classes + 1]`."""
        rows, kinds = torch.where(scores[:, 1:] > self.score_thresh)
        boxes, scores, labels = boxes[rows], scores[rows, kinds + 1], kinds + 1
        large = remove_small_boxes(boxes, min_size=1e-2)
        boxes, scores, labels = boxes[large], scores[large], labels[large]
        kept = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
        return {"boxes": boxes[kept], "labels": labels[kept], "scores": scores[kept]}
