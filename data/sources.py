"""What `data.path` names, as one `Source`: folders, torchvision sets, shards, `.beton` files, and several of them."""

from __future__ import annotations

import difflib
import glob
import inspect
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from .ffcv import has_beton_val, names_beton, open_beton
from .images import (
    Channels,
    DataError,
    Digits,
    ImageFolder,
    NoHeldOutImages,
    Source,
    Subset,
    TorchDataset,
    check_split,
)
from .shards import Shards, braces, has_val, names_shards
from .streams import generator

_SPLIT_NAMES = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid", "validation", "test")}
_MOST_HELD_OUT = 10_000


class Joined:
    """Several sources one after another; the classes are those of all, by name.

    Raises `DataError` where some have classes and others have none.
    """

    def __init__(self, sources: Sequence[Source]):
        self.sources = list(sources)
        self.sizes = [len(source) for source in self.sources]
        self._starts = np.cumsum([0, *self.sizes])
        channels = {source.channels for source in self.sources}
        self.channels: int | None = channels.pop() if len(channels) == 1 else None
        names = [source.classes for source in self.sources]
        self.classes: list[str] | None = None
        self._labels: list[dict[int, int]] | None = None
        if all(names) and any(other != names[0] for other in names):
            self.classes = sorted({name for own in names for name in own or ()})
            places = {name: label for label, name in enumerate(self.classes)}
            self._labels = [{i: places[name] for i, name in enumerate(own or ())} for own in names]
        elif all(names):
            self.classes = names[0]
        elif any(names):
            raise DataError(
                "Some of the places in data.path have classes and others have none: give folders that are alike."
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _place(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        source = int(np.searchsorted(self._starts, i, side="right")) - 1
        return source, i - int(self._starts[source])

    def read(self, i: int) -> np.ndarray:
        source, place = self._place(i)
        return self.sources[source].read(place)

    def label(self, i: int) -> int:
        source, place = self._place(i)
        label = self.sources[source].label(place)
        return label if self._labels is None else self._labels[source].get(label, -1)

    def name(self, i: int) -> str:
        source, place = self._place(i)
        return self.sources[source].name(place)


def held_out(n: int, holdout: float) -> np.ndarray:
    """The ascending indices, of `n`, that validation takes from a data set without a split of its own.

    `holdout` is a share, 0 for none; not more than 10,000 are taken, and at least 1 where the share is not 0.
    Raises `DataError` for a share outside 0 … 0.9 or for a single image.
    """
    if not 0 <= holdout <= 0.9:
        raise DataError(f"data.holdout={holdout} is a share of the images: choose 0 … 0.9.")
    if not holdout:
        return np.empty(0, dtype=np.int64)
    if n < 2:
        raise DataError(f"{n} image(s) cannot be split into train and val: add images, or set data.holdout=0.")
    count = min(_MOST_HELD_OUT, max(1, round(n * holdout)))
    return np.sort(generator(0, "held out", 0).permutation(n)[:count])


def _split_off(source: Source, split: str, holdout: float) -> Source:
    # Without labels nothing can be measured on held-out images, so none are kept from training.
    indices = held_out(len(source), holdout if source.label(0) != -1 else 0.0)
    if split == "val":
        if not len(indices):
            raise NoHeldOutImages(
                "There is no val split, and data.holdout=0 or no labels: add one, or hold out a share of train."
            )
        return Subset(source, indices)
    return Subset(source, np.setdiff1d(np.arange(len(source)), indices, assume_unique=True)) if len(indices) else source


def _open_torchvision(kind: str, folder: str, split: str, channels: int | None, holdout: float) -> Source:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"data.path={kind}:{folder} needs torchvision (`pip install torchvision`): {' '.join(str(error).split())}"
        ) from None
    kinds = {name.lower(): name for name in datasets.__all__ if inspect.isclass(getattr(datasets, name))}
    if kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, n=1)
        advice = f"did you mean {near[0]}:{folder}?" if near else "give a folder, `digits`, or `<torchvision set>:DIR`."
        raise DataError(f"data.path={kind}:{folder} names no torchvision set: {advice}")
    cls = getattr(datasets, kinds[kind])
    accepted = inspect.signature(cls.__init__).parameters
    fixed: dict[str, Any] = {"download": False} if "download" in accepted else {}
    own_split = "train" in accepted or "split" in accepted
    if "train" in accepted:
        choices: list[dict[str, Any]] = [{"train": split == "train"}]
    else:
        choices = [{"split": name} for name in _SPLIT_NAMES[split]] if own_split else [{}]
    folder = os.path.expanduser(folder)
    for choice in choices:
        try:
            dataset = cls(folder, **choice, **fixed)
        except TypeError as error:
            raise DataError(
                f"torchvision's {kinds[kind]} needs more arguments ({error}): open it in Python and pass it as data."
            ) from None
        except ValueError as error:
            if "Unknown value" in str(error) and choice is not choices[-1]:
                continue
            raise DataError(f"{kind}:{folder} cannot be opened: {' '.join(str(error).split())}") from None
        except (RuntimeError, OSError):
            name = kinds[kind]
            get = f"python -c \"from torchvision.datasets import {name}; {name}('{folder}', download=True)\""
            if "download" not in accepted:
                get = "see torchvision's documentation of it"
            raise DataError(
                f"{folder} does not hold {name} ({split}) as torchvision stores it; get it with: {get}"
            ) from None
        source: Source = TorchDataset(dataset, channels, kind)
        return source if own_split else _split_off(source, split, holdout)
    raise AssertionError("the last choice returns or raises")


def _expanded(path: str) -> list[str]:
    """The places that a pattern with braces or wildcards stands for; the path itself where it is none, or a tar's."""
    if os.path.exists(os.path.expanduser(path)) or path.endswith(".tar") or not re.search(r"[{*?\[]", path):
        return [path]
    found = []
    for name in braces(os.path.expanduser(path)):
        places = [name] if os.path.exists(name) else sorted(glob.glob(name))
        if not places:
            raise DataError(f"data.path={name} names nothing that exists: check the pattern.")
        found += places
    return found


def open_source(
    path: str | Sequence[str], split: str, channels: int | None, holdout: float = 0.1, kind: str = "auto"
) -> Source:
    """The source that `data.path` names: `digits`, `<torchvision set>:DIR`, shards, a `.beton`, a folder, or a list.

    Braces and wildcards stand for several places, which are joined. `split` is train or val. Where there is no val
    split, the share `holdout` of train (not more than 10,000 images, always the same ones) is val and train goes
    without. Images have `channels` channels (None: their own). `kind` is `data.source`: "auto" looks at what is there,
    "images", "shards" and "ffcv" insist. Raises `DataError`, and its kind `NoHeldOutImages` where there is no val split
    and `holdout` is 0.
    """
    check_split(split)
    places = list(path) if not isinstance(path, str) else _expanded(path)
    if not places:
        raise DataError("data.path is an empty list: name at least one folder.")
    if isinstance(path, str) and len(places) == 1:
        return _open_one(places[0], split, channels, holdout, kind)
    found, missing = [], None
    for place in places:  # of a list, each may be a pattern
        try:
            found.append(open_source(place, split, channels, holdout, kind))
        except NoHeldOutImages as error:
            missing = error
    if missing and not found:
        raise missing
    return found[0] if len(places) == 1 else Joined(found)


def _open_one(path: str, split: str, channels: int | None, holdout: float, kind: str) -> Source:
    if kind in ("auto", "ffcv") and names_beton(path):
        if has_beton_val(path):
            return open_beton(path, split, channels)
        return _split_off(open_beton(path, "train", channels), split, holdout)
    if kind in ("auto", "shards") and names_shards(path):
        if has_val(path):
            return Shards(path, split, channels)
        return _split_off(Shards(path, None, channels), split, holdout)
    if kind in ("ffcv", "shards"):
        what = "a .beton file, or a folder with train.beton" if kind == "ffcv" else "shards"
        raise DataError(f"data.source={kind}, but data.path={path} is not {what}: correct one of them.")
    if path == "digits":
        return Channels(Digits(split), channels) if channels else Digits(split)
    prefixed = re.fullmatch(r"([A-Za-z0-9_]+):(.*)", path)
    if prefixed and not os.path.exists(path):
        return _open_torchvision(prefixed[1].lower(), prefixed[2], split, channels, holdout)
    if ImageFolder.validation_folder(path):
        return ImageFolder(path, split, channels)
    return _split_off(ImageFolder(path, "train", channels), split, holdout)
