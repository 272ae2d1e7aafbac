"""From a configuration to the things that train: encoder, method, masks, augmentation, schedules, optimiser."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..data.augment import Augment
from ..data.label_mixing import RandAugmented
from ..data.masks import block_masks
from ..data.random_masks import RandomMasks
from ..kernels.dispatch import Choice
from ..models.adversary import Adversary
from ..models.classifier import Classifier
from ..models.jepa import Jepa, Predictor, Stop
from ..models.mae import Attack, Decoder, Mae
from ..models.method import IMAGENET_MEAN, IMAGENET_STD, Method
from ..models.relative import Relative
from ..models.segmenter import Segmenter
from ..models.vit import SIZES, Encoder, Size
from .config import TASKS, Config, Data, FreezeSection
from .errors import UserError, user_errors
from .optim import (
    Freeze,
    Schedules,
    decays,
    decays_in_adpe,
    decays_in_finetuning,
    mae_first_counter,
    make_optimizer,
    scaled_lr,
)


def pixel_statistics(data: Data, channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, of pixels in 0…1; UserError for a wrong number of them."""
    out = []
    for name, given, three, other in zip(
        ("mean", "std"), (data.mean, data.std), (IMAGENET_MEAN, IMAGENET_STD), (0.5, 0.25), strict=True
    ):
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


def encoder_size(config: Config) -> Size:
    """The size of the encoder: a named one with some numbers replaced."""
    given = {key: getattr(config.model, key) for key in ("width", "depth", "heads", "mlp_ratio")}
    return replace(SIZES[config.model.size], **{key: value for key, value in given.items() if value is not None})


def has_class_token(config: Config) -> bool:
    """Whether the encoder has a class token: as the method has it, unless the configuration says so."""
    return config.method.kind != "jepa" if config.model.class_token is None else config.model.class_token


def build_encoder(config: Config) -> Encoder:
    """The encoder of a configuration; UserError for sizes that do not fit together."""
    model, size = config.model, encoder_size(config)
    _check_width("model", size, model.positions)
    class_token = has_class_token(config)
    with user_errors():
        encoder = Encoder(
            model.image_size, model.patch_size, model.channels, size, positions=model.positions,
            class_token=class_token, relative=_relative(config), drop_path=model.drop_path,
            norm_eps=model.norm_eps, **_init(config),
        )  # fmt: skip
    pooled = config.method.kind == "classify" and config.method.classifier.pool == "mean"
    if pooled or config.method.kind == "segment":
        encoder.norm = nn.Identity()  # the classifier norms what it has pooled; the pyramid takes outputs of blocks
    return encoder


def _relative(config: Config) -> Relative | None:
    section = config.model.relative.model_dump()
    return Relative(**section) if section["terms"] != "none" else None


def _init(config: Config) -> dict[str, Any]:
    """What encoder, predictor and decoder have in common: layer norms and first weights."""
    model = config.model
    std = model.init_std if model.init == "normal" else None
    return {"norm": model.norm, "depth_scaled_init": model.depth_scaled_init, "init_std": std}


def build_method(config: Config) -> Method:
    """The method with fresh weights, which are a function of `seed`; UserError for sizes that do not fit together."""
    method = _build_method(config)
    for module in method.modules():
        if hasattr(module, "kernels"):
            setattr(module, "kernels", config.kernels)  # noqa: B010, for pyright takes a module's attributes for modules
    return method


def _build_method(config: Config) -> Method:
    torch.manual_seed(config.seed)
    encoder = build_encoder(config)
    mean, std = pixel_statistics(config.data, config.model.channels)
    if config.method.kind == "jepa":
        return _build_jepa(config, encoder, mean, std)
    if config.method.kind == "classify":
        section = config.method.classifier
        with user_errors():
            return Classifier(encoder, section.classes or 1000, section.pool, config.seed, mean, std)
    if config.method.kind == "segment":
        section = config.method.segmenter.model_dump()
        classes = section.pop("classes") or 150
        with user_errors():
            return Segmenter(encoder, classes, **section, seed=config.seed, mean=mean, std=std)
    if config.method.kind == "detect":
        return _build_detector(config, encoder, mean, std)
    visible_only = config.method.kind == "mae"
    section, relative = config.method.decoder, _relative(config)
    size = Size(section.width, section.depth, section.heads)
    _check_width("method.decoder", size, "sincos")
    adversary = config.method.adversary
    with user_errors():
        decoder = Decoder(
            encoder.size.width, encoder.grid, size, encoder.channels * encoder.patch_size**2, visible_only,
            encoder.num_prefix_tokens, relative=relative, **_init(config),
        )  # fmt: skip
    return Mae(
        encoder, decoder, visible_only=visible_only, mask_token=config.method.mask_token,
        attack=Attack(adversary.mode, adversary.where, adversary.per),
        normalise_pixels=config.method.normalise_pixels, mean=mean, std=std,
    )  # fmt: skip


def _build_jepa(config: Config, encoder: Encoder, mean: list[float], std: list[float]) -> Jepa:
    section = config.method.predictor
    size = Size(section.width, section.depth, section.heads or encoder.size.heads)
    _check_width("method.predictor", size, section.positions)
    layers = config.method.teacher.layers
    if layers > encoder.size.depth:
        raise UserError(
            f"method.teacher.layers={layers} is more than the {encoder.size.depth} layers of the encoder; lower it."
        )
    stop = Stop(**config.method.stop.model_dump())
    with user_errors():
        predictor = Predictor(
            encoder.size.width, encoder.grid, size, stop, config.method.mask_token, section.positions, **_init(config)
        )
    return Jepa(
        encoder, predictor, seed=config.seed, mean=mean, std=std,
        teacher_layers=layers, pairing=config.method.pairing,
    )  # fmt: skip


def _build_detector(config: Config, encoder: Encoder, mean: list[float], std: list[float]) -> Method:
    from ..models.vitdet import Detector, Heads  # torchvision's detectors take a second to import

    section = config.method.detector
    heads = Heads(
        cascade=section.head == "cascade", masks=section.masks, width=section.width, hidden=section.hidden,
        anchors=section.anchors, regions=section.regions, score=section.score, overlap=section.overlap,
        detections=section.detections,
    )  # fmt: skip
    with user_errors():
        return Detector(
            encoder, section.classes or 80, heads, section.window, section.global_blocks, config.seed, mean, std
        )


def choose_kernels(method: Method, device: torch.device) -> dict[str, Choice]:
    """What computes each hot path of the method on `device`; UserError where the configured kernels cannot."""
    with user_errors():
        return method.kernel_choices(device)


def build_adversary(config: Config, method: Method) -> Adversary | None:
    """The adversary of the configuration with its first tensors, a function of `seed`; None where there is none."""
    section = config.method.adversary
    if section.mode == "none" or not isinstance(method, Mae):
        return None
    torch.manual_seed(config.seed)
    optim = config.optim
    with user_errors():
        return Adversary(
            method.attack_tensors(), norm=section.norm, epsilon=section.epsilon, betas=optim.betas, eps=optim.eps,
            weight_decay=section.weight_decay,
        )  # fmt: skip


def build_masks(config: Config, grid: tuple[int, int]) -> Any:
    """The mask maker of the configuration, None for a task; UserError where its masks cannot fit the grid."""
    if config.method.kind in TASKS:
        return None
    section = config.mask.model_dump()
    ratio = section.pop("ratio")
    with user_errors():
        if config.method.kind != "jepa":
            return RandomMasks(grid, ratio, config.data.views)
        return block_masks(section.pop("setting"), grid=grid, **section)


def build_augment(config: Config, on_device: bool = False) -> Augment:
    """The training augmentation of the configuration, with flip, jitter, grey and blur in batches if `on_device`."""
    data = config.data
    given = {
        "size": config.model.image_size, "crop_scale": data.crop_scale, "crop_aspect": data.crop_aspect,
        "interpolation": data.interpolation, "flip": data.flip, "blur": data.blur, "grayscale": data.grayscale,
        "colour_jitter": data.colour_jitter, "views": data.views, "on_device": on_device,
    }  # fmt: skip
    with user_errors():
        if config.method.kind == "classify" and data.rand_augment:
            return RandAugmented(policy=data.rand_augment, **given)
        return Augment(**given)


def build_schedules(config: Config, steps_per_epoch: float, accumulation: int = 1) -> Schedules:
    """Learning rate, weight decay and momentum of every step; `accumulation` matters to `mae_micro` alone."""
    optim, teacher = config.optim, config.method.teacher
    first = {"stop": 1.0, "mae": 0.0, "mae_micro": mae_first_counter(accumulation), "poly": 0.0}[optim.schedule]

    def freeze(section: FreezeSection | None) -> Freeze | None:
        return Freeze(section.epoch, section.strategy) if section else None

    epochs = optim.epochs if optim.steps is None else optim.steps / steps_per_epoch
    warmup = optim.warmup_epochs if optim.warmup_steps is None else optim.warmup_steps / steps_per_epoch
    return Schedules(
        steps_per_epoch=steps_per_epoch, epochs=epochs, lr=optim.rate, start_lr=optim.start_lr,
        final_lr=optim.final_lr, warmup_epochs=warmup, weight_decay=optim.weight_decay,
        final_weight_decay=optim.final_weight_decay, momentum=teacher.momentum,
        final_momentum=teacher.final_momentum, stretch=optim.stretch,
        freeze_lr=freeze(optim.freeze_lr), freeze_weight_decay=freeze(optim.freeze_weight_decay),
        first_counter=first, whole_steps=optim.schedule == "stop",
        power=optim.power if optim.schedule == "poly" else None, drops=tuple(optim.drops),
    )  # fmt: skip


def adversary_schedules(config: Config, schedules: Schedules) -> Schedules:
    """The schedules of the adversary's learning rate: the method's around its own peak, or constant."""
    section = config.method.adversary
    return schedules.with_lr(scaled_lr(section.base_lr, config.optim.batch_size), section.schedule == "constant")


def build_optimizer(config: Config, method: nn.Module) -> Optimizer:
    """The optimiser of the configuration; UserError where it needs what this machine lacks."""
    optim, rule = config.optim, decays
    if optim.decay_all:
        rule = decays_in_finetuning if config.method.kind in TASKS else decays_in_adpe
    depth = encoder_size(config).depth
    with user_errors():
        return make_optimizer(method, optim.kind, optim.betas, optim.eps, rule, optim.layer_decay, depth)
