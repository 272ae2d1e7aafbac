"""Small detection sets in COCO's layout: composited scenes with boxes and masks, and trees on aerial photos with boxes.

    python3 tests/coco_sets.py composites FOLDER --stamps STAMPS --photos PHOTOS [--train 400] [--val 100]
    python3 tests/coco_sets.py trees FOLDER --deepforest DATA [--tile 400]

DATA is the folder `deepforest/data` of the wheel (`pip download --no-deps deepforest`, then unzip): 951 boxes in Pascal
VOC's XML on four photos. One photo is held out whole, and photos are cut into tiles without overlap.
"""

from __future__ import annotations

import argparse
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HELD_OUT = "2019_YELL_2_541000_4977000_image_crop"  # of the photos of trees


def polygon_of(box: Sequence[float]) -> list[list[float]]:
    """A box (left, top, right, bottom) as a polygon."""
    left, top, right, bottom = box
    return [[left, top, right, top, right, bottom, left, bottom]]


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """A mask `[H, W]` bool as COCO's uncompressed run-length code: column by column, zeros first."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    return {"size": list(mask.shape), "counts": np.diff([0, *changes.tolist(), mask.size]).tolist()}


class CocoWriter:
    """Images and objects of one split, written to `folder/annotations/instances_SPLIT.json` and `folder/SPLIT`."""

    def __init__(self, folder: Path, split: str, names: Sequence[str]):
        self.folder, self.split = folder, split
        self.content: dict[str, list] = {
            "images": [], "annotations": [],
            "categories": [{"id": 10 * number, "name": name} for number, name in enumerate(names, start=1)],
        }  # fmt: skip
        (folder / split).mkdir(parents=True)

    def add(
        self, image: np.ndarray | Image.Image, name: str, objects: Iterable[tuple[int, Sequence[float], Any]]
    ) -> None:
        """An image, and of each object its label from 0, its box (left, top, right, bottom) and its segmentation."""
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        picture.save(self.folder / self.split / name, quality=92)
        number = len(self.content["images"]) + 1
        self.content["images"].append(
            {"id": number, "file_name": name, "width": picture.width, "height": picture.height}
        )
        for label, (left, top, right, bottom), outline in objects:
            self.content["annotations"].append({
                "id": len(self.content["annotations"]) + 1, "image_id": number, "category_id": 10 * (label + 1),
                "bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top), "iscrowd": 0,
                "segmentation": outline,
            })  # fmt: skip

    def close(self) -> Path:
        path = self.folder / "annotations" / f"instances_{self.split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(self.content), encoding="utf-8")
        return path


def write_scenes(folder: Path, split: str, made: Iterable[Any], names: Sequence[str], suffix: str = "jpg") -> Path:
    """Composited scenes (see `composites`) of a split, with the masks of visible pixels."""
    writer = CocoWriter(folder, split, names)
    for index, scene in enumerate(made):
        objects = [(one.label, one.box, run_lengths(one.mask)) for one in scene.instances]
        writer.add(scene.image, f"scene_{index:05}.{suffix}", objects)
        for annotation, one in zip(writer.content["annotations"][-len(objects) :], scene.instances, strict=False):
            annotation["area"] = int(one.mask.sum())
    return writer.close()


def write_trees(folder: Path, data: Path, tile: int = 400) -> None:
    """The photos of the deepforest package in tiles of `tile` pixels, and the boxes whose centre lies in each."""
    writers = {split: CocoWriter(folder, split, ["tree"]) for split in ("train", "val")}
    for path in sorted(data.glob("*.xml")):
        photo = path.with_suffix(".png")
        tree = ElementTree.parse(path).getroot()
        corners = ("xmin", "ymin", "xmax", "ymax")
        boxes = np.array([[float(box.findtext(c, "0")) for c in corners] for box in tree.iter("bndbox")])
        with Image.open(photo) as opened:
            image = opened.convert("RGB")
        boxes = boxes.clip(0, [image.width, image.height, image.width, image.height])
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        writer = writers["val" if path.stem == HELD_OUT else "train"]
        for top in range(0, image.height, tile):
            for left in range(0, image.width, tile):
                right, bottom = min(left + tile, image.width), min(top + tile, image.height)
                if min(right - left, bottom - top) < tile // 4:
                    continue
                inside = ((centres >= [left, top]) & (centres < [right, bottom])).all(axis=1)
                cut = boxes[inside].clip([left, top] * 2, [right, bottom] * 2) - [left, top] * 2
                objects = [(0, box, polygon_of(box)) for box in cut.tolist()]
                writer.add(image.crop((left, top, right, bottom)), f"{path.stem}_{top}_{left}.png", objects)
    for split, writer in writers.items():
        writer.close()
        counts = {key: len(found) for key, found in writer.content.items()}
        print(f"{split}: {counts['annotations']} boxes on {counts['images']} tiles")


def main() -> None:
    parser = argparse.ArgumentParser(description="Small detection sets in COCO's layout.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    composed = kinds.add_parser("composites")
    composed.add_argument("folder", type=Path)
    composed.add_argument("--stamps", type=Path, default=Path("/usr/share/tuxpaint/stamps"))
    composed.add_argument("--photos", type=Path, default=Path("/usr/share/backgrounds"))
    composed.add_argument("--train", type=int, default=400)
    composed.add_argument("--val", type=int, default=100)
    composed.add_argument("--size", type=int, nargs=2, default=(192, 256), metavar=("HEIGHT", "WIDTH"))
    trees = kinds.add_parser("trees")
    trees.add_argument("folder", type=Path)
    trees.add_argument("--deepforest", type=Path, required=True)
    trees.add_argument("--tile", type=int, default=400)
    given = parser.parse_args()
    if given.kind == "trees":
        return write_trees(given.folder, given.deepforest, given.tile)
    from elsewhere.tests.composites import CLASSES, load_cutouts, scenes

    for split, count in (("train", given.train), ("val", given.val)):
        cutouts = load_cutouts(given.stamps, given.photos, split)
        print(f"{split}: {count} scenes of {len(cutouts.stamps)} cut-outs and {len(cutouts.photos)} photos")
        write_scenes(given.folder, split, scenes(cutouts, count, size=tuple(given.size)), CLASSES)


if __name__ == "__main__":
    main()
