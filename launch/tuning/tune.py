"""A recipe fitted to a user's images and GPUs, one setting after another, each with the rule it comes from."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ...data.images import DataError
from ...data.order import epoch_length
from ...data.pixel_moments import chosen, pixel_moments
from ...data.webdataset import Stream
from ...models.vit import SIZES
from ..build import build_masks, encoder_size
from ..config import SHORT_NAMES, Config, load_config, overridden, recipe_names, refuse_task
from ..errors import UserError
from ..parts import open_sources
from ..planning.memory import divide
from ..planning.plan import CIFAR10, IMAGENET, Place, most_dividing, most_images, open_case, plan
from . import rules

Kind = Literal["given", "measured", "published", "planned", "rule of thumb"]
LENGTHS = ("between", "samples", "epochs")
MEASURED = 512  # images


@dataclass(frozen=True)
class Choice:
    """A setting: its value, the recipe's, where the rule comes from, and the rule."""

    key: str
    value: Any
    before: Any
    kind: Kind
    rule: str


@dataclass
class Tuned:
    """What `tune` returns: the configuration, each choice, cautions, and what `elsewhere plan` says of it."""

    recipe: str
    images: int
    size: int
    config: Config
    choices: list[Choice]
    cautions: list[str]
    plan: dict[str, Any]


@dataclass
class Tuning:
    """A recipe on its way: what the user set stays, what is decided is remembered with its rule."""

    recipe: str
    base: Config
    config: Config
    given: list[str]
    choices: list[Choice] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)

    def is_given(self, key: str) -> bool:
        return any(key == one or key.startswith(one + ".") or one.startswith(key + ".") for one in self.given)

    def decide(self, kind: Kind, rule: str, **values: Any) -> None:
        """Set `values` (`optim__lr=…`), unless the user did."""
        for name, value in values.items():
            key = name.replace("__", ".")
            before = _at(self.base, key)
            if self.is_given(key):
                self.choices.append(Choice(key, _at(self.config, key), before, "given", "as you set it"))
                continue
            self.config = overridden(self.config.to_dict(), {key: value}, f"of {self.recipe}", Config.model_validate)
            self.choices.append(Choice(key, value, before, kind, rule))


def _at(config: Config, key: str) -> Any:
    found: Any = config.to_dict()
    for name in key.split("."):
        found = found[name] if found is not None else None
    return found


def tune(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    gpus: int,
    gpu: str = "h100-80g",
    images: int | None = None,
    size: int | None = None,
    data: str | None = None,
    length: str = "between",
) -> Tuned:
    """Fit `recipe` to `images` images (or those of `data`, which are then measured) and `gpus` GPUs.

    Settings in `overrides` stay as they are, and the others are fitted to them. `size` is the side of the images in
    pixels, `length` one of `LENGTHS`. Raises UserError for what cannot be trained, divided or counted.
    """
    found = _open(recipe, overrides, data)
    images, size = _of_data(found, images, size, data)
    if gpus < 1:
        raise UserError(f"--gpus {gpus} is no number of GPUs; choose 1 or more.")
    side = _of_size(found, size)
    _of_encoder(found, images)
    published = _published_images(recipe, found.base)
    _of_length(found, images, published, length)
    _of_batch(found, images, gpus, gpu)
    _of_rate(found)
    steps = _steps(found.config, images)
    if found.config.method.kind == "jepa":
        _of_teacher(found, steps)
    _of_warmup(found, steps)
    _of_calendar(found)
    result = plan(recipe, found.config, Place(gpus, gpu), images=images, scales=(), policies=())
    found.decide("given", "images and GPUs it was fitted to", about=_about(found, images, side))
    return Tuned(recipe, images, side, found.config, found.choices, found.cautions, result)


def _open(recipe: str, overrides: Sequence[str], data: str | None) -> Tuning:
    base = load_config(recipe)
    refuse_task(base, "`elsewhere tune`")
    if recipe.startswith("published/"):
        name = recipe.partition("/")[2]
        near = name if name in recipe_names() else next(iter(difflib.get_close_matches(name, recipe_names(), 1)), name)
        raise UserError(
            f"{recipe} repeats what was published, to the micro-batch, and would not with other numbers: tune {near}."
        )
    if base.optim.steps is not None:
        raise UserError(f"{recipe} counts steps (optim.steps), which do not scale with images: give it optim.epochs.")
    config = load_config(recipe, [*overrides, *([f"data.path={data}"] if data else [])])
    keys = [SHORT_NAMES.get(key, key) for key in (item.partition("=")[0] for item in overrides)]
    if "optim.steps" in keys:
        raise UserError("elsewhere tune chooses optim.epochs: leave optim.steps out, and set it when you train.")
    return Tuning(recipe, base, config, keys)


def _of_data(found: Tuning, images: int | None, size: int | None, data: str | None) -> tuple[int, int | None]:
    """Images that there are, and the side to train at, both from the data where they are not given."""
    if images is not None and images < 1:
        raise UserError(f"--images {images} is no number of images; choose 1 or more.")
    if images is None or data:
        if not found.config.data.path:
            raise UserError("Say how many images there are: --images N, or --data PATH, which are counted.")
        try:
            source = open_sources(found.config, None, None)[0]
        except DataError as error:
            raise UserError(str(error)) from error
        if isinstance(source, Stream):
            raise UserError("Streamed shards are not measured: leave --data out, give --images, and data.path=URL.")
        counted = len(source)
        if data:
            found.choices.append(
                Choice("data.path", data, found.base.data.path, "given", f"{counted:,} images to train")
            )
            size = _measure(found, source, size)
        images = images or counted
    return images, size


def _measure(found: Tuning, source: Any, size: int | None) -> int | None:
    places = chosen(len(source), MEASURED)
    try:
        seen = pixel_moments(source, places, threads=2)
    except DataError as error:
        raise UserError(str(error)) from error
    rule = f"of {len(seen.heights):,} images, each counting the same"
    found.decide(
        "measured", rule, data__mean=[round(x, 4) for x in seen.mean], data__std=[max(1e-3, round(x, 4)) for x in seen.std]
    )  # fmt: skip
    if seen.unreadable:
        found.cautions.append(f"{len(seen.unreadable)} of {len(places)} images cannot be read: {seen.unreadable[0]}")
    middle = int(np.median([min(sides) for sides in zip(seen.heights, seen.widths, strict=True)]))
    own = _side(found.base)
    if size is None and not found.is_given("model.image_size") and middle < own:
        # Not enlarged: a side that has several divisors, so that a patch fits.
        size = middle // 8 * 8 if middle >= 16 else middle
        found.cautions.append(f"the shorter side of the images is {middle} pixels (median), so --size {size}")
    return size


def _crops(config: Config) -> bool:
    """Whether crops of half the image's side are encoded, as MAE+ and AdPE do."""
    return config.method.kind == "mae_plus" and config.data.views > 1


def _side(config: Config) -> int:
    """The side of the images that a recipe is meant for."""
    return config.model.image_size[0] * (2 if _crops(config) else 1)


def _of_size(found: Tuning, size: int | None) -> int:
    """The side of the images; with another than the recipe's also crop, patch and masks."""
    base, crops = found.base, _crops(found.config)
    own = _side(base)
    if size is None or size == own or found.is_given("model.image_size"):
        return _side(found.config)
    if base.model.image_size[0] != base.model.image_size[1]:
        raise UserError("--size is for square images: set model.image_size and model.patch_size instead.")
    if not 4 <= size <= 4096:
        raise UserError(f"--size {size} is out of range: choose 4 to 4096 pixels.")
    crop, patch = size // 2 if crops else size, base.model.patch_size
    grid = base.model.image_size[0] // patch
    best = rules.nearest_patch(crop, patch, grid)
    if best is None:
        step = 2 if crops else 1
        near = [s for s in range(size - 16 * step, size + 17 * step, step) if s >= 4]
        near = sorted((s for s in near if rules.nearest_patch(s // step, patch, grid)), key=lambda s: abs(s - size))
        raise UserError(
            f"No patch divides {crop} pixels into about {grid}×{grid}: take --size {' or '.join(map(str, near[:2]))}."
        )
    half = f"; crops of half the image's side, as the published {own // 2} of {own}" if crops else ""
    found.decide("given", f"--size {size}{half}", model__image_size=[crop, crop])
    if found.is_given("model.patch_size"):
        best = found.config.model.patch_size
    now, rest = divmod(crop, best)
    if rest:
        raise UserError(f"model.patch_size={best} does not divide {crop} pixels: leave it out, or choose a divisor.")
    more = f"of the divisors of {crop} the nearest to the recipe's {grid}×{grid} patches, none above {patch}"
    found.decide("rule of thumb", f"{now}×{now} patches: {more}", model__patch_size=best)
    mask = base.mask
    if base.method.kind == "jepa" and mask.context_keep:
        keep = rules.share_of_patches(mask.context_keep, now * now, grid * grid)
        found.decide(
            "published", f"the same share of patches as {mask.context_keep} of {grid * grid}", mask__context_keep=keep
        )
    if base.data.blur and crop <= rules.SMALLEST_BLURRED:
        found.decide("rule of thumb", f"radii up to 2 pixels leave little of {crop}", data__blur=0.0)
    build_masks(found.config, (now, now))  # UserError where blocks do not fit
    return size


def _of_encoder(found: Tuning, images: int) -> None:
    """A smaller encoder for few images, and predictor or decoder with it."""
    model = found.base.model
    size = rules.encoder_for(images, model.size)
    if any((model.width, model.depth, model.heads)) or size == model.size:
        few = images < max(rules.IMAGES_FOR.values())
        if few and model.size in ("large", "huge", "giant"):
            found.cautions.append(f"a ViT-{model.size} for {images:,} images: large ones overfit; see the ViT-B recipe")
        return
    most = rules.IMAGES_FOR[size]
    found.decide(
        "rule of thumb", f"fewer than {most:,} images; model.size={model.size} keeps the recipe's", model__size=size
    )
    width, method = encoder_size(found.config).width, found.base.method
    if width >= SIZES[model.size].width:
        return
    if method.kind == "jepa":
        narrow = rules.predictor_width(width, method.predictor.width)
        found.decide("published", f"half of the encoder's {width}, as 384 of 768", method__predictor__width=narrow)
    else:
        narrow, heads = rules.decoder_size(width, method.decoder.width)
        rule = f"two thirds of the encoder's {width} in heads of 32, as the published 512 of 768"
        found.decide("rule of thumb", rule, method__decoder__width=narrow, method__decoder__heads=heads)


def _published_images(recipe: str, base: Config) -> int:
    """Images of the epochs that a recipe counts."""
    if base.data.path == "digits":
        return len(open_sources(base, None, None)[0])
    return CIFAR10 if recipe.startswith("cifar10") else IMAGENET


def _of_length(found: Tuning, images: int, published: int, length: str) -> None:
    epochs = found.base.optim.epochs
    now = rules.epochs_for(images, epochs, published, length)
    seen, before = now * images, epochs * published
    shown = f"{_millions(seen)} images seen, the recipe {_millions(before)} ({epochs} × {published:,})"
    if length == "epochs" or now == epochs:
        rule, kind = f"as many epochs as the recipe; {shown}", "published"
    elif length == "samples":
        rule, kind = f"as many images seen as the recipe; {shown}", "published"
    elif images >= published:
        rule, kind = f"more images than the recipe's, as many seen; {shown}", "rule of thumb"
    else:
        rule, kind = f"geometric mean of as many epochs and as many images seen (--length); {shown}", "rule of thumb"
    found.decide(kind, rule, optim__epochs=now)


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f} M" if count < 1e8 else f"{count / 1e6:,.0f} M"


def _of_batch(found: Tuning, images: int, gpus: int, gpu: str) -> None:
    """Batch, micro-batch and activation checkpointing, by what the plan says that the GPUs hold."""
    published = found.base.optim.batch_size
    own = found.config.engine.activation_checkpointing
    case = open_case(found.config, gpu, images, found.recipe)
    for policy in dict.fromkeys((own, *(("selective", "full") if not found.is_given("engine") else ()))):
        fits = most_images(case, divide(found.config, gpus, 1, 1), policy)
        if gpus * fits >= min(published, rules.LEAST_BATCH):
            break
    else:
        policy = policy if fits else own
    if not fits:
        raise UserError(
            f"Not one image fits a {gpu}: divide the weights (engine.kind=fsdp), or take larger or more GPUs."
        )
    if policy != own:
        rule = f"without it a {gpu} does not hold {rules.LEAST_BATCH} images among {gpus}"
        found.decide("planned", rule, engine__activation_checkpointing=policy)
    batch = rules.batch_for(published, images, gpus, fits)
    if batch is None:
        raise UserError(
            f"{images} images are too few for {gpus} GPU{'s' * (gpus > 1)}: an epoch of {rules.STEPS_AN_EPOCH} steps leaves "
            f"{images // rules.STEPS_AN_EPOCH} a step; take fewer GPUs, or more images."
        )
    rule = (
        f"the largest {gpus} × 2^k of at most the recipe's {published}, an eighth of the images ({images // 8:,}), and "
        f"what {gpus} × {gpu} hold at once ({gpus} × {fits} by elsewhere plan) or {rules.LEAST_BATCH}"
    )
    found.decide("published" if batch == published else "rule of thumb", rule, optim__batch_size=batch)
    batch = found.config.optim.batch_size
    if batch > images or batch % gpus:
        why = f"{gpus} GPUs do not divide it" if batch % gpus else f"there are {images} images"
        raise UserError(f"optim.batch_size={batch} is not possible: {why}; choose another, or leave it out.")
    share = batch // gpus
    usable = most_dividing(case, gpus, share, policy)
    if usable < share or found.is_given("loader.micro_batch"):
        rule = f"the largest that divides a GPU's {share} and fits, by elsewhere plan; the result stays the same"
        found.decide("planned", rule, loader__micro_batch=usable or None)


def _of_rate(found: Tuning) -> None:
    optim, before = found.config.optim, found.base.optim
    factor = optim.batch_size / before.batch_size
    if before.base_lr is not None:
        rule = f"per 256 images (MAE, AdPE), so {optim.batch_size} make a peak of {rules.rounded(optim.rate):g}"
        found.decide("published", rule, optim__base_lr=before.base_lr)
        attack = found.base.method.adversary
        if attack.mode != "none":
            rule = f"per 256 images as well: {rules.rounded(attack.base_lr * optim.batch_size / 256):g}"
            found.decide("published", rule, method__adversary__base_lr=attack.base_lr)
        return
    kind = "published" if factor == 1 else "rule of thumb"
    for name in ("lr", "start_lr", "final_lr"):
        rate = getattr(before, name)
        rule = f"{rate:g} × {optim.batch_size} / {before.batch_size}: linear in the batch, as MAE and AdPE publish it"
        rule = rule if factor != 1 else f"of a batch of {before.batch_size}"
        found.decide(kind, rule, **{f"optim__{name}": rules.rounded(factor * rate)})


def _steps(config: Config, images: int) -> int:
    """Optimiser steps of the whole run."""
    batch = config.optim.batch_size
    return max(1, epoch_length(images, batch, config.data.remainder) * config.optim.epochs // batch)


def _of_teacher(found: Tuning, steps: int) -> None:
    before, batch, published = (
        found.base.method.teacher.momentum,
        found.config.optim.batch_size,
        found.base.optim.batch_size,
    )
    scaled = rules.scaled_momentum(before, batch, published)
    value = rules.teacher_momentum(before, batch, published, steps)
    rule, kind = f"{before:g} ^ ({batch} / {published}), the EMA scaling rule (Busbridge et al. 2023)", "published"
    if value != scaled:
        kind = "rule of thumb"
        rule += f" would be {_near_one(scaled):g}: over a tenth of the {steps:,} steps the teacher forgets its start"
    found.decide(kind, rule, method__teacher__momentum=_near_one(value))


def _near_one(value: float) -> float:
    return round(1 - rules.rounded(1 - value), 9)


def _of_warmup(found: Tuning, steps: int) -> None:
    optim, before = found.config.optim, found.base.optim
    share = before.warmup_epochs / before.epochs
    count = rules.warmup_steps(steps, share, optim.betas[1])
    rule, kind = f"{count:,.0f} of {steps:,} steps, the recipe's share of {share:.3g}", "published"
    if count < share * steps or count > share * steps:
        kind = "rule of thumb"
        rule = (
            f"{count:,.0f} of {steps:,} steps: what Adam asks for, 2 / (1 - β₂) (Ma and Yarats 2021), a fifth at most"
        )
    found.decide(kind, rule, optim__warmup_epochs=rules.rounded(count / steps * optim.epochs))


def _of_calendar(found: Tuning) -> None:
    """What is counted in epochs and stands for a share of the run."""
    factor, before = found.config.optim.epochs / found.base.optim.epochs, found.base
    for name in ("freeze_lr", "freeze_weight_decay"):
        freeze = getattr(before.optim, name)
        if freeze is not None:
            rule = f"the same part of the run as epoch {freeze.epoch:g} of {before.optim.epochs}"
            value = {"epoch": rules.rounded(freeze.epoch * factor), "strategy": freeze.strategy}
            found.decide("published", rule, **{f"optim__{name}": value})
    for key, every in (
        ("checkpoint.keep_every_epochs", before.checkpoint.keep_every_epochs),
        ("probe.every_epochs", before.probe.every_epochs),
    ):
        if every and factor != 1:
            rule = f"as often in the run as every {every} of {before.optim.epochs}"
            found.decide("rule of thumb", rule, **{key.replace(".", "__"): max(1, round(every * factor))})


def _about(found: Tuning, images: int, side: int) -> str:
    return f"{found.recipe} tuned: {found.config.optim.epochs} epochs of {images:,} images of {side} pixels"
