"""Images with a mask each: where they are, and what the ids of a mask mean."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from .decode import UnreadableImage, read_image
from .images import DataError, NoHeldOutImages, to_image
from .sources import held_out

IGNORED = 255  # the label of pixels that count nowhere
_IMAGES = ("images", "JPEGImages")
_MASKS = ("annotations", "masks", "labels", "SegmentationClass")
_SPLITS = {"train": ("training", "train"), "val": ("validation", "val", "valid")}
_NAMES = ("objectInfo150.txt", "classes.txt", "class_names.txt", "labels.txt")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class Maps(Protocol):
    """Images with label maps, by index: what segmentation is trained on and measured with."""

    @property
    def channels(self) -> int | None: ...

    @property
    def classes(self) -> list[str] | None:
        """The name of each class, in the order of their labels."""
        ...

    def __len__(self) -> int: ...

    def read(self, i: int) -> np.ndarray:
        """Image `i`, `[H, W, channels]` uint8; raises `UnreadableImage`."""
        ...

    def mask(self, i: int) -> np.ndarray:
        """The labels of image `i`, `[H, W]` uint8 with `IGNORED`; raises `UnreadableImage`, and `DataError` for ids
        that are no class."""
        ...

    def label(self, i: int) -> int: ...

    def name(self, i: int) -> str: ...


def read_ids(path: str) -> np.ndarray:
    """The ids of a mask file, `[H, W]` of an integer type; raises `UnreadableImage`."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "I", "I;16", "I;16L", "I;16B", "1"):
                raise UnreadableImage(path, f"is a picture of mode {image.mode}, but a mask holds one class id a pixel")
            return np.asarray(image).astype(np.int32)
    except FileNotFoundError:
        raise UnreadableImage(path, "does not exist") from None
    except UnidentifiedImageError:
        raise UnreadableImage(path, "not an image in a known format") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableImage(path, " ".join(str(error).split()) or type(error).__name__) from None


def labels_of(ids: np.ndarray, classes: int, zero_is_ignored: bool, name: str) -> np.ndarray:
    """Mask ids `[H, W]` as labels 0 … classes - 1 and `IGNORED`, uint8.

    255 is ignored; with `zero_is_ignored` (ADE20K) so is 0, and class k has the id k + 1. Raises `DataError` for other
    ids.
    """
    shift = int(zero_is_ignored)
    known = (ids >= shift) & (ids < classes + shift)
    unknown = ~known & (ids != IGNORED)
    if zero_is_ignored:
        unknown &= ids != 0
    if unknown.any():
        found = np.unique(ids[unknown])
        shown = ", ".join(map(str, found[:5])) + (", …" if len(found) > 5 else "")
        advice = f"correct the mask, or the number of classes ({classes})"
        if not zero_is_ignored and found.tolist() == [classes]:
            advice = "set data.maps.zero_is_ignored=true, if 0 stands for no class here, or correct the mask"
        what = f"0 and 255 for none, 1 … {classes} for classes" if shift else f"0 … {classes - 1}, and 255 for none"
        raise DataError(f"The mask {name} has unknown ids ({shown}), where there may be {what}: {advice}.")
    return np.where(known, ids - shift, IGNORED).astype(np.uint8)


class MaskFolder:
    """Images with masks of the same names below `root`, in one of these layouts (S: a split's folder).

    `images/S/**` with `annotations/S/**` (ADE20K; S is training or train, validation, val or valid), `S/images` with
    `S/masks`, or both without S: then the share `holdout` is val, always the same images. `masks`, `labels`, or VOC's
    `JPEGImages` and `SegmentationClass` will do, too. Class names stand in `objectInfo150.txt`, `classes.txt` or
    `class_names.txt`; without, `classes` says how many there are. Raises `DataError` for folders, images or masks that
    are missing, and `NoHeldOutImages` where there is nothing to measure with.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        channels: int = 3,
        holdout: float = 0.1,
        classes: int | None = None,
        zero_is_ignored: bool = False,
    ):
        self.root, self.channels, self.zero_is_ignored = os.path.expanduser(root), channels, zero_is_ignored
        if not os.path.isdir(self.root):
            raise DataError(
                f"data.path={root} is not a folder: give one with images and masks (see docs/segmentation.md)."
            )
        images, masks, whole = self._folders(split)
        names = _matched(images, masks)
        if whole:
            left_out = held_out(len(names), holdout)
            if split == "val" and not len(left_out):
                raise NoHeldOutImages(f"{root} has no validation split, and data.holdout=0: add one, or hold out some.")
            chosen = left_out if split == "val" else np.setdiff1d(np.arange(len(names)), left_out)
            names = [names[i] for i in chosen]
        self._images, self._masks = images, masks
        self._files = [image for image, _ in names]
        self._mask_files = [mask for _, mask in names]
        self.classes = _class_names(self.root, classes)

    def _folders(self, split: str) -> tuple[str, str, bool]:
        """The folders of images and masks, and whether they hold both splits."""
        found = _pair(self.root)
        if found is None:
            for part in _SPLITS[split]:
                inside = _pair(os.path.join(self.root, part))
                if inside:
                    return (*inside, False)
            if any(_pair(os.path.join(self.root, part)) for part in _SPLITS["train"]) and split == "val":
                raise NoHeldOutImages(f"{self.root} has a train folder and no val: add one with images and masks.")
            raise DataError(
                f"{self.root} has no pair of folders like images and annotations, or images and masks (nor train and "
                "val with these in them)."
            )
        images, masks = found
        for part in _SPLITS[split]:
            if os.path.isdir(os.path.join(images, part)):
                inside = os.path.join(masks, part)
                if not os.path.isdir(inside):
                    raise DataError(f"{os.path.join(images, part)} has no masks: {inside} is missing.")
                return os.path.join(images, part), inside, False
        if any(os.path.isdir(os.path.join(images, part)) for names in _SPLITS.values() for part in names):
            wanted = " or ".join(_SPLITS[split])
            if split == "val":
                raise NoHeldOutImages(f"{images} has no {wanted} folder: add one, or nothing is measured.")
            raise DataError(f"{images} has no {wanted} folder to train on: add one.")
        return images, masks, True

    def __len__(self) -> int:
        return len(self._files)

    def read(self, i: int) -> np.ndarray:
        return read_image(self.name(i), self.channels)

    def mask(self, i: int) -> np.ndarray:
        path = os.path.join(self._masks, self._mask_files[i])
        return labels_of(read_ids(path), len(self.classes), self.zero_is_ignored, path)

    def label(self, i: int) -> int:
        return -1

    def name(self, i: int) -> str:
        return os.path.join(self._images, self._files[i])


class MaskDataset:
    """A torch map-style data set of (image, mask) pairs, or of dicts with `image` and `mask`, as `Maps`.

    Masks are Pillow images, tensors or arrays of ids `[H, W]`. Raises `DataError` where the classes are not known.
    """

    def __init__(self, dataset: Any, channels: int = 3, classes: int | None = None, zero_is_ignored: bool = False):
        names = getattr(dataset, "classes", None)
        if classes is None and not names:
            raise DataError("The data set has no list `classes`: give it one, or set method.segmenter.classes.")
        if not len(dataset):
            raise DataError("The data set is empty: give one with images.")
        self.classes = [str(name) for name in names] if names else [str(i) for i in range(classes or 0)]
        if classes not in (None, len(self.classes)):
            raise DataError(f"method.segmenter.classes={classes}, but the data set has {len(self.classes)} classes.")
        self._dataset, self.channels, self.zero_is_ignored = dataset, channels, zero_is_ignored
        self._last: tuple[int, Any] | None = None

    def _item(self, i: int) -> tuple[Any, Any]:
        if self._last is None or self._last[0] != i:  # image and mask are asked for one after the other
            item = self._dataset[i]
            self._last = i, (item["image"], item["mask"]) if isinstance(item, dict) else (item[0], item[1])
        return self._last[1]

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, i: int) -> np.ndarray:
        return to_image(self._item(i)[0], self.channels, self.name(i))

    def mask(self, i: int) -> np.ndarray:
        ids = np.asarray(self._item(i)[1])
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise UnreadableImage(self.name(i), f"its mask is {ids.dtype} of shape {ids.shape}; give ids [H, W]")
        return labels_of(ids.astype(np.int64), len(self.classes), self.zero_is_ignored, self.name(i))

    def label(self, i: int) -> int:
        return -1

    def name(self, i: int) -> str:
        return f"{type(self._dataset).__name__}[{i}]"


def read_pair(source: Maps, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels of sample `i`; raises `UnreadableImage` where their sizes differ, too."""
    image, mask = source.read(i), source.mask(i)
    if image.shape[:2] != mask.shape:
        (height, width), (rows, columns) = image.shape[:2], mask.shape
        raise UnreadableImage(source.name(i), f"is {width}x{height} pixels and its mask {columns}x{rows}")
    return image, mask


def check_some(source: Maps, count: int = 8) -> None:
    """Raise `DataError` where some of the samples, spread over all, have a mask that cannot be used."""
    for i in np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)):
        try:
            read_pair(source, int(i))
        except UnreadableImage as error:
            raise DataError(f"A sample cannot be used ({error}): mend it or remove it and its mask.") from None


def _pair(folder: str) -> tuple[str, str] | None:
    """The folders of images and of masks in `folder`."""
    for image_names, mask_names in ((_IMAGES[:1], _MASKS[:3]), (_IMAGES[1:], _MASKS[3:])):
        images = [path for name in image_names if os.path.isdir(path := os.path.join(folder, name))]
        masks = [path for name in mask_names if os.path.isdir(path := os.path.join(folder, name))]
        if images and masks:
            return images[0], masks[0]
    return None


def _files(folder: str, suffixes: Sequence[str]) -> dict[str, str]:
    """Files below `folder` by their relative path without suffix."""
    found: dict[str, str] = {}
    for here, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(tuple(suffixes)) and not name.startswith("."):
                path = os.path.relpath(os.path.join(here, name), folder)
                stem = os.path.splitext(path)[0]
                if stem in found:
                    raise DataError(f"{folder} holds both {found[stem]} and {path}: one mask would serve two images.")
                found[stem] = path
    return found


def _matched(images: str, masks: str) -> list[tuple[str, str]]:
    """Paths of images and their masks, relative to the folders, sorted."""
    pictures, maps = _files(images, _SUFFIXES), _files(masks, (".png",))
    if not pictures:
        raise DataError(f"{images} has no images ({', '.join(s[1:] for s in _SUFFIXES)}): check data.path.")
    for have, lack, where, what in (
        (pictures, maps, masks, "mask"), (maps, pictures, images, "image"),
    ):  # fmt: skip
        missing = sorted(have.keys() - lack.keys())
        if missing:
            raise DataError(
                f"{len(missing)} of {len(have)} {'images have no mask' if what == 'mask' else 'masks have no image'}, "
                f"first {have[missing[0]]} in {where} ({what} of the same name): add or remove them."
            )
    return [(pictures[stem], maps[stem]) for stem in sorted(pictures)]


def _class_names(root: str, classes: int | None) -> list[str]:
    for name in _NAMES:
        path = os.path.join(root, name)
        if not os.path.isfile(path):
            continue
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
        if name == _NAMES[0]:  # ADE20K's table: Idx, Ratio, Train, Val, Name
            found = [line.split("\t")[-1].split(",")[0].strip() for line in lines[1:]]
        else:
            found = [line for line in lines if line != "__ignore__"]  # labelme's name of -1
        if classes not in (None, len(found)):
            raise DataError(f"method.segmenter.classes={classes}, but {path} names {len(found)}: make them alike.")
        if not 2 <= len(found) < IGNORED:
            raise DataError(f"{path} names {len(found)} classes: there must be 2 to {IGNORED - 1}.")
        return found
    if classes is None:
        raise DataError(
            f"{root} does not say which classes there are: put their names into {root}/classes.txt, one a line, or set "
            "method.segmenter.classes."
        )
    return [str(i) for i in range(classes)]
