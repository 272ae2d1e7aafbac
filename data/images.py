"""Where images come from: folders, the built-in digits, or any torch data set, as one `Source`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from .decode import UnreadableImage, eight_bits, from_pil, read_image, to_channels
from .streams import generator

# torchvision's list, and .npy for images of many channels.
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".npy")
_TRAIN_FOLDERS = ("train", "training")
_VAL_FOLDERS = ("val", "valid", "validation", "test")


class DataError(ValueError):
    """The data are not as the recipe says; the message tells in one sentence what to do."""


class NoHeldOutImages(DataError):
    """There is no val split, and none is to be taken from train."""


class Source(Protocol):
    """Images by index. A source is picklable and small, because each worker process has a copy."""

    @property
    def channels(self) -> int | None:
        """Channels of every image that `read` returns; None where each has its own."""
        ...

    @property
    def classes(self) -> list[str] | None:
        """The name of each label, None where there are no labels or no names."""
        ...

    def __len__(self) -> int: ...

    def read(self, i: int) -> np.ndarray:
        """Image `i`, `[H, W, channels]` uint8, perhaps read-only; raises `UnreadableImage`."""
        ...

    def label(self, i: int) -> int:
        """The class of image `i`, -1 where unknown."""
        ...

    def name(self, i: int) -> str:
        """What a message calls image `i`: a path, or `digits[3]`."""
        ...


def check_split(split: str) -> None:
    """Raise `DataError` for a split that is neither train nor val."""
    if split not in ("train", "val"):
        raise DataError(f"split={split!r} is unknown: choose train or val.")


class Digits:
    """scikit-learn's 1,797 grey 8x8 digits, split once and for all into about 80 % train and 20 % val per class.

    Raises `DataError` without scikit-learn.
    """

    channels = 1

    def __init__(self, split: str = "train"):
        check_split(split)
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise DataError("data.path=digits needs scikit-learn: `pip install scikit-learn`.") from None
        digits: Any = load_digits()
        chosen = []
        for digit in range(10):
            members = generator(0, "digits split", 0, digit).permutation(np.flatnonzero(digits.target == digit))
            held_out = round(len(members) / 5)
            chosen.append(members[:held_out] if split == "val" else members[held_out:])
        self._indices = np.sort(np.concatenate(chosen))
        self._labels = digits.target[self._indices]
        self._images = np.rint(digits.images[self._indices] * (255 / 16)).astype(np.uint8)[..., None]
        self.classes: list[str] | None = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, i: int) -> np.ndarray:
        return self._images[i]

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def name(self, i: int) -> str:
        return f"digits[{self._indices[i]}]"


class _Paths:
    """A list of paths in two buffers: a million Python strings would be copied, page by page, into each worker."""

    def __init__(self, paths: list[str]):
        encoded = [os.fsencode(path) for path in paths]
        self._text = b"".join(encoded)
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(self._text[self._ends[i - 1] if i else 0 : self._ends[i]])


def _scan(folder: str) -> tuple[list[str], list[str]]:
    """Names of the image files and of the folders in `folder`, sorted; hidden ones are left out."""
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # `is_dir` is free where the folder's own entry tells; only a link without an image's suffix is looked up.
            if entry.name.lower().endswith(_SUFFIXES) and not entry.is_dir(follow_symlinks=False):
                files.append(entry.name)
            elif entry.is_dir():
                folders.append(entry.name)
    return sorted(files), sorted(folders)


def _walk(root: str, relative: str = "", links: tuple[str, ...] = ()) -> list[tuple[str, list[str]]]:
    """(relative folder, image names) of every folder with images at and below `root/relative`."""
    here = os.path.join(root, relative)
    if os.path.islink(here):
        target = os.path.realpath(here)
        parent = os.path.realpath(os.path.dirname(here))
        if target in links or os.path.commonpath((parent, target)) == target:
            return []  # a link to one of its own parents would never end
        links = (*links, target)
    files, folders = _scan(here)
    found = [(relative, files)] if files else []
    for folder in folders:
        found += _walk(root, os.path.join(relative, folder), links)
    return found


class ImageFolder:
    """Image files below `root`: `root/<class>/**`, or `root/{train,val}/<class>/**`, or a folder without classes.

    Order and labels are those of torchvision's ImageFolder; hidden files are left out. `split` matters only where
    `root` has a `train` folder; labels of val follow the classes of train. Files are decoded to `channels`.
    Raises `DataError` for a folder that is missing, has no images, or has classes in val that train has not.
    """

    def __init__(self, root: str, split: str = "train", channels: int | None = 3):
        check_split(split)
        self.root = os.path.expanduser(root)
        self.channels = channels
        self.classes: list[str] | None = None
        if not os.path.isdir(self.root):
            what = "is a file, not a folder" if os.path.exists(self.root) else "does not exist"
            raise DataError(
                f"data.path={root} {what}: give a folder of images, cifar10:FOLDER for a torchvision set, or `digits`."
            )
        try:
            files, folders = _scan(self.root)
            train = next((name for name in _TRAIN_FOLDERS if name in folders), None)
            if train and not files:
                self._open_split(split, train, folders)
                return
            self._open(self.root, None if files else folders)
        except OSError as error:
            raise DataError(
                f"data.path={root} cannot be read ({error.filename}: {error.strerror}): check its permissions."
            ) from None

    @staticmethod
    def validation_folder(root: str) -> str | None:
        """The path of `root`'s own validation split, None where it has none."""
        root = os.path.expanduser(root)
        if not any(os.path.isdir(os.path.join(root, name)) for name in _TRAIN_FOLDERS):
            return None
        paths = (os.path.join(root, name) for name in _VAL_FOLDERS)
        return next((path for path in paths if os.path.isdir(path)), None)

    def _open_split(self, split: str, train: str, folders: list[str]) -> None:
        train = os.path.join(self.root, train)
        files, classes = _scan(train)
        if split == "train":
            self._open(train, None if files else classes)
            return
        val = self.validation_folder(self.root)
        if val is None:
            raise DataError(f"{self.root} has no {' or '.join(_VAL_FOLDERS)} folder: add one, or hold out from train.")
        files, own = _scan(val)
        unknown = sorted(set(own) - set(classes))
        if unknown and not files and classes:
            raise DataError(
                f"{val} has {len(unknown)} class folder(s) that {train} has not, first {unknown[0]}: rename them alike."
            )
        self._open(val, None if files or not classes else classes)

    def _open(self, base: str, classes: list[str] | None) -> None:
        """List the images below `base`, with labels where `classes` are its folders (those without images too)."""
        paths: list[str] = []
        labels: list[np.ndarray] = []
        found = _walk(base)
        known = {name: label for label, name in enumerate(classes or [])}
        # Folder by folder and sorted by the folder's path, which is torchvision's order within a class.
        for folder, names in sorted(found, key=lambda item: (item[0].split(os.sep)[0], os.path.join(base, item[0]))):
            paths += [os.path.join(folder, name) for name in names]
            labels.append(np.full(len(names), known.get(folder.split(os.sep)[0], -1), dtype=np.int32))
        if not paths:
            raise DataError(
                f"{base} has no images ({', '.join(s[1:] for s in _SUFFIXES)}) in it or below: check data.path."
            )
        self._base = base
        self._paths = _Paths(paths)
        self._labels = np.concatenate(labels)
        self.classes = classes or None

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, i: int) -> np.ndarray:
        return read_image(self.name(i), self.channels)

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def name(self, i: int) -> str:
        return os.path.join(self._base, self._paths[i])


def to_image(item: Any, channels: int | None, name: str = "image") -> np.ndarray:
    """A Pillow image, a CHW or HW tensor, or an HWC or HW array -> uint8 `[H, W, channels]` (`None`: its own).

    Floats must be in 0…1. Raises `UnreadableImage` for anything else.
    """
    if isinstance(item, Image.Image):
        return from_pil(item, channels, name)
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu()
        item = (item.float() if item.is_floating_point() else item).numpy()
        item = item.transpose(1, 2, 0) if item.ndim == 3 else item
    if not isinstance(item, np.ndarray):
        raise UnreadableImage(name, f"is a {type(item).__name__}: give a Pillow image, a CHW tensor or an HWC array")
    image = eight_bits(item, name)
    return to_channels(image, channels or image.shape[2], name)


class TorchDataset:
    """A torch map-style data set as a source.

    Items are an image, (image, label, ...) or a dict with `image` and perhaps `label`; see `to_image` for images.
    `channels=None` takes the first item's. Raises `DataError` for a data set without length or without indexing,
    and where none of the first hundred items is a fitting image.
    """

    def __init__(self, dataset: Any, channels: int | None = None, name: str | None = None):
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise DataError(
                f"{type(dataset).__name__} has no length or no indexing: give a map-style data set "
                "(`__len__` and `__getitem__`); exact resuming needs images by index."
            )
        if not len(dataset):
            raise DataError(f"{type(dataset).__name__} is empty: give a data set with images.")
        self._dataset = dataset
        self._name = name or type(dataset).__name__
        self._last: tuple[int, int] | None = None
        names = getattr(dataset, "classes", None)
        self.classes: list[str] | None = [str(c) for c in names] if isinstance(names, (list, tuple)) else None
        self._labels = self._known_labels()
        self.channels: int = self._probe(channels)

    def _probe(self, channels: int | None) -> int:
        """The channels of the first image that can be used, among the first hundred."""
        first: UnreadableImage | None = None
        for i in range(min(100, len(self._dataset))):
            try:
                return to_image(self._item(i)[0], channels, self.name(i)).shape[2]
            except UnreadableImage as error:
                first = first or error
        raise DataError(f"None of the first images can be used; {first}.")

    def _known_labels(self) -> np.ndarray | None:
        for field in ("targets", "labels", "_labels"):
            labels = getattr(self._dataset, field, None)
            if labels is None or not isinstance(labels, (list, tuple, np.ndarray, torch.Tensor)):
                continue
            try:
                labels = np.asarray(labels)
            except ValueError:
                continue
            # A target_transform would make other labels than those stored.
            transformed = getattr(self._dataset, "target_transform", None) or getattr(self._dataset, "transforms", None)
            if labels.shape == (len(self._dataset),) and labels.dtype.kind in "iu" and transformed is None:
                return labels.astype(np.int64)
        return None

    def _item(self, i: int) -> tuple[Any, int]:
        try:
            item = self._dataset[i]
        except MemoryError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UnreadableImage(self.name(i), reason) from error
        if isinstance(item, dict):
            if "image" not in item:
                raise UnreadableImage(self.name(i), f"has keys {', '.join(map(str, item))}, but `image` is needed")
            image, label = item["image"], item.get("label")
        elif isinstance(item, (tuple, list)) and item:
            image, label = item[0], item[1] if len(item) > 1 else None
        else:
            image, label = item, None
        if isinstance(label, torch.Tensor):
            label = label.detach().cpu().numpy()
        if isinstance(label, np.ndarray) and label.size == 1:
            label = label.reshape(())[()]
        return image, int(label) if isinstance(label, (int, np.integer)) else -1

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, i: int) -> np.ndarray:
        image, label = self._item(i)
        self._last = i, label  # so that `label` need not read the item again
        return to_image(image, self.channels, self.name(i))

    def label(self, i: int) -> int:
        if self._labels is not None:
            return int(self._labels[i])
        if self._last is None or self._last[0] != i:
            self._last = i, self._item(i)[1]
        return self._last[1]

    def name(self, i: int) -> str:
        return f"{self._name}[{i}]"


class Channels:
    """Another source with `channels` channels: grey repeated to RGB, RGB to luma.

    Raises `DataError` for other changes.
    """

    def __init__(self, source: Source, channels: int):
        if source.channels != channels and (source.channels, channels) not in ((1, 3), (3, 1)):
            raise DataError(
                f"The images have {source.channels} channel(s), but the recipe expects {channels}: "
                f"set model.channels={source.channels}."
            )
        self.source = source
        self.channels = channels
        self.classes: list[str] | None = source.classes

    def __len__(self) -> int:
        return len(self.source)

    def read(self, i: int) -> np.ndarray:
        return to_channels(self.source.read(i), self.channels, self.source.name(i))

    def label(self, i: int) -> int:
        return self.source.label(i)

    def name(self, i: int) -> str:
        return self.source.name(i)


class Subset:
    """The images `indices` of another source, in that order."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.channels: int | None = source.channels
        self.classes: list[str] | None = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, i: int) -> np.ndarray:
        return self.source.read(int(self.indices[i]))

    def label(self, i: int) -> int:
        return self.source.label(int(self.indices[i]))

    def name(self, i: int) -> str:
        return self.source.name(int(self.indices[i]))
