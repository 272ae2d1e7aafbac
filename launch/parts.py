"""What a run is made of, put together from its configuration without a word to the other ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.augment import Augment
from ..data.images import DataError, NoHeldOutImages, Source, TorchDataset, open_source
from ..data.loader import check_batch_sizes, epoch_length
from ..data.masks import Masks
from ..models.jepa import Jepa
from ..models.mae import Mae
from ..models.method import Method
from .build import adversary_schedules, build_augment, build_masks, build_method, build_schedules
from .config import Config
from .engine.precision import choose_precision
from .errors import UserError
from .optim import Schedules
from .world import World


@dataclass
class Parts:
    """Method, sources, masks, augmentation and schedules of a run, and how its batch divides."""

    method: Method
    train: Source
    val: Source | None
    masks: Any
    augment: Augment
    schedules: Schedules
    adversary_schedules: Schedules
    micro_batch: int
    accumulation: int
    steps_per_epoch: float
    steps: int
    workers: int
    precision_reason: str
    gflops_per_image: float


def assemble(config: Config, world: World, dataset: Any = None, val_dataset: Any = None) -> Parts:
    """Build the parts; raises UserError or DataError for everything in the configuration that cannot work."""
    method = build_method(config)
    masks, augment = build_masks(config, method.encoder.grid), build_augment(config)
    train, val = _sources(config, dataset, val_dataset)
    batch = config.optim.batch_size
    micro = config.loader.micro_batch or max(1, batch // world.size)  # by default the rank's whole share
    check_batch_sizes(len(train), batch, micro, world.size)
    method.compute_dtype, reason = choose_precision(config.engine.precision, world.device)
    length, accumulation = epoch_length(len(train), batch, config.data.remainder), batch // world.size // micro
    per_epoch = length / batch
    schedules = build_schedules(config, per_epoch, accumulation)
    first = masks(config.seed, 0, 0, np.arange(min(64, len(train))))
    return Parts(
        method=method, train=train, val=val, masks=masks, augment=augment,
        schedules=schedules, adversary_schedules=adversary_schedules(config, schedules),
        micro_batch=micro, accumulation=accumulation,
        steps_per_epoch=per_epoch, steps=length * config.optim.epochs // batch, workers=_workers(config, world),
        precision_reason=reason, gflops_per_image=_flops(method, first) / 1e9,
    )  # fmt: skip


def _flops(method: Method, masks: Masks) -> float:
    """Floating-point operations of a training step per image, for masks like these."""
    if isinstance(method, Jepa):
        assert masks.context is not None and masks.targets is not None
        (contexts, _, context), (blocks, _, target) = masks.context.shape, masks.targets.shape
        return method.flops_per_image(contexts, context, blocks, target)
    assert isinstance(method, Mae) and masks.visible is not None
    return method.flops_per_image(*masks.visible.shape[1:])


def _sources(config: Config, dataset: Any, val_dataset: Any) -> tuple[Source, Source | None]:
    channels, data = config.model.channels, config.data
    if dataset is not None:
        return TorchDataset(dataset, channels), TorchDataset(val_dataset, channels) if val_dataset is not None else None
    if data.path is None:
        raise UserError("Say where the images are: data.path=FOLDER, data.path=cifar10:FOLDER, or data.path=digits.")
    train = open_source(data.path, "train", channels, data.holdout)
    try:
        return train, open_source(data.val_path or data.path, "val", channels, data.holdout)
    except NoHeldOutImages:  # as configured: then nothing is probed
        return train, None
    except DataError as error:
        raise UserError(str(error).replace("data.path=", "data.val_path=") if data.val_path else str(error)) from error


def _workers(config: Config, world: World) -> int:
    """Loader processes of this rank: as configured, or the cores that its trainer leaves."""
    if config.loader.workers != "auto":
        return config.loader.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, max(0, cores // world.local_size - 1))
