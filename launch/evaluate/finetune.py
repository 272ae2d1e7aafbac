"""`elsewhere finetune`: a pre-trained encoder and a linear head, trained as a whole on labelled images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from ...data.images import DataError, Source
from ...data.label_mixing import LabelMixing
from ...data.views import CentreView, Views, read_views
from ...data.webdataset import Stream
from ...models.classifier import Classifier
from ...models.vit import norm_layer
from ..build import build_method, pixel_statistics
from ..config import Config
from ..engine.base import Engine
from ..errors import UserError, user_errors
from ..load import start_task_encoder
from ..monitor import say
from ..parts import Parts, open_sources, put_together
from ..run import Result, run
from ..world import World
from .intervals import wilson
from .scores import counts
from .task_config import task_config

_BATCH = 128  # validation images of a forward on one rank


def classes_of(train: Source | Stream, val: Source | None, wanted: int | None) -> int:
    """The number of classes of the images; DataError without labels, or where it is not the `wanted` one."""
    if isinstance(train, Stream):
        if wanted is None:
            raise DataError("Streamed images do not say how many classes there are: set method.classifier.classes.")
        return wanted
    if train.label(0) < 0:
        raise DataError("The images have no labels: give a folder of classes (data.path/train/<class>/…).")
    names = train.classes
    found = len(names) if names else 1 + max(train.label(i) for i in range(len(train)))
    if wanted is not None and wanted != found:
        raise DataError(
            f"method.classifier.classes={wanted}, but data.path has {found} classes; set it to {found}, or leave it "
            "out."
        )
    if found < 2:
        raise DataError(f"data.path has {found} class; there is nothing to tell apart with fewer than two.")
    if val is not None and val.classes and names and len(val.classes) != found:
        raise DataError(
            f"data.path has {found} classes to train on and {len(val.classes)} to measure with: make them alike."
        )
    return found


class Finetuning:
    """The `Task` of method.kind=classify."""

    def assemble(self, config: Config, world: World, dataset: Any, val_dataset: Any) -> Parts:
        train, val, reader = open_sources(config, dataset, val_dataset)
        if reader == "ffcv":
            raise UserError("FFCV's loader cannot fine-tune; set data.source=auto, which reads the file by index.")
        if config.data.views != 1:
            raise UserError(f"data.views={config.data.views}: fine-tuning takes one crop of an image; leave it out.")
        if config.data.rand_augment and config.model.channels != 3:
            raise UserError(
                f"data.rand_augment needs RGB images, and model.channels={config.model.channels}: set "
                "data.rand_augment=null."
            )
        section = config.method.classifier
        classes = classes_of(train, val, section.classes)
        if val is None and config.data.val_path:
            raise DataError(
                f"data.val_path={config.data.val_path} has no labels: give a folder of classes, as data.path."
            )
        known = config.model_copy(deep=True)
        known.method.classifier.classes = classes
        method = build_method(known)
        assert isinstance(method, Classifier)
        parts = put_together(known, world, method, train, val, reader, gflops_per_image=method.flops_per_image() / 1e9)
        data, (mean, std) = config.data, pixel_statistics(config.data, config.model.channels)
        if data.erase or data.mixup or data.cutmix or data.label_smoothing:
            with user_errors():
                parts.after = LabelMixing(
                    config.seed, classes, parts.micro_batch, mean=mean, std=std, erase=data.erase, mixup=data.mixup,
                    cutmix=data.cutmix, label_smoothing=data.label_smoothing,
                )  # fmt: skip
        return parts

    def start(self, config: Config, parts: Parts) -> str:
        init, method = config.init, parts.method
        if init.from_ is None:
            return "fresh weights"
        assert isinstance(method, Classifier)
        encoder, norm = method.encoder, method.encoder.norm
        if isinstance(norm, nn.Identity):  # the weights bring a norm that pooled tokens have no use for
            encoder.norm = norm_layer()(encoder.num_features)
        try:
            what = start_task_encoder(encoder, init.from_, init.which, init.allow, init.resample)
        except UserError as error:
            raise UserError(f"init.from: {error}") from error
        finally:
            encoder.norm = norm
        return f"encoder weights from {what}"

    def measure(self, config: Config, parts: Parts, engine: Engine) -> dict[str, Any] | None:
        return None if parts.val is None else accuracy(engine, parts.val, config, parts.workers)

    def line(self, when: str, found: dict[str, Any]) -> str:
        low, high = found["top1_interval"]
        top5 = f", top-5 {100 * found['top5']:.2f} %" if "top5" in found else ""
        return (
            f"accuracy {when}: top-1 {100 * found['top1']:.2f} % ({100 * low:.2f} to {100 * high:.2f}){top5}, "
            f"loss {found['loss']:.4f}, {found['images']:,} images"
        )

    def summary(self, console: Console, result: Result) -> None:
        say(console, f"Finished: {result.steps} steps in {result.run}; figures in {result.run / 'results.json'}.")


def accuracy(engine: Engine, val: Source, config: Config, workers: int) -> dict[str, Any]:
    """Top-1 (with its 95 % interval) and, of more than five classes, top-5 accuracy and loss over every image once.

    Each rank takes a share; images that cannot be read are counted apart.
    """
    world, method = engine.world, engine.method
    assert isinstance(method, Classifier)
    size = method.encoder.image_size
    view = CentreView(size, config.data.interpolation)
    views = Views(val, np.arange(len(val))[world.rank :: world.size], view, _BATCH)
    batches = read_views(views, list(range(len(views))), workers)
    nothing = torch.zeros(1, method.encoder.channels, *size, dtype=torch.uint8)
    right, loss, seen = np.zeros(2, dtype=np.int64), 0.0, 0
    # The same number of forward passes on every rank, since weights may have to be gathered for each.
    for _ in range(-(-len(val) // (world.size * _BATCH))):
        viewed = next(batches, None)
        images = viewed.images if viewed and viewed.places else nothing
        logits = engine.ask("classify", images.to(world.device)).cpu()
        if viewed is None or not viewed.places:
            continue
        truth = torch.tensor(viewed.labels)
        right = right + counts(logits, truth)
        loss, seen = loss + float(F.cross_entropy(logits, truth, reduction="sum")), seen + len(images)
    totals = np.sum(world.gather_host((*right.tolist(), loss, seen)), axis=0)
    count = int(totals[3])
    if not count:
        raise DataError("None of the held-out images can be read: check data.path.")
    low, high = wilson(int(totals[0]), count)
    found = {"top1": totals[0] / count, "top1_interval": [round(low, 5), round(high, 5)]}
    if method.classes > 5:
        found["top5"] = totals[1] / count
    found = {k: round(float(v), 6) if not isinstance(v, list) else v for k, v in found.items()}
    return {**found, "loss": round(float(totals[2]) / count, 6), "images": count, "unreadable": len(val) - count}


def finetune(
    recipe: str | Config,
    dataset: Any = None,
    *,
    val_dataset: Any = None,
    fresh: bool = False,
    allow_config_change: bool = False,
    measure_only: bool = False,
    console: Console | None = None,
    world: World | None = None,
    **overrides: Any,
) -> Result:
    """Fine-tune the encoder that `init.from` names on labelled images; arguments as for `pretrain`.

    Raises UserError or DataError for anything that a user can mend, NonFiniteLoss for a run that diverged.
    """
    config = recipe if isinstance(recipe, Config) else task_config(recipe, overrides, "classify", "finetune")
    return run(
        config, Finetuning(), dataset, val_dataset=val_dataset, fresh=fresh, allow_config_change=allow_config_change,
        measure_only=measure_only, console=console, world=world,
    )  # fmt: skip
