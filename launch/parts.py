"""What a run is made of, put together from its configuration without a word to the other ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..data.augment import Augment
from ..data.batch import Batch
from ..data.coco import CocoImages
from ..data.ffcv import Beton
from ..data.images import Channels, DataError, Digits, ImageFolder, NoHeldOutImages, Source, Subset, TorchDataset
from ..data.loader import Loader
from ..data.masks import Masks
from ..data.order import Mixture, Order, Permutations, Plan, check_batch_sizes, epoch_length
from ..data.readers import Reader, open_reader
from ..data.segmentation import MaskFolder
from ..data.shards import Shards
from ..data.sources import Joined, open_source
from ..data.stream_order import check_division
from ..data.webdataset import Stream, is_remote
from ..models.jepa import Jepa
from ..models.mae import Mae
from ..models.method import Method
from .build import adversary_schedules, build_augment, build_masks, build_method, build_schedules, choose_kernels
from .config import Config
from .engine.precision import choose_precision
from .errors import UserError
from .host import cores
from .optim import Schedules
from .world import World


@dataclass
class Parts:
    """Method, sources, masks, augmentation and schedules of a run, and how its batch divides."""

    method: Method
    reader: str  # index, webdataset or ffcv
    train: Source | Stream
    val: Source | None
    order: Order | None  # of train; a stream has its own
    masks: Any
    augment: Augment
    schedules: Schedules
    adversary_schedules: Schedules
    micro_batch: int
    accumulation: int
    steps_per_epoch: float
    steps: int
    workers: int
    images: str  # what holds them, which decides their order and, with FFCV, their pixels
    precision_reason: str
    gflops_per_image: float
    batches: Dataset[Batch] | None = None  # what makes the micro-batch of a request, where `train` alone does not
    after: Callable[[Batch, Batch], Batch] | None = None  # what is left to be done to a batch on the device

    def open(self, plan: Plan) -> Reader:
        """The reader of the images of `train` by a plan."""
        if self.batches is not None:
            assert self.order is not None
            return Loader.of(self.batches, self.order, plan)
        return open_reader(self.train, self.augment, self.masks, self.order, plan, self.reader)


def assemble(config: Config, world: World, dataset: Any = None, val_dataset: Any = None) -> Parts:
    """Build the parts; raises UserError or DataError for everything in the configuration that cannot work."""
    method = build_method(config)
    masks = build_masks(config, method.encoder.grid)
    train, val, reader = open_sources(config, dataset, val_dataset)
    first = masks(config.seed, 0, 0, np.arange(min(64, len(train))))
    return put_together(
        config, world, method, train, val, reader, masks=masks, gflops_per_image=flops_per_image(method, first) / 1e9
    )


def put_together(
    config: Config,
    world: World,
    method: Method,
    train: Source | Stream,
    val: Source | None,
    reader: str = "index",
    **more: Any,
) -> Parts:
    """The parts around a method and its images; `more` are fields of `Parts` beside those that follow from these."""
    choose_kernels(method, world.device)  # now, so that what cannot be had ends the run before it starts
    where, optim = config.loader.augment, config.optim
    # The same pixels either way; on a CPU Pillow is faster, and FFCV's loader cannot do it.
    on_device = where == "device" or (where == "auto" and (world.device.type == "cuda" or reader == "ffcv"))
    batch = optim.batch_size
    micro = check_batch_sizes(len(train), batch, config.loader.micro_batch, world.size)
    workers = _workers(config, world, train)
    if isinstance(train, Stream):
        check_division(train.streams, world.size, workers, batch)
    method.compute_dtype, reason = choose_precision(config.engine.precision, world.device)
    length, accumulation = epoch_length(len(train), batch, config.data.remainder), batch // world.size // micro
    per_epoch = length / batch
    schedules = build_schedules(config, per_epoch, accumulation)
    given: dict[str, Any] = {"masks": None, "augment": None, **more}
    if given["augment"] is None:
        given["augment"] = build_augment(config, on_device)
    return Parts(
        method=method, reader=reader, train=train, val=val, order=_order(config, train, length),
        schedules=schedules, adversary_schedules=adversary_schedules(config, schedules),
        micro_batch=micro, accumulation=accumulation,
        steps_per_epoch=per_epoch, steps=optim.steps or length * optim.epochs // batch,
        workers=workers, images=_kind(train, reader), precision_reason=reason, **given,
    )  # fmt: skip


_KINDS = {
    ImageFolder: "files", Shards: "shards", Beton: ".beton", Stream: "streamed shards", Joined: "several places",
    Digits: "digits", MaskFolder: "files with masks", CocoImages: "COCO",
}  # fmt: skip


def _kind(train: Source | Stream, reader: str) -> str:
    """In a word, what holds the images, and who reads them."""
    while isinstance(train, (Subset, Channels)):
        train = train.source
    return ".beton by FFCV" if reader == "ffcv" else _KINDS.get(type(train), "data set")


def flops_per_image(method: Method, masks: Masks | Batch | None) -> float:
    """Operations of a training step per image, for masks like these, or for a batch's own; a task has none."""
    if isinstance(method, Jepa):
        assert masks is not None and masks.context is not None and masks.targets is not None
        (contexts, _, context), (blocks, _, target) = masks.context.shape, masks.targets.shape
        return method.flops_per_image(contexts, context, blocks, target)
    if isinstance(method, Mae):
        assert masks is not None and masks.visible is not None
        return method.flops_per_image(*masks.visible.shape[1:])
    return method.flops_per_image()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]


def open_sources(config: Config, dataset: Any, val_dataset: Any) -> tuple[Source | Stream, Source | None, str]:
    """What to train on, what is held out, and by which reader."""
    channels, data = config.model.channels, config.data
    if dataset is not None:
        val = TorchDataset(val_dataset, channels) if val_dataset is not None else None
        return TorchDataset(dataset, channels), val, "index"
    paths, weights = data.places()
    if not paths:
        raise UserError("Say where the images are: data.path=FOLDER, data.path=cifar10:FOLDER, or data.path=digits.")
    if data.source == "webdataset" or (data.source == "auto" and any(map(is_remote, paths))):
        return _stream(config, paths, weights), None, "webdataset"
    for name in ("samples", "streams", "shuffle_buffer"):
        if name in data.model_fields_set and getattr(data, name) is not None:
            raise UserError(f"data.{name} belongs to data.source=webdataset: set that as well, or leave it out.")
    train = open_source(paths, "train", channels, data.holdout, data.source)
    reader = "ffcv" if data.source == "ffcv" else "index"
    if reader == "ffcv" and isinstance(train, Joined):
        raise UserError("data.source=ffcv reads one .beton: name one, or set data.source=auto for several.")
    try:
        val_source = "auto" if data.val_path else data.source
        return train, open_source(data.val_path or paths, "val", channels, data.holdout, val_source), reader
    except NoHeldOutImages:  # as configured: then nothing is probed
        return train, None, reader
    except DataError as error:
        raise UserError(str(error).replace("data.path=", "data.val_path=") if data.val_path else str(error)) from error


def _stream(config: Config, paths: list[str], weights: list[float] | None) -> Stream:
    data = config.data
    if weights:
        raise UserError("data.source=webdataset reads all shards alike: leave the weights out of data.path.")
    if data.val_path:
        raise UserError("data.val_path is for the probe, which streamed images do not have: leave it out.")
    if data.remainder == "drop":
        raise UserError("data.remainder=drop is not for data.source=webdataset: set data.remainder=carry.")
    return Stream(
        paths, config.model.channels, streams=data.streams, global_batch=config.optim.batch_size, seed=config.seed,
        samples=data.samples, shuffle_buffer=data.shuffle_buffer,
    )  # fmt: skip


def _order(config: Config, train: Source | Stream, length: int) -> Order | None:
    """The order of the images of `train`, of which an epoch takes `length`."""
    if isinstance(train, Stream):
        return None
    _, weights = config.data.places()
    if weights is None or len(weights) == 1:
        return Permutations(len(train), config.seed, length)
    assert isinstance(train, Joined)
    if config.data.remainder == "drop":
        raise UserError("data.remainder=drop is not for weights in data.path: set data.remainder=carry.")
    return Mixture(train.sizes, weights, config.seed)


def _workers(config: Config, world: World, train: Source | Stream) -> int:
    """Loader processes of this rank: as configured, or the cores that its trainer leaves."""
    if config.loader.workers != "auto":
        return config.loader.workers
    workers = min(16, max(0, cores() // world.local_size - 1))
    return train.workers_for(world.size, workers) if isinstance(train, Stream) else workers
