"""A recipe fitted to a user's images and GPUs, one setting after another, each with the rule it comes from."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...data.order import epoch_length
from ..config import Config, load_config, recipe_names, refuse_task
from ..errors import UserError
from ..parts import open_sources
from ..planning.memory import divide
from ..planning.plan import CIFAR10, IMAGENET, Place, most_dividing, most_images, open_case, plan
from . import rules
from .choices import Choice, Tuning, named
from .images import of_data, of_encoder, of_size

LENGTHS = ("between", "samples", "epochs")
WRITTEN_BY = "# elsewhere tune "  # how a tuned recipe's file begins


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
    images, size = of_data(found, images, size, data)
    if gpus < 1:
        raise UserError(f"--gpus {gpus} is no number of GPUs; choose 1 or more.")
    side = of_size(found, size)
    of_encoder(found, images)
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
    decided = {one.key for one in found.choices}
    for key in found.given:
        if not any(key == one or key.startswith(one + ".") for one in decided):
            found.decide("given", "", **{key.replace(".", "__"): None})
    return Tuned(recipe, images, side, found.config, found.choices, found.cautions, result)


def _open(recipe: str, overrides: Sequence[str], data: str | None) -> Tuning:
    base = load_config(recipe)
    refuse_task(base, "`elsewhere tune`")
    _refuse_tuned(recipe)
    if recipe.startswith("published/"):
        name = recipe.partition("/")[2]
        near = name if name in recipe_names() else next(iter(difflib.get_close_matches(name, recipe_names(), 1)), name)
        raise UserError(
            f"{recipe} repeats what was published, to the micro-batch, and would not with other numbers: tune {near}."
        )
    if base.optim.steps is not None:
        raise UserError(f"{recipe} counts steps (optim.steps), which do not scale with images: give it optim.epochs.")
    config = load_config(recipe, [*overrides, *([f"data.path={data}"] if data else [])])
    if config.optim.steps is not None:
        raise UserError("elsewhere tune chooses optim.epochs: leave optim.steps out, and set it when you train.")
    return Tuning(recipe, base, config, named(base, config, overrides))


def _published_images(recipe: str, base: Config) -> int:
    """Images of the epochs that a recipe counts."""
    if base.data.path == "digits":
        return len(open_sources(base, None, None)[0])
    return CIFAR10 if _packaged(recipe).startswith("cifar10") else IMAGENET


def _packaged(recipe: str) -> str:
    """The packaged recipe at the end of a recipe's bases, by which its epochs are understood."""
    path = Path(recipe)
    if recipe in recipe_names() or not path.is_file():
        return recipe
    base = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("base")
    base = base[-1] if isinstance(base, list) and base else base
    if not isinstance(base, str):
        return recipe
    return _packaged(base if base in recipe_names() else str(path.parent / base))


def _refuse_tuned(recipe: str) -> None:
    """A tuned recipe counts epochs of the images that it was fitted to, which a second round would not know."""
    path = Path(recipe)
    if path.is_file() and path.read_text(encoding="utf-8").startswith(WRITTEN_BY):
        raise UserError(f"{recipe} was written by `elsewhere tune`: tune {_packaged(recipe)} again instead.")


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
    if count < 1e6:
        return f"{count:,.0f}"
    return f"{count / 1e6:,.1f} M" if count < 1e8 else f"{count / 1e6:,.0f} M"


def _of_batch(found: Tuning, images: int, gpus: int, gpu: str) -> None:
    """Batch, micro-batch and activation checkpointing, by what the plan says that the GPUs hold."""
    published = found.base.optim.batch_size
    least = images // rules.STEPS_AN_EPOCH
    if least < gpus:
        raise UserError(
            f"{images} images are too few for {gpus} GPU{'s' * (gpus > 1)}: an epoch of {rules.STEPS_AN_EPOCH} steps "
            f"leaves {least} a step; take fewer GPUs, or more images."
        )
    own = found.config.engine.activation_checkpointing
    case = open_case(found.config, gpu, images, found.recipe)
    for policy in dict.fromkeys(
        (own, *(() if found.is_given("engine.activation_checkpointing") else ("selective", "full")))
    ):
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
    batch = rules.batch_for(published, images, gpus, fits) or found.config.optim.batch_size
    if batch < gpus:
        raise UserError(f"{gpus} GPUs are more than the recipe's batch of {published} images: take fewer.")
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
    if optim.base_lr is not None:
        rule = f"per 256 images (MAE, AdPE), so {optim.batch_size} make a peak of {rules.rounded(optim.rate):g}"
        found.decide("published", rule, optim__base_lr=optim.base_lr)
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
