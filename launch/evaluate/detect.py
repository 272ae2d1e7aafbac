"""`elsewhere detect`: ViTDet with (Cascade) Mask R-CNN on a pre-trained encoder, trained on COCO JSON, AP out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from ...data.coco import CocoImages, find_coco, mask_tools
from ...data.detection import DetectionBatches, WholeImages, stack_whole
from ...data.images import DataError
from ...models.vitdet import Detector
from ..build import build_method, pixel_statistics
from ..config import Config
from ..engine.base import Engine
from ..errors import UserError
from ..load import start_task_encoder
from ..monitor import say
from ..parts import Parts, put_together
from ..run import Result, run
from ..world import World
from .coco_scores import as_records, average_precision
from .draw_boxes import draw_detections
from .task_config import task_config


def open_coco(config: Config) -> tuple[CocoImages, CocoImages | None]:
    """Training and held-out images; DataError for what is wrong with either, or for categories that differ."""
    data, masks = config.data, config.method.detector.masks
    paths, weights = data.places()
    if len(paths) > 1 or weights:
        raise UserError("data.path names several places, and detection reads one: give the folder of one COCO set.")
    root, shared = paths[0] if paths else None, {"masks": masks, "on_error": data.on_error}
    train = CocoImages(
        *find_coco(root, "train", data.annotations, data.images), config.model.channels,
        without_boxes=data.without_boxes, **shared,
    )  # fmt: skip
    if data.val_annotations == "none":
        return train, None
    held_out = find_coco(root, "val", data.val_annotations, data.val_images)
    val = CocoImages(*held_out, config.model.channels, **shared)
    if (val.category_ids, val.classes) != (train.category_ids, train.classes):
        odd = sorted(set(val.category_ids) ^ set(train.category_ids))
        what = f"category {odd[0]} is in one of them alone" if odd else "their names differ"
        raise DataError(f"{val.path} has other categories than {train.path} ({what}): make them alike.")
    return train, val


class Detection:
    """The `Task` of method.kind=detect; `drawings` is a folder for the held-out images with what is found on them."""

    def __init__(self, drawings: Path | None = None):
        self.drawings = drawings

    def assemble(self, config: Config, world: World, dataset: Any, val_dataset: Any) -> Parts:
        if dataset is not None or val_dataset is not None:
            raise UserError("Detection reads COCO JSON files: name them by data.path, instead of a data set.")
        if config.data.source != "auto":
            raise UserError(f"data.source={config.data.source} does not go with detection: leave it out.")
        if config.data.views != 1:
            raise UserError(f"data.views={config.data.views}: detection takes each image whole; leave it out.")
        mask_tools()
        train, val = open_coco(config)
        wanted, found = config.method.detector.classes, len(train.category_ids)
        if wanted is not None and wanted != found:
            raise DataError(f"method.detector.classes={wanted}, but {train.path} has {found} categories; set it to "
                            f"{found}, or leave it out.")  # fmt: skip
        check_categories(config, train)
        if world.first:
            say_left_out(train, val)
        known = config.model_copy(deep=True)
        known.method.detector.classes = found
        method = build_method(known)
        assert isinstance(method, Detector)
        data = config.data
        batches = DetectionBatches(
            train, config.model.image_size, jitter=data.jitter, flip=data.flip, interpolation=data.interpolation,
            fill=fill_of(config), masks=config.method.detector.masks, seed=config.seed, on_error=data.on_error,
        )  # fmt: skip
        return put_together(
            known, world, method, train, val, batches=batches, gflops_per_image=method.flops_per_image() / 1e9
        )

    def start(self, config: Config, parts: Parts) -> str:
        init = config.init
        assert isinstance(parts.train, CocoImages)
        record_categories(config, parts.train)
        if init.from_ is None:
            return "fresh weights"
        try:
            what = start_task_encoder(parts.method.encoder, init.from_, init.which, init.allow, init.resample)
        except UserError as error:
            raise UserError(f"init.from: {error}") from error
        return f"encoder weights from {what}"

    def measure(self, config: Config, parts: Parts, engine: Engine) -> dict[str, Any] | None:
        if parts.val is None:
            return None
        assert isinstance(parts.val, CocoImages)
        return scores(engine, parts.val, config, parts.workers, self.drawings)

    def line(self, when: str, found: dict[str, Any]) -> str:
        kinds = [kind for kind in ("box", "mask") if f"{kind}_AP" in found]
        figures = [f"{kind} {_figures(found, kind)}" for kind in kinds]
        return f"average precision {when}: {'; '.join(figures)}; {found['images']:,} images"

    def summary(self, console: Console, result: Result) -> None:
        say(console, f"Finished: {result.steps} steps in {result.run}; figures in {result.run / 'results.json'}.")


def _categories(images: CocoImages) -> list[list]:
    return [list(pair) for pair in zip(images.category_ids, images.classes or [], strict=True)]


def record_categories(config: Config, train: CocoImages) -> None:
    """Write the ids and names of the categories, in the order of labels, to the run's `categories.json`."""
    path = Path(str(config.run.dir)) / "categories.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".part{os.getpid()}")  # every rank writes the same
    aside.write_text(json.dumps(_categories(train)), encoding="utf-8")
    os.replace(aside, path)


def check_categories(config: Config, train: CocoImages) -> None:
    """Raise DataError for a run that was trained on other categories than those of `train`."""
    run = Path(str(config.run.dir))
    path = run / "categories.json"
    if not path.is_file() or not any(run.glob("checkpoints/step-*")):
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), _categories(train)
    if len(before) != len(now):
        raise DataError(
            f"The run in {run} was trained on {len(before)} categories, and {train.path} has {len(now)}: name its own "
            "data, or choose another run.dir."
        )
    for mine, theirs in zip(before, now, strict=True):
        if mine != theirs:
            raise DataError(
                f"The run in {run} was trained with category {mine[0]} ({mine[1]}) where {train.path} has {theirs[0]} "
                f"({theirs[1]}): name its own data, or choose another run.dir."
            )


def say_left_out(*sources: CocoImages | None) -> None:
    """One line for each file of which something was left out."""
    for source in sources:
        if source is not None and source.dropped:
            counts = ", ".join(f"{count:,} {what}" for what, count in source.dropped.items())
            say(Console(), f"Left out of {source.path}: {counts}.")


def _figures(found: dict[str, Any], kind: str) -> str:
    shown = [(name, found[f"{kind}_{name}"]) for name in ("AP", "AP50", "AP75")]
    return ", ".join(f"{name} {'none' if value is None else f'{100 * value:.2f}'}" for name, value in shown)


def fill_of(config: Config) -> list[int]:
    """The pixels `[channels]` where an image does not fill its canvas: the mean, which is 0 when normalised."""
    return [round(255 * value) for value in pixel_statistics(config.data, config.model.channels)[0]]


def scores(
    engine: Engine, val: CocoImages, config: Config, workers: int, drawings: Path | None = None
) -> dict[str, Any]:
    """COCO's average precisions over every image once, see `average_precision`; each rank takes a share.

    On images that cannot be read, with data.on_error=skip, nothing is found; they are counted. Raises DataError for
    the first one otherwise.
    """
    world, detector = engine.world, config.method.detector
    method = engine.method
    assert isinstance(method, Detector)
    size, batch = config.model.image_size, config.loader.micro_batch or 1
    mine, fill = np.arange(len(val))[world.rank :: world.size], fill_of(config)
    whole = WholeImages(val, mine, size, config.data.interpolation, fill, config.data.on_error)
    loader = iter(DataLoader(whole, batch, num_workers=workers, collate_fn=stack_whole))
    idle = torch.zeros(1, config.model.channels, *size, dtype=torch.uint8), torch.tensor([size]), torch.tensor([[1, 1]])
    records: list[dict[str, Any]] = []
    unreadable = 0
    # The same number of forward passes on every rank, since weights may have to be gathered for each.
    for _ in range(-(-len(val) // (world.size * batch))):
        stacked = next(loader, (*idle, [], 0))
        if isinstance(stacked, str):
            raise DataError(stacked)
        *inputs, indices, failed = stacked
        unreadable += failed
        given = inputs if indices else idle
        found = engine.ask("predict", *(one.to(world.device) for one in given))
        for one, i in zip(found, indices, strict=False):
            records += as_records(one, int(val.ids[i]), val.category_ids)
            if drawings is not None:
                picture = draw_detections(val.read(i), one, val.classes or [])
                picture.save(drawings / f"{Path(val.name(i)).stem}_{val.ids[i]}.png")
    everyone = [one for part in world.gather_host(records) for one in part]
    unreadable = sum(world.gather_host(unreadable))
    found = world.first_decides(
        lambda: average_precision(val.path, val.ids.tolist(), everyone, detector.masks, val.left_out)
    )
    return {**found, "images": len(val), "detections": len(everyone), "unreadable": unreadable}


def detect(
    recipe: str | Config,
    *,
    fresh: bool = False,
    allow_config_change: bool = False,
    measure_only: bool = False,
    drawings: str | Path | None = None,
    console: Console | None = None,
    world: World | None = None,
    **overrides: Any,
) -> Result:
    """Train a detector on the encoder that `init.from` names; arguments as for `pretrain`.

    With `measure_only`, `drawings` is an empty or new folder for the held-out images with what is found on them. Raises
    UserError or DataError for anything that a user can mend, NonFiniteLoss for a run that diverged.
    """
    config = recipe if isinstance(recipe, Config) else task_config(recipe, overrides, "detect", "detect")
    folder = None if drawings is None else Path(drawings)
    if folder is not None:
        if not measure_only:
            raise UserError("--draw goes with --evaluate: train first, then draw.")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is there already and not empty; name another folder for the drawings.")
        folder.mkdir(parents=True, exist_ok=True)
    return run(
        config, Detection(folder), fresh=fresh, allow_config_change=allow_config_change, measure_only=measure_only,
        console=console, world=world,
    )  # fmt: skip
