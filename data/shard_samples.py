"""What one image becomes in a shard: the bytes to keep, and the tar members around them.

Writer processes import this file and no torch, which takes seconds to load.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import tarfile
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import numpy as np
from PIL import Image

from .decode import UnreadableImage, decode, eight_bits

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_IN_PNG = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_QUALITY = 95  # of a JPEG that has to be encoded again because of its size, unless the user says another


@dataclass(frozen=True)
class Encoding:
    """How images are changed: the longest side in pixels, and the JPEG quality (None: kept as they are)."""

    max_side: int | None = None
    quality: int | None = None


@dataclass(frozen=True)
class Encoded:
    """An image as it stands in a shard. `kind` is jpg, png or npy; sizes are (height, width)."""

    kind: str
    data: bytes
    original_size: tuple[int, int]
    size: tuple[int, int]
    channels: int


@dataclass(frozen=True)
class Sample:
    """The tar members of one sample, `segment`, and the image in it: its place, crc32 of its bytes, and kind."""

    segment: bytes
    offset: int
    kind: str
    size: int
    crc32: int
    label: int
    channels: int


@dataclass(frozen=True)
class Unreadable:
    """A source image that could not be put in a shard, and why."""

    name: str
    reason: str


def tar_member(name: str, data: bytes) -> bytes:
    """Header, `data` and padding of one file in a tar: the same bytes wherever and whenever; raises ValueError."""
    info = tarfile.TarInfo(name)  # its defaults: mode 644, no owner, time 0
    info.size = len(data)
    header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    return b"".join((header, data, bytes(-len(data) % 512)))


def pack(key: str, members: dict[str, bytes]) -> bytes:
    """The members `KEY.suffix` of one sample, in the order given."""
    return b"".join(tar_member(f"{key}.{suffix}", data) for suffix, data in members.items())


def make_sample(key: str, image: Encoded, label: int, about: dict[str, Any]) -> Sample:
    """The sample of an encoded image; `about` and the sizes become its `.json`, and a label of -1 has no `.cls`."""
    facts = {**about, "height": image.original_size[0], "width": image.original_size[1]}
    if image.size != image.original_size:
        facts.update(stored_height=image.size[0], stored_width=image.size[1])
    members = {image.kind: image.data}
    if label != -1:
        members["cls"] = str(label).encode()
    members["json"] = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    crc32 = zlib.crc32(image.data)
    return Sample(pack(key, members), 512, image.kind, len(image.data), crc32, label, image.channels)


def _in_own_depth(data: bytes, name: str) -> tuple[np.ndarray, str]:
    """An image file as `[H, W, C]` in its own depth, and its Pillow mode (empty where Pillow has none)."""
    pixels = decode(data, None, name)  # refuses what training would refuse
    if data[:6] == b"\x93NUMPY":
        array = np.load(io.BytesIO(data), allow_pickle=False)
        return array if array.ndim == 3 else array[..., None], ""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode in _SIXTEEN_BIT:
                return np.asarray(image).astype(np.uint16)[..., None], image.mode
            if image.mode not in _IN_PNG and image.format in ("JPEG", "MPO"):
                return decode(data, 3, name), "RGB"  # CMYK as training sees it
            return pixels, image.mode
    except OSError:  # a TIFF that only tifffile reads
        return pixels, ""


def _shrink(array: np.ndarray, max_side: int) -> np.ndarray:
    """The image with its longest side at `max_side`, in its own depth; bicubic, antialiased, channel by channel."""
    height, width = array.shape[:2]
    scale = max_side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if array.dtype == np.uint8 and array.shape[2] in (1, 3):
        image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
        small = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        return small if small.ndim == 3 else small[..., None]
    if array.dtype == np.bool_:
        array = eight_bits(array)
    channels = [
        np.asarray(Image.fromarray(array[..., c].astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
        for c in range(array.shape[2])
    ]
    small = np.stack(channels, axis=-1)
    if np.issubdtype(array.dtype, np.floating):
        return small.clip(0, 1).astype(array.dtype)
    return np.rint(small).clip(0, np.iinfo(array.dtype).max).astype(array.dtype)


def _encode(array: np.ndarray, quality: int | None, alpha: bool) -> tuple[str, bytes]:
    """8-bit grey and RGB as JPEG where there is a quality, else as PNG; other images as .npy (PNG with `alpha`)."""
    buffer = io.BytesIO()
    channels = array.shape[2]
    if array.dtype == np.uint8 and (channels in (1, 3) or (alpha and channels in (2, 4))):
        image = Image.fromarray(array[..., 0] if channels == 1 else array)
        if quality is not None and channels in (1, 3):
            image.save(buffer, "JPEG", quality=quality)
            return "jpg", buffer.getvalue()
        image.save(buffer, "PNG")
        return "png", buffer.getvalue()
    np.save(buffer, array, allow_pickle=False)
    return "npy", buffer.getvalue()


def encode_array(array: np.ndarray, encoding: Encoding) -> Encoded:
    """A uint8 `[H, W, C]` image, losslessly unless `encoding` asks for JPEG."""
    original = array.shape[0], array.shape[1]
    if encoding.max_side and max(original) > encoding.max_side:
        array = _shrink(array, encoding.max_side)
    kind, data = _encode(array, encoding.quality, alpha=False)
    return Encoded(kind, data, original, (array.shape[0], array.shape[1]), array.shape[2])


def encode_file(data: bytes, encoding: Encoding, name: str = "image") -> Encoded:
    """The bytes of an image file, kept as they are where they can be; raises `UnreadableImage`.

    JPEG, PNG and .npy files are kept unless `encoding` asks for another size or quality; PNGs of 16 bits become .npy.
    Other formats become PNG where Pillow reads 8 bits, grey or RGB, with or without alpha, and .npy otherwise.
    """
    jpeg, png, npy = data[:3] == b"\xff\xd8\xff", data[:8] == b"\x89PNG\r\n\x1a\n", data[:6] == b"\x93NUMPY"
    if encoding == Encoding() and (jpeg or (png and data[24:25] != b"\x10")):  # the usual case, decoded only once
        height, width, channels = decode(data, None, name).shape
        return Encoded("jpg" if jpeg else "png", data, (height, width), (height, width), min(channels, 3 + png))
    array, mode = _in_own_depth(data, name)
    original, channels = (array.shape[0], array.shape[1]), array.shape[2]
    too_large = bool(encoding.max_side) and max(original) > encoding.max_side
    wide = mode in _SIXTEEN_BIT
    if not too_large and (encoding.quality is None or npy or wide or channels not in (1, 3)):
        kept = "jpg" if jpeg else "png" if png and not wide else "npy" if npy else None
        if kept:
            return Encoded(kept, data, original, original, channels)
    if too_large:
        array = _shrink(array, encoding.max_side or 0)
    quality = encoding.quality if encoding.quality is not None else _QUALITY if jpeg else None
    kind, data = _encode(array, quality, alpha=mode in _IN_PNG)
    return Encoded(kind, data, original, (array.shape[0], array.shape[1]), channels)


def sample_of(key: str, image: bytes | np.ndarray, label: int, about: dict[str, Any], encoding: Encoding) -> Sample:
    """The sample of an image file's bytes or of a uint8 `[H, W, C]` array; raises `UnreadableImage`."""
    try:
        if isinstance(image, bytes):
            encoded = encode_file(image, encoding, about["path"])
            about = {**about, "bytes": len(image)}
        else:
            encoded = encode_array(image, encoding)
    except (OSError, ValueError) as error:  # an encoder's refusal, as of a JPEG of more than 65,500 pixels a side
        raise UnreadableImage(about["path"], f"cannot be encoded ({error})") from None
    return make_sample(key, encoded, label, about)


@dataclass(frozen=True)
class Task:
    """One image to put in a shard: a file's path, or a place in a source that then also tells the label."""

    key: str
    name: str
    label: int
    image: str | int


def encode_task(task: Task, source: Any, classes: list[str] | None, encoding: Encoding) -> Sample | Unreadable:
    """The sample of a task; `source` is read where the task names a place in it."""
    label = task.label
    try:
        if isinstance(task.image, str):
            with open(task.image, "rb", buffering=0) as file:
                image = file.read()
        else:
            # Shards hand over their files, so that nothing is encoded a second time.
            image = getattr(source, "read_bytes", source.read)(task.image)
            label = source.label(task.image)
        about = {"path": task.name}
        if classes and 0 <= label < len(classes):
            about["class"] = classes[label]
        return sample_of(task.key, image, label, about, encoding)
    except UnreadableImage as error:
        return Unreadable(task.name, error.reason)
    except OSError as error:
        return Unreadable(task.name, error.strerror or str(error))


_process: tuple[Callable[..., Any], tuple[Any, ...]] | None = None


def start_process(encode: Callable[..., Any], given: tuple[Any, ...]) -> None:
    """Make this a writer process: it leaves Ctrl-C to its parent, and does not outlive it."""
    global _process
    _process = encode, given
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def run_tasks(tasks: list[Task]) -> list[Any]:
    """What becomes of `tasks`, in a process that `start_process` made."""
    assert _process is not None
    encode, given = _process
    return [encode(task, *given) for task in tasks]
