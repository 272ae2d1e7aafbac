"""What an evaluation command works on: an encoder, its labelled images, and their features, each extracted once."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ...data.images import DataError, NoHeldOutImages, Source, Subset
from ...data.sources import Joined, open_source
from ...data.streams import generator
from ...data.views import CentreView, View, Views
from ...data.webdataset import is_remote
from ...models.method import Method
from ..build import pixel_statistics
from ..config import Config, overridden
from ..errors import UserError
from ..host import cores
from ..load import load_described
from ..monitor import hardware
from ..nodes.guard import RankFailed
from ..world import World, join
from .features import Reading, all_tokens, extract, pooled_layers
from .low_shot import read_list
from .precision import choose_compute
from .results import read
from .store import Cache, Features, Store, listing_checksum, weights_checksum

T = TypeVar("T")

# What an evaluation reads of a configuration; everything else is of training.
SETTINGS = (
    "data.path", "data.val_path", "data.source", "data.holdout", "data.on_error", "data.mean", "data.std",
    "data.interpolation", "model.image_size", "seed", "kernels", "engine.device", "engine.precision", "engine.compile",
    "engine.wait_minutes", "engine.silence_seconds", "loader.workers", "loader.micro_batch", "loader.prefetch",
)  # fmt: skip


def evaluation_config(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration that describes an encoder, with settings for its evaluation; UserError for one of training."""
    for item in overrides:
        key = item.partition("=")[0]
        changed = overridden(config.to_dict(), [item])  # first, for the sentence on one that is not known at all
        if key not in SETTINGS:
            raise UserError(
                f"{key} is a setting of training, which an evaluation does not use; it takes {', '.join(SETTINGS)}."
            )
        if key == "model.image_size" and any(side % changed.model.patch_size for side in changed.model.image_size):
            raise UserError(
                f"{item} is not divisible by the encoder's patches of {changed.model.patch_size} pixels; choose a "
                "multiple of them."
            )
    given = {item.partition("=")[0] for item in overrides}
    values = config.to_dict()
    values["engine"] = {}
    values["loader"] = {}
    values["kernels"] = "auto"
    if "data.path" in given:
        values["data"] |= {"val_path": None, "source": "auto", "samples": None, "streams": None}
    return overridden(values, overrides)


def open_splits(config: Config) -> tuple[Source, Source, str]:
    """Labelled images to learn from and to measure on, and which ones the second are, in words.

    With `data.val_path` that place as a whole (its val split, where it has one) is measured on, and nothing is held out
    from `data.path`. Raises UserError or DataError for images that are missing, streamed, without labels, or of other
    classes.
    """
    data, channels = config.data, config.model.channels
    paths, _ = data.places()
    if not paths:
        raise UserError("Say where the images are: data.path=FOLDER, data.path=cifar10:FOLDER, or data.path=digits.")
    if data.source == "webdataset" or any(map(is_remote, paths)):
        raise UserError(f"data.path={paths[0]} is streamed, and probes need images by index: give shards on disk.")
    holdout = 0.0 if data.val_path else data.holdout
    train = open_source(paths, "train", channels, holdout, data.source)
    if data.val_path:
        where = data.val_path if isinstance(data.val_path, str) else ", ".join(data.val_path)
        try:
            val, what = open_source(data.val_path, "val", channels, 0.0), f"the val split of {where}"
        except NoHeldOutImages:
            val, what = open_source(data.val_path, "train", channels, 0.0), f"all of {where}"
        except DataError as error:
            raise UserError(str(error).replace("data.path=", "data.val_path=")) from error
    else:
        val = open_source(paths, "val", channels, holdout, data.source)
        parts = val.sources if isinstance(val, Joined) else [val]
        split_off = any(isinstance(part, Subset) for part in parts)
        what = f"{data.holdout:.0%} held out of train" if split_off else "the val split"
    return train, val, what


def class_names(train: Source, val: Source) -> list[str]:
    """The classes of both; UserError where there are less than two, or where the two do not have the same."""
    labels = [np.unique([source.label(i) for i in range(len(source))]) for source in (train, val)]
    for split, found in zip(("train", "val"), labels, strict=True):
        if found.min() < 0:
            raise UserError(
                f"Some images of {split} have no label: probes need a folder for each class, or another labelled set."
            )
    if len(labels[0]) < 2:
        raise UserError("The training images are of one class: probes need two or more.")
    mine, theirs = train.classes, val.classes
    if mine is not None and theirs is not None and mine != theirs:
        lacking, beyond = [sorted(set(a) - set(b)) for a, b in ((mine, theirs), (theirs, mine))]
        first = f"first {beyond[0]}, which train lacks" if beyond else f"first {lacking[0]}, which val lacks"
        raise UserError(
            f"train has {len(mine)} classes and val has {len(theirs)} ({first}): give data.path and data.val_path of "
            "the same classes."
        )
    if int(labels[1].max()) > int(labels[0].max()):
        raise UserError(
            f"val has images of class {int(labels[1].max())} and train none beyond {int(labels[0].max())}: give "
            "data.path and data.val_path of the same classes."
        )
    return list(mine) if mine is not None else [str(i) for i in range(int(labels[0].max()) + 1)]


@dataclass
class Session:
    """One evaluation on all ranks; made by `open_session`."""

    world: World
    config: Config
    method: Method
    what: str  # the encoder, in words
    checkpoint: Path
    train: Source
    val: Source
    held_out: str
    classes: list[str]
    chosen: dict[str, np.ndarray]  # indices of the images of train and val that are used
    reading: Reading
    precision: str
    folder: Path  # where results go
    cache: Cache
    layers: int = 1  # features are extracted of so many last layers
    _known: dict[Any, Features] = field(default_factory=dict)
    _stores: list[Store] = field(default_factory=list)
    _lists: dict[Path, np.ndarray] = field(default_factory=dict)
    _weights: str = ""

    @property
    def view(self) -> CentreView:
        return CentreView(self.config.model.image_size, self.config.data.interpolation)

    def say(self, text: str) -> None:
        """A line of progress, on stderr, from the first rank."""
        if self.world.first:
            print(text, file=sys.stderr, flush=True)

    def source(self, split: str) -> Source:
        return self.train if split == "train" else self.val

    def labels(self, split: str) -> np.ndarray:
        """The labels of the images of a split that are used, `[n]`, without reading them."""
        source = self.source(split)
        return np.array([source.label(i) for i in self.chosen[split].tolist()], np.int64)

    def listed(self, path: Path) -> np.ndarray:
        """The training images that a list file names."""
        if path not in self._lists:
            self._lists[path] = self.world.agree(lambda: read_list(path, self.train))
        return self._lists[path]

    def pooled(self, split: str, indices: np.ndarray | None = None) -> Features:
        """Features `[n, layers, 1 or 2, D]` of a split, or of some of its images alone where it was not extracted."""
        whole = self._known.get(("pooled", split))
        if whole is None and indices is None:
            whole = self._known[("pooled", split)] = self._extract("features", split, self.chosen[split])
        if whole is not None:
            return whole if indices is None else whole.take(indices)
        assert indices is not None
        key = ("pooled", split, indices.tobytes())
        if key not in self._known:
            self._known[key] = self._extract("some features", split, indices)
        return self._known[key]

    def augmented(self, view: View, epoch: int) -> Features:
        """Features of the training images in another view; nothing of it is kept."""
        return self._extract(f"epoch {epoch}", "train", self.chosen["train"], view)

    def tokens(self, split: str) -> Features:
        """Tokens `[n, prefix + N, D]` of the last layer, in float16: their rounding is 0.05 % of a number."""
        if ("tokens", split) not in self._known:
            self._known[("tokens", split)] = self._extract("tokens", split, self.chosen[split])
        return self._known[("tokens", split)]

    def _extract(self, what: str, split: str, indices: np.ndarray, view: View | None = None) -> Features:
        tokens, size = what == "tokens", (self.method.encoder.channels, *self.config.model.image_size)
        kept = self.cache.path(self._facts(tokens, split, indices)) if view is None else None
        found = self.world.first_decides(lambda: bool(kept and self.cache.read(kept)))
        if found and kept is not None:
            self.say(f"{what} of {split}: {len(indices):,} images, as kept in {kept}")
            features = self.cache.read(kept)
            assert features is not None
            return features

        def compute(images: torch.Tensor) -> torch.Tensor:
            return all_tokens(self.method, images) if tokens else pooled_layers(self.method, images, self.layers)

        folder = self.cache.folder or self.folder
        start, name = time.perf_counter(), f"{what} {split} {os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}"
        features, store = extract(
            compute, self.source(split), indices, view or self.view, size, self.world, self.reading, folder, name,
            np.float16 if tokens else np.float32,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        left_out = f", {len(features.unreadable)} unreadable left out" if features.unreadable else ""
        self.say(f"{what} of {split}: {len(features):,} images{left_out}, {len(features) / seconds:,.0f} a second")
        if kept is not None:
            self.world.first_decides(lambda: self.cache.keep(kept, features))
        if view is None:
            self._stores.append(store)
        else:
            self.world.gather_host(None)
            store.discard()
        return features

    def _facts(self, tokens: bool, split: str, indices: np.ndarray) -> dict[str, Any]:
        """All that features depend on."""
        if self.cache.folder is None:
            return {}
        self._weights = self._weights or weights_checksum(self.method.encoder)
        return {
            "weights": self._weights, "images": listing_checksum(self.source(split), indices),
            "size": self.view.size, "interpolation": self.view.interpolation,
            "mean": self.method.mean.flatten().tolist(),
            "std": self.method.std.flatten().tolist(), "what": "tokens" if tokens else self.layers,
            "precision": str(self.method.compute_dtype),
        }  # fmt: skip

    def share(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """What each job returns, dealt to the ranks in turn; a job must not depend on where it runs."""
        mine = self.world.agree(lambda: {i: jobs[i]() for i in range(self.world.rank, len(jobs), self.world.size)})
        found = {i: value for part in self.world.gather_host(mine) for i, value in part.items()}
        return [found[i] for i in range(len(jobs))]

    def facts(self) -> dict[str, Any]:
        """What a result says of where it comes from."""
        paths, _ = self.config.data.places()
        unreadable = sum(
            len(self._known[key].unreadable) for key in self._known if key[0] == "pooled" and len(key) == 2
        )
        facts: dict[str, Any] = {
            "encoder": self.what, "data": paths[0] if len(paths) == 1 else paths,
            "train_images": len(self.chosen["train"]), "val_images": len(self.chosen["val"]),
            "measured_on": self.held_out,
            "classes": len(self.classes), "unreadable": unreadable, "image_size": list(self.view.size),
            "interpolation": self.view.interpolation, "view": "resized to 8/7, centre crop; small images whole",
            "precision": self.precision, "seed": self.config.seed, "machine": hardware(self.world),
            "versions": {name: version(name) for name in ("elsewhere", "torch", "scikit-learn", "numpy")}
            | {"python": platform.python_version()},
            "date": date.today().isoformat(),
        }  # fmt: skip
        if self.config.data.val_path:
            facts["val_data"] = self.config.data.val_path
        return facts

    def close(self) -> None:
        """Remove what was written for the ranks to share."""
        for store in self._stores:
            store.discard()


def results_folder(checkpoint: Path, output: Path | None) -> Path:
    """Where results go: as told, the folder of the run, or results/NAME of a file."""
    if output is not None:
        return output
    if checkpoint.is_dir():
        return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    return Path("results") / checkpoint.name.split(".")[0]


def _some(source: Source, count: int | None, seed: int, split: str) -> np.ndarray:
    """Indices of all images, or of `count` at random, ascending."""
    if count is None or count >= len(source):
        return np.arange(len(source))
    return np.sort(generator(seed, f"probe {split}", 0).permutation(len(source))[:count])


def loader_workers(config: Config, world: World) -> int:
    """Loader processes of this rank: as configured, or the cores that the encoder leaves."""
    if config.loader.workers != "auto":
        return config.loader.workers
    return min(16, max(0, cores() // world.local_size - 1))


def open_encoder(checkpoint: Path, which: str, recipe: str | None, overrides: Sequence[str], world: World):
    """The frozen encoder as a `Method` on its device, with its configuration, and what it is in words."""
    encoder, config, what = load_described(checkpoint, which, recipe)
    config = evaluation_config(config, overrides)
    mean, std = pixel_statistics(config.data, encoder.channels)
    for module in encoder.modules():
        if hasattr(module, "kernels"):
            setattr(module, "kernels", config.kernels)  # noqa: B010, as in build
    method = Method(encoder, mean, std).requires_grad_(False).eval().to(world.device)
    return method, config, what


@dataclass(frozen=True)
class Options:
    """What the evaluation commands have in common."""

    checkpoint: Path
    overrides: Sequence[str] = ()
    which: str = "teacher"
    recipe: str | None = None
    output: Path | None = None
    cache: Path | None = None
    train_images: int | None = None
    val_images: int | None = None
    layers: int = 1


@contextmanager
def joined(options: Options) -> Iterator[tuple[World, Method, Config, str]]:
    """The ranks of an evaluation, each with the frozen encoder; what goes wrong on one ends all."""
    # Before the others are met, what a user got wrong is the same on all of them.
    with data_errors():
        method, config, what = open_encoder(
            options.checkpoint, options.which, options.recipe, options.overrides, World()
        )
    engine = config.engine
    world = join(engine.device, False, 60 * engine.wait_minutes, engine.silence_seconds)
    try:
        method.to(world.device)
        with data_errors():
            yield world, method, config, what
    except BaseException as error:
        try:
            world.guard.failed(error)
        except RankFailed as failed:  # another's, which said so
            raise SystemExit(failed.status) from error
        if getattr(error, "said", False) and not isinstance(error, UserError):
            raise SystemExit(1) from error
        raise
    finally:
        world.close()


@contextmanager
def data_errors() -> Iterator[None]:
    """Turn what is wrong with images into a UserError."""
    try:
        yield
    except DataError as error:
        raise UserError(str(error), said=getattr(error, "said", False)) from error


@contextmanager
def open_session(options: Options) -> Iterator[Session]:
    """An evaluation of labelled images; raises UserError for anything that a user can mend."""
    with joined(options) as (world, method, config, what):
        train, val, held_out = world.agree(lambda: open_splits(config))
        classes = world.agree(lambda: class_names(train, val))
        chosen = {
            "train": _some(train, options.train_images, config.seed, "train"),
            "val": _some(val, options.val_images, config.seed, "val"),
        }
        batch = config.loader.micro_batch or (256 if world.device.type == "cuda" else 64)
        reading = Reading(loader_workers(config, world), batch, config.loader.prefetch, config.data.on_error)
        view = CentreView(config.model.image_size, config.data.interpolation)
        sample = Views(train, chosen["train"][:batch], view, batch)[0].images.to(world.device)
        precision = choose_compute(method, config.engine.precision, world.device, sample, config.engine.compile)
        folder = results_folder(options.checkpoint, options.output)
        world.first_decides(lambda: _writable(folder))
        session = Session(
            world=world, config=config, method=method, what=what, checkpoint=options.checkpoint, train=train, val=val,
            held_out=held_out, classes=classes, chosen=chosen, reading=reading, precision=precision, folder=folder,
            cache=Cache(options.cache), layers=min(options.layers, len(method.encoder.blocks)),
        )  # fmt: skip
        session.say(f"{what} on {session.view.size[0]}×{session.view.size[1]} pixels, {precision}")
        try:
            yield session
        finally:
            session.close()


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): choose another with -o FOLDER.") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written: choose another with -o FOLDER.")
    read(folder)  # now, and not after hours of features
