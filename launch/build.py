"""From a configuration to the things that train: encoder, method, masks, augmentation, schedules, optimiser."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.optim import Optimizer

from ..data.augment import Augment
from ..data.masks import block_masks
from ..models.jepa import Jepa, Predictor, Stop
from ..models.vit import SIZES, Encoder, Size
from .config import Config, Data, FreezeSection, Model
from .errors import UserError, user_errors
from .optim import Freeze, Schedules, make_optimizer

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pixel_statistics(data: Data, channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, of pixels in 0…1; UserError for a wrong number of them."""
    out = []
    for name, given, three, other in zip(("mean", "std"), (data.mean, data.std), IMAGENET, (0.5, 0.25), strict=True):
        values = list(given or (three if channels == 3 else [other]))
        if len(values) == 1:
            values *= channels
        if len(values) != channels:
            raise UserError(f"data.{name} has {len(values)} numbers for model.channels={channels}; give {channels}.")
        out.append(values)
    return out[0], out[1]


def _check_width(section: str, size: Size, positions: str) -> None:
    if size.width % size.heads:
        raise UserError(
            f"{section}.width={size.width} is not divisible by {section}.heads={size.heads}; change one of them."
        )
    if size.width % 4 and positions != "learned":
        raise UserError(f"{section}.width={size.width} is not a multiple of 4, as sin-cos positions need; change it.")


def build_encoder(model: Model) -> Encoder:
    """The encoder of a `model` section; UserError for sizes that do not fit together."""
    given = {key: getattr(model, key) for key in ("width", "depth", "heads", "mlp_ratio")}
    size = replace(SIZES[model.size], **{key: value for key, value in given.items() if value is not None})
    _check_width("model", size, model.positions)
    with user_errors():
        return Encoder(
            model.image_size, model.patch_size, model.channels, size,
            positions=model.positions, norm=model.norm, depth_scaled_init=model.depth_scaled_init,
            init_std=model.init_std,
        )  # fmt: skip


def build_method(config: Config) -> Jepa:
    """The method with fresh weights, which are a function of `seed`."""
    torch.manual_seed(config.seed)
    encoder, section = build_encoder(config.model), config.method.predictor
    size = Size(section.width, section.depth, section.heads or encoder.size.heads)
    _check_width("method.predictor", size, section.positions)
    layers = config.method.teacher.layers
    if layers > encoder.size.depth:
        raise UserError(
            f"method.teacher.layers={layers} is more than the {encoder.size.depth} layers of the encoder; lower it."
        )
    mean, std = pixel_statistics(config.data, config.model.channels)
    stop = Stop(**config.method.stop.model_dump())
    with user_errors():
        predictor = Predictor(
            encoder.size.width, encoder.grid, size, stop, config.method.mask_token,
            section.positions, config.model.norm, config.model.depth_scaled_init, config.model.init_std,
        )  # fmt: skip
    return Jepa(
        encoder, predictor, seed=config.seed, mean=mean, std=std,
        teacher_layers=layers, pairing=config.method.pairing,
    )  # fmt: skip


def build_masks(config: Config, grid: tuple[int, int]):
    """The mask maker of the configuration; UserError where its masks cannot fit the grid."""
    section = config.mask.model_dump()
    with user_errors():
        return block_masks(section.pop("setting"), grid=grid, **section)


def build_augment(config: Config) -> Augment:
    """The training augmentation of the configuration."""
    data = config.data
    with user_errors():
        return Augment(
            size=config.model.image_size, crop_scale=data.crop_scale, crop_aspect=data.crop_aspect,
            interpolation=data.interpolation, flip=data.flip, blur=data.blur, grayscale=data.grayscale,
            colour_jitter=data.colour_jitter,
        )  # fmt: skip


def build_schedules(config: Config, steps_per_epoch: int) -> Schedules:
    """Learning rate, weight decay and momentum of every step."""
    optim, teacher = config.optim, config.method.teacher

    def freeze(section: FreezeSection | None) -> Freeze | None:
        return Freeze(section.epoch, section.strategy) if section else None

    return Schedules(
        steps_per_epoch=steps_per_epoch, epochs=optim.epochs, lr=optim.lr, start_lr=optim.start_lr,
        final_lr=optim.final_lr, warmup_epochs=optim.warmup_epochs, weight_decay=optim.weight_decay,
        final_weight_decay=optim.final_weight_decay, momentum=teacher.momentum,
        final_momentum=teacher.final_momentum, stretch=optim.stretch,
        freeze_lr=freeze(optim.freeze_lr), freeze_weight_decay=freeze(optim.freeze_weight_decay),
    )  # fmt: skip


def build_optimizer(config: Config, method: nn.Module) -> Optimizer:
    """The optimiser of the configuration; UserError where it needs what this machine lacks."""
    with user_errors():
        return make_optimizer(method, config.optim.kind, config.optim.betas, config.optim.eps)
