"""What follows from the images: their side, crops, patches, masks, and an encoder that is not too large for them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...data.pixel_moments import chosen, pixel_moments
from ...data.webdataset import Stream
from ...models.vit import SIZES
from ..build import build_masks, encoder_size
from ..config import Config
from ..errors import UserError, user_errors
from ..parts import open_sources
from . import rules
from .choices import Choice, Tuning

MEASURED = 512  # images


def of_data(found: Tuning, images: int | None, size: int | None, data: str | None) -> tuple[int, int | None]:
    """Images that there are, and the side to train at, both from the data where they are not given."""
    if images is not None and images < 1:
        raise UserError(f"--images {images} is no number of images; choose 1 or more.")
    if images is None or data:
        if not found.config.data.path:
            raise UserError("Say how many images there are: --images N, or --data PATH, which are counted.")
        with user_errors():
            source = open_sources(found.config, None, None)[0]
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
    with user_errors():
        seen = pixel_moments(source, places, threads=2)
    rule = f"of {len(seen.heights):,} images, each counting the same"
    mean, std = ([round(x, 4) for x in values] for values in (seen.mean, seen.std))
    found.decide("measured", rule, data__mean=mean, data__std=[max(1e-3, x) for x in std])
    if seen.unreadable:
        found.cautions.append(f"{len(seen.unreadable)} of {len(places)} images cannot be read: {seen.unreadable[0]}")
    middle = int(np.median([min(sides) for sides in zip(seen.heights, seen.widths, strict=True)]))
    own = side_of(found.base)
    if size is None and not found.is_given("model.image_size") and middle < own:
        # Not enlarged: a side that has several divisors, so that a patch fits.
        size = middle // 8 * 8 if middle >= 16 else middle
        found.measured_side = f"the images' shorter sides have a median of {middle}"
    return size


def _crops(config: Config) -> bool:
    """Whether crops of half the image's side are encoded, as MAE+ and AdPE do."""
    return config.method.kind == "mae_plus" and config.data.views > 1


def side_of(config: Config) -> int:
    """The side of the images that a recipe is meant for."""
    return config.model.image_size[0] * (2 if _crops(config) else 1)


def of_size(found: Tuning, size: int | None) -> int:
    """The side of the images; with another than the recipe's also crop, patch and masks."""
    base, crops = found.base, _crops(found.config)
    own = side_of(base)
    if size is None or size == own or found.is_given("model.image_size"):
        return side_of(found.config)
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
    kind = "measured" if found.measured_side else "given"
    found.decide(kind, f"{found.measured_side or f'--size {size}'}{half}", model__image_size=[crop, crop])
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
        rule = f"the same share of patches as {mask.context_keep} of {grid * grid}"
        found.decide("rule of thumb", rule, mask__context_keep=keep)
    if base.data.blur and crop <= rules.SMALLEST_BLURRED:
        found.decide("rule of thumb", f"radii up to 2 pixels leave little of {crop}", data__blur=0.0)
    build_masks(found.config, (now, now))  # UserError where blocks do not fit
    return size


def of_encoder(found: Tuning, images: int) -> None:
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
        rule = f"half of the encoder's {width}, as the published 384 of 768"
        found.decide("rule of thumb", rule, method__predictor__width=narrow)
    else:
        narrow, heads = rules.decoder_size(width, method.decoder.width)
        rule = f"two thirds of the encoder's {width} in heads of 32, as the published 512 of 768"
        found.decide("rule of thumb", rule, method__decoder__width=narrow, method__decoder__heads=heads)
