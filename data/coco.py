"""Images and their objects from a COCO JSON file, checked before a run starts."""

from __future__ import annotations

import glob
import json
import math
import os
from collections import Counter
from typing import Any, TypeGuard

import numpy as np

from .decode import UnreadableImage, read_image
from .images import DataError

NEEDS_PYCOCOTOOLS = "Detection needs pycocotools: `pip install pycocotools`, or this package as elsewhere[detect]."
_SLACK = 1.0  # pixels that a box may reach beyond its image: COCO's own are rounded


def mask_tools() -> Any:
    """pycocotools' functions on masks; `DataError` that says how to install it."""
    try:
        from pycocotools import mask
    except ImportError:
        raise DataError(NEEDS_PYCOCOTOOLS) from None
    return mask


def find_coco(root: str | None, split: str, annotations: str | None, images: str | None) -> tuple[str, str]:
    """The JSON file and the image folder of a split, train or val, in COCO's layout below `root`, or as named.

    `root/annotations/instances_train2017.json` belongs to `root/train2017`, `root/images/train2017`, `root/images` or
    `root`, whichever is there first. Raises `DataError` for what is missing, and for several files of a split.
    """
    prefix = "" if split == "train" else "val_"
    if annotations is None:
        if root is None:
            raise DataError(
                f"Say where the images are: data.path=FOLDER in COCO's layout, or data.{prefix}annotations."
            )
        pattern = os.path.join(os.path.expanduser(root), "annotations", f"instances_{split}*.json")
        found = sorted(glob.glob(pattern))
        if len(found) != 1:
            what = f"{len(found)} files {', '.join(map(os.path.basename, found))}" if found else "no such file"
            raise DataError(
                f"{pattern} must be one file and there is {what}: name it by data.{prefix}annotations=FILE."
            )
        annotations = found[0]
    annotations = os.path.expanduser(annotations)
    if not os.path.isfile(annotations):
        raise DataError(f"data.{prefix}annotations={annotations} is no file: name a COCO JSON file.")
    if images is not None:
        folder = os.path.expanduser(images)
        if not os.path.isdir(folder):
            raise DataError(f"data.{prefix}images={images} is no folder: name that of the images.")
        return annotations, folder
    base = os.path.expanduser(root) if root is not None else os.path.dirname(os.path.dirname(annotations))
    name = os.path.splitext(os.path.basename(annotations))[0].removeprefix("instances_")
    candidates = [os.path.join(base, *parts) for parts in ((name,), ("images", name), ("images",), ())]
    folder = next((one for one in candidates if os.path.isdir(one)), None)
    if folder is None:
        raise DataError(f"There is no folder {candidates[0]} for the images of {annotations}: name it by "
                        f"data.{prefix}images=FOLDER.")  # fmt: skip
    return annotations, folder


def read_coco(path: str) -> dict[str, Any]:
    """What a COCO JSON file holds; `DataError` for one that is not."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): name a COCO JSON file.") from None
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path} is not valid JSON{where}: take another copy of it.") from None
    for key in ("images", "annotations", "categories"):
        found = content.get(key) if isinstance(content, dict) else None
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise DataError(f"{path} has no list {key!r} of objects: a COCO file has images, annotations, categories.")
    return content


class CocoImages:
    """The images of a COCO JSON file as a `Source`, and the objects on each.

    Labels count from 1 in the order of category ids. Crowds are no objects to learn. `without_boxes` "drop" leaves
    images without objects out. `masks` says that every object must have a segmentation. With `on_error` "skip",
    images and objects at fault are left out and counted in `dropped`, with "stop" the first is a `DataError`; objects
    of no extent, which COCO has, are always left out.
    """

    def __init__(
        self,
        annotations: str,
        images: str,
        channels: int | None = 3,
        *,
        masks: bool = True,
        without_boxes: str = "keep",
        on_error: str = "stop",
    ):
        self.path, self.folder, self.channels, self.masks = annotations, images, channels, masks
        self.dropped: Counter[str] = Counter()
        self.left_out: set[int] = set()  # places in the file's list of annotations
        self._stop = on_error == "stop"
        content = read_coco(annotations)
        named = self._categories(content["categories"])
        self.category_ids = sorted(named)
        self.classes: list[str] | None = [named[one] for one in self.category_ids]
        known = self._images(content["images"])
        objects = self._objects(content["annotations"], known)
        kept = [one for one in known if objects[one] or without_boxes == "keep"]
        if not kept:
            raise DataError(f"{annotations} has no image{' with boxes' if known else ''}: check data.path.")
        self.ids = np.array(kept, dtype=np.int64)  # COCO's
        self.sizes = np.array([known[one][1:] for one in kept], dtype=np.int64)  # [n, 2], height and width
        # As text in two buffers: a million Python objects would be copied, page by page, into each worker.
        rows = [json.dumps([known[one][0], objects[one]]).encode() for one in kept]
        self._text, self._ends = b"".join(rows), np.cumsum([len(row) for row in rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def _row(self, i: int) -> list:
        return json.loads(self._text[self._ends[i - 1] if i else 0 : self._ends[i]])

    def name(self, i: int) -> str:
        return os.path.join(self.folder, self._row(i)[0])

    def label(self, i: int) -> int:
        """No image has a class of its own: -1."""
        return -1

    def read(self, i: int) -> np.ndarray:
        """Image `i`, `[H, W, channels]` uint8; `UnreadableImage` also for one of another size than the file says."""
        image, (height, width) = read_image(self.name(i), self.channels), self.sizes[i].tolist()
        if image.shape[:2] != (height, width):
            raise UnreadableImage(
                self.name(i), f"is {image.shape[1]}x{image.shape[0]}, but {self.path} says {width}x{height}"
            )
        return image

    def objects(self, i: int) -> tuple[np.ndarray, np.ndarray, list]:
        """Boxes `[n, 4]` float64 (left, top, right, bottom), labels `[n]` int64 and segmentations of image `i`."""
        rows = self._row(i)[1]
        boxes = np.array([row[0] for row in rows], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        height, width = self.sizes[i]
        return (
            boxes.clip(0, [width, height, width, height]),
            np.array([row[1] for row in rows], dtype=np.int64),
            [row[2] for row in rows],
        )

    def _fault(self, place: int, kind: str, message: str) -> None:
        """Stop with the message, or count the object at `place` among the annotations as left out."""
        if self._stop:
            raise DataError(f"{self.path}: {message}, or set data.on_error=skip to leave it out.")
        self.dropped[kind] += 1
        self.left_out.add(place)

    def _categories(self, entries: list[dict]) -> dict[int, str]:
        named: dict[int, str] = {}
        for entry in entries:
            number = entry.get("id")
            if not isinstance(number, int) or number in named or not isinstance(entry.get("name"), str):
                raise DataError(f"{self.path}: a category has no id of its own or no name ({entry}); mend it.")
            named[number] = entry["name"]
        if not named:
            raise DataError(f"{self.path} has no categories: there is nothing to detect.")
        return named

    def _images(self, entries: list[dict]) -> dict[int, tuple[str, int, int]]:
        """File name, height and width by id, of images whose files are there."""
        known: dict[int, tuple[str, int, int]] = {}
        there: dict[str, set[str]] = {}
        missing: list[str] = []
        for entry in entries:
            number, name = entry.get("id"), entry.get("file_name")
            size = entry.get("height"), entry.get("width")
            if (
                not isinstance(number, int) or number in known or not isinstance(name, str)
                or not all(isinstance(side, int) and side > 0 for side in size)
            ):  # fmt: skip
                shown = {key: entry.get(key) for key in ("id", "file_name", "height", "width")}
                raise DataError(
                    f"{self.path}: an image has no id of its own, no file name or no size ({shown}); mend it."
                )
            folder, base = os.path.split(name)
            if folder not in there:  # one listing costs less than a look-up for each file
                where = os.path.join(self.folder, folder)
                there[folder] = set(os.listdir(where)) if os.path.isdir(where) else set()
            if base not in there[folder]:
                missing.append(name)
                continue
            known[number] = (name, *size)  # pyright: ignore
        self._missing_ids = {e["id"] for e in entries} - known.keys()
        if missing and self._stop:
            raise DataError(
                f"{len(missing)} of the {len(entries)} images of {self.path} are not in {self.folder}, first "
                f"{missing[0]}: check data.path, or set data.on_error=skip to do without them."
            )
        if missing:
            self.dropped["missing images"] = len(missing)
        return known

    def _objects(self, entries: list[dict], known: dict[int, tuple[str, int, int]]) -> dict[int, list]:
        """Of each image the box (left, top, width, height), label and segmentation of every object."""
        labels = {number: label for label, number in enumerate(self.category_ids, start=1)}
        objects: dict[int, list] = {number: [] for number in known}
        for place, entry in enumerate(entries):
            what, image = f"annotation {entry.get('id')}", entry.get("image_id")
            if image in self._missing_ids:
                continue
            if image not in known:
                self._fault(
                    place, "objects of unknown images", f"{what} is of image {image}, which the file lacks; mend it"
                )
                continue
            if entry.get("category_id") not in labels:
                self._fault(
                    place,
                    "objects of unknown categories",
                    f"{what} is of category {entry.get('category_id')}, which the file lacks; mend it",
                )
                continue
            _, height, width = known[image]
            box, crowd = entry.get("bbox"), entry.get("iscrowd", 0)
            if not _is_box(box):
                self._fault(
                    place, "malformed boxes", f"{what} has the box {box}, not [left, top, width, height]; mend it"
                )
                continue
            left, top, across, down = box
            if min(left, top) < -_SLACK or left + across > width + _SLACK or top + down > height + _SLACK:
                self._fault(
                    place,
                    "boxes outside their image",
                    f"{what} has the box {box} (left, top, width, height) outside its image of "
                    f"{width}x{height}; mend it",
                )
                continue
            if crowd:
                continue
            if min(across, down) <= 0:
                self.dropped["objects of no extent"] += 1
                continue
            outline = entry.get("segmentation") if self.masks else None
            if self.masks and not _is_outline(outline, height, width):
                hint = "has no segmentation" if not outline else "has a malformed segmentation"
                self._fault(
                    place,
                    "objects without a mask",
                    f"{what} {hint}; set method.detector.masks=false to learn boxes alone, mend it",
                )
                continue
            objects[image].append([box, labels[entry["category_id"]], outline])
        return objects


def _is_box(box: Any) -> TypeGuard[list[float]]:
    """Whether a box is four finite numbers, the last two not negative."""
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(one, int | float) for one in box)
    return numbers and all(map(math.isfinite, box)) and min(box[2:]) >= 0


def _is_outline(outline: Any, height: int, width: int) -> bool:
    """Whether a segmentation is polygons of three points or more, or a run-length code of the image's size."""
    if isinstance(outline, dict):
        return outline.get("size") == [height, width] and isinstance(outline.get("counts"), list | str)
    return (
        isinstance(outline, list)
        and len(outline) > 0
        and all(isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 for part in outline)
    )
