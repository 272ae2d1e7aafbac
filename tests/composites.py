"""Composited scenes: cut-outs pasted on photos, with exact masks and boxes; what is held out is cut-outs, not scenes.

    python3 tests/composites.py FOLDER --stamps STAMPS --photos PHOTOS [--train 400] [--val 100] [--size 192 256]

writes the ADE20K layout. STAMPS is `/usr/share/tuxpaint/stamps` of Debian's tuxpaint-stamps-default, PHOTOS any folder
of photos, such as `/usr/share/backgrounds` of lomiri-wallpapers-16.04 and lomiri-wallpapers-20.04.
"""

from __future__ import annotations

import argparse
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# Folders of the package's stamps, photographs mostly, that make a class.
STAMPS = {
    "bird": "animals/birds", "mammal": "animals/mammals", "insect": "animals/insects", "fruit": "food/fruit",
    "flower": "plants/flowers", "building": "town/houses", "vehicle": "vehicles", "sign": "town/roadsigns",
}  # fmt: skip
CLASSES = tuple(STAMPS)
UNLABELLED, BACKGROUND = 0, 1  # ids of a scene's mask; class i of CLASSES is i + 2


@dataclass(frozen=True)
class Instance:
    """One object of a scene: its class in CLASSES, its visible pixels `[H, W]` bool, and their (x0, y0, x1, y1)."""

    label: int
    mask: np.ndarray
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """A picture `[H, W, 3]` uint8, its mask `[H, W]` uint8 (half transparent edges UNLABELLED), and its objects."""

    image: np.ndarray
    mask: np.ndarray
    instances: list[Instance]


@dataclass(frozen=True)
class Cutouts:
    """What scenes of a split are made of: cut-outs with their labels, and pictures to paste them on."""

    stamps: Sequence[tuple[int, Image.Image]]  # RGBA
    photos: Sequence[Image.Image]


def held_out(name: str, share: float = 0.25) -> bool:
    """Whether a cut-out or photo belongs to validation; variants (lion, lion-2, sedan_police) go together."""
    root = re.split(r"[-_\d.]", name.lower())[0] or name
    return zlib.crc32(root.encode()) % 1000 < 1000 * share


def load_cutouts(stamps: Path, photos: Path, split: str, longest: int = 1024) -> Cutouts:
    """The cut-outs and photos of a split, train or val, each opened once and reduced to `longest` pixels."""
    found: dict[str, tuple[int, Image.Image]] = {}
    for label, folder in enumerate(STAMPS.values()):
        for path in sorted((stamps / folder).rglob("*.png")):
            if held_out(path.stem) == (split == "val"):
                with Image.open(path) as image:
                    stamp = image.convert("RGBA")
                box = stamp.getchannel("A").point(lambda a: 255 * (a > 127)).getbbox()
                if box and min(box[2] - box[0], box[3] - box[1]) >= 24 and path.name not in found:
                    stamp = stamp.crop(box)
                    stamp.thumbnail((longest, longest))
                    found[path.name] = label, stamp
    names = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    count = max(1, len(names) // 4)
    pictures = []
    for path in names[:count] if split == "val" else names[count:]:
        with Image.open(path) as image:
            picture = image.convert("RGB")
        picture.thumbnail((longest, longest))
        pictures.append(picture)
    return Cutouts(list(found.values()), pictures)


def drawn_cutouts(split: str, classes: int = 3, size: int = 48) -> Cutouts:
    """Discs, squares and triangles in colours, on plain noise: for tests, where no package is installed."""
    rng = np.random.default_rng(int(split == "val"))
    stamps = []
    for label in range(classes):
        for _ in range(6):
            colour = (*(int(c) for c in rng.integers(0, 256, 3)), 255)
            stamp = Image.new("RGBA", (size, size), (0, 0, 0, 0))
            draw = ImageDraw.Draw(stamp)
            if label % 3 == 0:
                draw.ellipse((0, 0, size - 1, size - 1), fill=colour)
            elif label % 3 == 1:
                draw.rectangle((0, 0, size - 1, size - 1), fill=colour)
            else:
                draw.polygon(((size // 2, 0), (0, size - 1), (size - 1, size - 1)), fill=colour)
            stamps.append((label, stamp))
    photos = [Image.fromarray(rng.integers(96, 160, (96, 128, 3)).astype(np.uint8)) for _ in range(4)]
    return Cutouts(stamps, photos)


def compose(cutouts: Cutouts, index: int, size: tuple[int, int] = (192, 256), most: int = 4, seed: int = 0) -> Scene:
    """Scene `index`, of `size` (height, width) with 1 to `most` objects: a function of (seed, index).

    An object takes 0.25 … 0.7 of the shorter side; of one that later objects cover, only visible pixels count, and
    with fewer than 64 of them or less than a fifth of its own it is left out of `instances`.
    """
    rng = np.random.default_rng((seed, index))
    height, width = size
    image = _window(cutouts.photos[rng.integers(len(cutouts.photos))], size, rng)
    owner = np.zeros(size, dtype=np.int32)  # 0: photo, k: k-th object
    edge = np.zeros(size, dtype=bool)
    labels: list[int] = []
    areas: list[int] = []
    by_class: dict[int, list[Image.Image]] = {}
    for label, stamp in cutouts.stamps:
        by_class.setdefault(label, []).append(stamp)
    for _ in range(rng.integers(1, most + 1)):
        label = sorted(by_class)[rng.integers(len(by_class))]  # classes alike, however many cut-outs they have
        stamp = by_class[label][rng.integers(len(by_class[label]))]
        scale = rng.uniform(0.25, 0.7) * min(size) / max(stamp.size)
        stamp = stamp.resize([max(8, round(side * scale)) for side in stamp.size], Image.Resampling.LANCZOS)
        if rng.random() < 0.5:
            stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x, y = (int(rng.integers(0, whole - part + 1)) for whole, part in zip((width, height), stamp.size, strict=True))
        image.paste(stamp, (x, y), stamp)
        alpha = np.zeros(size, dtype=np.uint8)
        alpha[y : y + stamp.height, x : x + stamp.width] = np.asarray(stamp.getchannel("A"))
        labels.append(label)
        areas.append(int((alpha > 127).sum()))
        owner[alpha > 127] = len(labels)
        edge = np.where(alpha > 230, False, edge | (alpha > 25))
    mask = np.full(size, BACKGROUND, dtype=np.uint8)
    instances = []
    for number, (label, area) in enumerate(zip(labels, areas, strict=True), start=1):
        visible = owner == number
        mask[visible] = label + 2
        if visible.sum() >= max(64, area / 5):
            rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
            box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
            instances.append(Instance(label, visible, box))
    mask[edge] = UNLABELLED
    return Scene(np.asarray(image), mask, instances)


def _window(photo: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A random window of a photo, of 0.4 … 1 of what fits, at `size` (height, width)."""
    height, width = size
    fits = min(photo.width / width, photo.height / height) * rng.uniform(0.4, 1.0)
    w, h = max(1, int(width * fits)), max(1, int(height * fits))
    x, y = int(rng.integers(0, photo.width - w + 1)), int(rng.integers(0, photo.height - h + 1))
    return photo.resize((width, height), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))


def scenes(cutouts: Cutouts, count: int, **options) -> Iterator[Scene]:
    """Scenes 0 … count - 1; `options` as for `compose`."""
    return (compose(cutouts, index, **options) for index in range(count))


def write_ade(folder: Path, split: str, made: Iterator[Scene], names: Sequence[str] = CLASSES) -> None:
    """Write scenes of a split, train or val, in the ADE20K layout, and their classes in `classes.txt`."""
    part = {"train": "training", "val": "validation"}[split]
    for kind in ("images", "annotations"):
        (folder / kind / part).mkdir(parents=True)
    for index, scene in enumerate(made):
        Image.fromarray(scene.image).save(folder / "images" / part / f"scene_{index:05}.jpg", quality=92)
        Image.fromarray(scene.mask).save(folder / "annotations" / part / f"scene_{index:05}.png")
    (folder / "classes.txt").write_text("\n".join(("background", *names)) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Composited scenes in the ADE20K layout.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stamps", type=Path, default=Path("/usr/share/tuxpaint/stamps"))
    parser.add_argument("--photos", type=Path, default=Path("/usr/share/backgrounds"))
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--val", type=int, default=100)
    parser.add_argument("--size", type=int, nargs=2, default=(192, 256), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for split, count in (("train", given.train), ("val", given.val)):
        cutouts = load_cutouts(given.stamps, given.photos, split)
        print(f"{split}: {count} scenes of {len(cutouts.stamps)} cut-outs and {len(cutouts.photos)} photos")
        write_ade(given.folder, split, scenes(cutouts, count, size=tuple(given.size), seed=given.seed))


if __name__ == "__main__":
    main()
