"""A detector's step at its fullest, in shapes that no image decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...data.batch import Batch
from ...models.cascade import STAGES
from ...models.drop_path import draw_paths

if TYPE_CHECKING:
    from ...models.vitdet import Detector


def fullest(method: Any, batch: Batch) -> Tensor:
    """A scalar whose forward and backward keep what a step of a `Detector` keeps with all its regions sampled.

    Which regions are proposed and matched depends on the images, how many are trained on does not: `regions` of each
    image for boxes, a quarter of them for masks. The matching itself is not counted.
    """
    detector: Detector = method
    heads, images = detector.heads, len(batch)
    draw_paths(detector.encoder.blocks, detector.seed, batch.epochs, batch.sample_ids)
    with detector.autocast():
        features = detector.features(detector.normalise(batch.images))
        found = [one for kind in detector.proposals.head(list(features.values())) for one in kind]
        for stage in range(len(STAGES) if heads.cascade else 1):
            box_head: Any = detector.regions.box_head[stage] if heads.cascade else detector.regions.box_head
            predictor: Any = detector.regions.box_predictor[stage] if heads.cascade else detector.regions.box_predictor
            found += predictor(box_head(_pooled(features["0"], images * heads.regions, 7)))
        if heads.masks:
            masks = _pooled(features["0"], images * heads.regions // 4, 14)
            regions: Any = detector.regions
            found.append(regions.mask_predictor(regions.mask_head(masks)))
    return torch.stack([one.float().sum() for one in found]).sum()


def _pooled(features: Tensor, regions: int, size: int) -> Tensor:
    """`regions` windows of maps, as region pooling cuts them out: new memory, with a gradient."""
    return features.flatten(2).sum(dim=(0, 2))[None, :, None, None].expand(regions, -1, size, size).clone()
