"""Settings of the tasks that are trained on labels: fine-tuning, segmentation, detection."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .setting_types import Count, Fraction, Positive, Range, Section


class ClassifierSection(Section):
    """Fine-tuning on classes."""

    classes: Count | None = None  # those of the images
    pool: Literal["mean", "token"] = "mean"  # of the patch tokens, or the class token


class SegmenterSection(Section):
    """UperNet on the encoder, for a class of every pixel."""

    classes: Count | None = None  # those of the data
    blocks: list[Annotated[int, Field(ge=0)]] | None = None  # four, for the pyramid; None: the last of each quarter
    channels: Count | None = None  # of the head; None: the encoder's width
    norm: Literal["group", "batch"] = "group"  # each image by itself, or over a micro-batch of all ranks (published)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of maps before a classifier
    auxiliary: Annotated[float, Field(ge=0)] = 0.4  # weight of the auxiliary head's loss; 0: no such head
    auxiliary_channels: Count = 256
    window: Annotated[int, Field(ge=0)] = 0  # patches; 0: all blocks attend globally, as published
    global_blocks: Count = 4  # that attend globally where others do in windows, evenly spread


class DetectorSection(Section):
    """Boxes and masks of objects: ViTDet and (Cascade) Mask R-CNN."""

    head: Literal["mask_rcnn", "cascade"] = "mask_rcnn"
    masks: bool = True  # False: boxes alone
    classes: Count | None = None  # those of the images
    window: Annotated[int, Field(ge=0)] = 14  # patches; 0: all blocks attend globally
    global_blocks: Count = 4  # that attend globally, evenly spread
    width: Count = 256  # channels of the pyramid and of the heads' convolutions
    hidden: Count = 1024  # of the box head's linear layer
    anchors: Count = 256  # sampled per image for the loss of proposals
    regions: Count = 512  # sampled per image for the loss of boxes
    score: Fraction = 0.05  # detections below are dropped
    overlap: Fraction = 0.5  # of two detections of a class, from which the weaker one is dropped
    detections: Count = 100  # per image


class MapsSection(Section):
    """Images with label maps: what ids mean, and how training views are made."""

    zero_is_ignored: bool = False  # 0 is no class, and class k has the id k + 1 (ADE20K)
    scale: tuple[Positive, Positive] | None = None  # long and short side at factor 1; None: 4 and 1 times the crop's
    resize: Range = (0.5, 2.0)  # factors of it
    most_of_one_class: Annotated[float, Field(gt=0, le=1)] = 0.75  # of a crop, unless ten tries find none
    distort: bool = True  # brightness, contrast, saturation, hue
