"""`elsewhere segment`: a pre-trained encoder under UperNet, trained and measured on images with label maps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from ...data.images import DataError, NoHeldOutImages
from ...data.map_augment import MapAugment, MapBatches
from ...data.segmentation import Maps, MaskDataset, MaskFolder, check_some
from ...models.segmenter import Segmenter
from ...models.vit import norm_layer
from ..build import build_method, pixel_statistics
from ..config import Config
from ..engine.base import Engine
from ..errors import UserError, user_errors
from ..load import start_task_encoder
from ..monitor import say
from ..parts import Parts, put_together
from ..run import Result, run
from ..world import World
from .label_maps import measure_maps
from .task_config import task_config

# Of pre-training and fine-tuning; views of segmentation have settings of their own in data.maps.
_UNUSED = ("crop_scale", "crop_aspect", "blur", "grayscale", "colour_jitter", "views")


def open_maps(config: Config, dataset: Any = None, val_dataset: Any = None) -> tuple[Maps, Maps | None]:
    """What to train on and what to measure with; DataError for what is missing, or classes that are not the same."""
    data, classes = config.data, config.method.segmenter.classes
    channels, zero = config.model.channels, data.maps.zero_is_ignored
    if dataset is not None:
        train: Maps = MaskDataset(dataset, channels, classes, zero)
        val: Maps | None = None if val_dataset is None else MaskDataset(val_dataset, channels, classes, zero)
    else:
        places, _ = data.places()
        if len(places) != 1:
            raise UserError("Say where images and masks are by one data.path=FOLDER (see docs/segmentation.md).")
        if isinstance(data.val_path, list):
            raise UserError("data.val_path is one folder for segmentation; name one, or leave it out.")
        options = {"channels": channels, "classes": classes, "zero_is_ignored": zero}
        train = MaskFolder(places[0], "train", holdout=0.0 if data.val_path else data.holdout, **options)
        try:
            val = MaskFolder(data.val_path or places[0], "val", holdout=data.holdout, **options)
        except NoHeldOutImages:
            val = None
    if val is not None and val.classes != train.classes:
        raise DataError(
            f"The classes to train on ({len(train.classes or ())}) and to measure with ({len(val.classes or ())}) are "
            "not the same: make their lists alike."
        )
    for source in (train, val):
        if source is not None:
            check_some(source)
    return train, val


def build_map_augment(config: Config) -> MapAugment:
    """The training views of the configuration; UserError for settings that views of segmentation have not."""
    data, size = config.data, config.model.image_size
    for name in _UNUSED:
        if getattr(data, name) != type(data).model_fields[name].default and name in data.model_fields_set:
            raise UserError(f"data.{name} is not for method.kind=segment: leave it out; data.maps has its settings.")
    mean, _ = pixel_statistics(data, config.model.channels)
    with user_errors():
        return MapAugment(
            size=size, scale=map_scale(config), resize=data.maps.resize, flip=data.flip, distort=data.maps.distort,
            most_of_one_class=data.maps.most_of_one_class, fill=tuple(round(255 * value) for value in mean),
            interpolation=data.interpolation,
        )  # fmt: skip


def map_scale(config: Config) -> tuple[float, float]:
    """Long and short side into which images are resized at factor 1."""
    side = min(config.model.image_size)
    return config.data.maps.scale or (4.0 * side, 1.0 * side)


class Segmentation:
    """The `Task` of method.kind=segment; `draw` is a folder for pictures of what is found."""

    def __init__(self, draw: Path | None = None, pictures: int = 16):
        self.draw, self.pictures = draw, pictures
        if draw is not None and draw.exists() and (not draw.is_dir() or any(draw.iterdir())):
            raise UserError(f"--draw {draw} is there already: choose a new or empty folder.")

    def assemble(self, config: Config, world: World, dataset: Any, val_dataset: Any) -> Parts:
        train, val = open_maps(config, dataset, val_dataset)
        known = config.model_copy(deep=True)
        known.method.segmenter.classes = len(train.classes or ())
        method = build_method(known)
        assert isinstance(method, Segmenter)
        augment = build_map_augment(config)
        return put_together(
            known, world, method, train, val, gflops_per_image=method.flops_per_image() / 1e9, augment=augment,
            batches=MapBatches(train, augment, seed=config.seed, on_error=config.data.on_error),
        )  # fmt: skip

    def start(self, config: Config, parts: Parts) -> str:
        init, method = config.init, parts.method
        if init.from_ is None:
            return "fresh weights"
        encoder = method.encoder
        encoder.norm = norm_layer()(encoder.num_features)  # the weights bring one that is left out here
        try:
            what = start_task_encoder(encoder, init.from_, init.which, init.allow, init.resample)
        except UserError as error:
            raise UserError(f"init.from: {error}") from error
        finally:
            encoder.norm = nn.Identity()
        return f"encoder weights from {what}"

    def measure(self, config: Config, parts: Parts, engine: Engine) -> dict[str, Any] | None:
        if parts.val is None:
            return None
        val: Any = parts.val
        augment: Any = parts.augment
        return measure_maps(
            engine, val, map_scale(config), config.probe.sliding, augment.fill, parts.workers,
            config.data.on_error, self.draw, self.pictures,
        )  # fmt: skip

    def line(self, when: str, found: dict[str, Any]) -> str:
        shown = [f"{name} {percent(found[key])} %" for key, name in _FIGURES.items()]
        return f"segmentation {when}: {', '.join(shown)}, {found['images']:,} images"

    def summary(self, console: Console, result: Result) -> None:
        for line in table(result.after) if result.after else ():
            say(console, line)
        say(console, f"Finished: {result.steps} steps in {result.run}; figures in {result.run / 'results.json'}.")


_FIGURES = {"miou": "mIoU", "macc": "mAcc", "aacc": "aAcc"}


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def table(found: dict[str, Any]) -> Iterator[str]:
    """The figures of each class, a line each."""
    width = max(len(name) for name in (*found["classes"], "class"))
    yield f"{'class':{width}} {'IoU %':>8} {'acc %':>8} {'pixels %':>9}"
    for name, one in found["classes"].items():
        yield f"{name:{width}} {percent(one['iou']):>8} {percent(one['accuracy']):>8} {percent(one['share']):>9}"


def segment(
    recipe: str | Config,
    dataset: Any = None,
    *,
    val_dataset: Any = None,
    fresh: bool = False,
    allow_config_change: bool = False,
    measure_only: bool = False,
    draw: Path | None = None,
    console: Console | None = None,
    world: World | None = None,
    **overrides: Any,
) -> Result:
    """Train UperNet on the encoder that `init.from` names, on images with label maps; arguments as for `pretrain`.

    `dataset` has items (image, ids `[H, W]`) and a list `classes`. `draw` is a folder for pictures, with
    `measure_only`. Raises UserError or DataError for anything that a user can mend, NonFiniteLoss for a run that
    diverged.
    """
    config = recipe if isinstance(recipe, Config) else task_config(recipe, overrides, "segment", "segment")
    if draw is not None and not measure_only:
        raise UserError("--draw goes with --evaluate: train first, then draw what the run finds.")
    console = console or Console()
    result = run(
        config, Segmentation(draw), dataset, val_dataset=val_dataset, fresh=fresh, measure_only=measure_only,
        allow_config_change=allow_config_change, console=console, world=world,
    )  # fmt: skip
    if measure_only and result.after and (world is None or world.first):
        for line in table(result.after):
            say(console, line)
    return result
