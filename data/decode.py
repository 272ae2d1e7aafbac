"""Image files to uint8 HWC arrays with the number of channels that a recipe wants."""

from __future__ import annotations

import io
import os

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class UnreadableImage(Exception):
    """One image cannot be used: `path` says which, `reason` why; a loader skips it or stops, as configured."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def luma(image: np.ndarray) -> np.ndarray:
    """Brightness of an RGB image, `[H, W, 3]` uint8 -> `[H, W, 1]` uint8, by Pillow's own integer weights."""
    red, green, blue = (image[..., i].astype(np.uint32) for i in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)[..., None]


def to_channels(image: np.ndarray, channels: int, name: str = "image") -> np.ndarray:
    """The uint8 `[H, W, C]` image with `channels` channels: grey is repeated to RGB, RGB becomes luma.

    Raises `UnreadableImage` for any other change of the number of channels.
    """
    own = image.shape[2]
    if own == channels:
        return image
    if own == 1 and channels == 3:
        return np.repeat(image, 3, axis=2)
    if own == 3 and channels == 1:
        return luma(image)
    raise UnreadableImage(name, f"has {own} channel{'s' * (own != 1)}, but the recipe expects {channels}")


def eight_bits(image: np.ndarray, name: str = "image") -> np.ndarray:
    """`[H, W]` or `[H, W, C]` of bool, uint8, uint16, or float in 0…1 -> `[H, W, C]` uint8.

    Raises `UnreadableImage` for other types, for floats outside 0…1 and for empty images.
    """
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or 0 in image.shape:
        raise UnreadableImage(name, f"has shape {tuple(image.shape)}, but an image is height x width x channels")
    if image.dtype == np.uint8:
        return image
    if image.dtype == np.bool_:
        return image.astype(np.uint8) * 255
    if image.dtype == np.uint16:
        # The high byte, as Pillow does for 16-bit RGB; 257 * v goes back to v.
        return (image >> 8).astype(np.uint8)
    if np.issubdtype(image.dtype, np.floating):
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):
            raise UnreadableImage(
                name, f"has float values from {low:.3g} to {high:.3g}, but floats must be in 0…1 (no Normalize here)"
            )
        return np.rint(image.astype(np.float32) * 255).astype(np.uint8)
    raise UnreadableImage(name, f"has {image.dtype} values: give uint8, uint16, or float in 0…1")


def from_pil(image: Image.Image, channels: int | None, name: str = "image") -> np.ndarray:
    """A Pillow image -> uint8 `[H, W, channels]`; `channels=None` keeps the image's own.

    3 channels are `convert("RGB")` and 1 is `convert("L")`; EXIF orientation is not applied, as in torchvision's
    ImageFolder. 16-bit grey is scaled down, where Pillow's `convert` would clip it. Raises `UnreadableImage` for
    another number of channels than the image has, and OSError where Pillow does.
    """
    if image.mode in _SIXTEEN_BIT:
        wide = np.asarray(image).astype(np.int64)
        if wide.size and not (wide.min() >= 0 and wide.max() <= 0xFFFF):
            raise UnreadableImage(name, "has 32-bit integer pixels of unknown range: save it with 8 or 16 bits")
        return to_channels(eight_bits(wide.astype(np.uint16), name), channels or 1, name)
    if image.mode == "F":
        raise UnreadableImage(name, "has float pixels of unknown range: save it with 8 or 16 bits")
    if channels in (1, 3):
        wanted = "L" if channels == 1 else "RGB"
    elif image.mode in ("P", "PA"):
        wanted = "RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB"
    else:
        wanted = "L" if image.mode == "1" else image.mode
    # `convert` to the same mode would copy the image.
    pixels = np.asarray(image if image.mode == wanted else image.convert(wanted))
    return to_channels(eight_bits(pixels, name), channels or (1 if pixels.ndim == 2 else pixels.shape[2]), name)


def decode(data: bytes, channels: int | None, name: str = "image") -> np.ndarray:
    """The bytes of an image file -> uint8 `[H, W, channels]` (`None`: its own); the array may be read-only.

    Takes what Pillow reads, TIFF of any number of channels (through tifffile) and `.npy` of HWC or HW.
    Raises `UnreadableImage` for empty, truncated, unknown or unfitting files.
    """
    if not data:
        raise UnreadableImage(name, "the file is empty")
    try:
        if data[:6] == b"\x93NUMPY":
            return _from_array(np.load(io.BytesIO(data), allow_pickle=False), channels, name)
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _decode_tiff(data, channels, name)
        if data[:3] == b"\xff\xd8\xff":
            image = _decode_jpeg(data, channels, name)
            if image is not None:
                return image
        with Image.open(io.BytesIO(data)) as image:
            return from_pil(image, channels, name)
    except (UnreadableImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(name, "not an image in a known format") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... for broken files
        raise UnreadableImage(name, " ".join(str(error).split()) or type(error).__name__) from None


def read_image(path: str, channels: int | None) -> np.ndarray:
    """The image file at `path` as uint8 `[H, W, channels]` (see `decode`); raises `UnreadableImage`."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read()
    except OSError as error:
        raise UnreadableImage(os.fspath(path), error.strerror or str(error)) from None
    return decode(data, channels, os.fspath(path))


def _decode_jpeg(data: bytes, channels: int | None, name: str) -> np.ndarray | None:
    """Pillow's pixels of a grey or colour JPEG in half its time; None for what is better left to Pillow."""
    try:
        kind = simplejpeg.decode_jpeg_header(data)[2]
        if kind not in ("Gray", "YCbCr", "RGB"):
            return None  # CMYK
        # Brightness is Pillow's of the RGB pixels, not the file's own.
        grey = kind == "Gray" and channels != 3
        image = simplejpeg.decode_jpeg(data, colorspace="GRAY" if grey else "RGB")
    except ValueError:
        return None  # damaged or unusual: Pillow decides, and says what is wrong
    return to_channels(image, channels or image.shape[2], name)


def _from_array(array: np.ndarray, channels: int | None, name: str) -> np.ndarray:
    image = eight_bits(array, name)
    return to_channels(image, channels or image.shape[2], name)


def _decode_tiff(data: bytes, channels: int | None, name: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if getattr(image, "n_frames", 1) == 1 or channels in (None, 1, 3):
                return from_pil(image, channels, name)
    except UnidentifiedImageError:
        pass  # Pillow knows no TIFF with 5 channels or with 16 bits in each of several
    try:
        import tifffile  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UnreadableImage(name, "a TIFF that Pillow cannot read: `pip install tifffile` may help") from None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        array = series.asarray()
        # Axes are named Y, X and one more: samples (S) in front when planar, pages or others (I, Q, C, Z) too.
        if array.ndim == 3 and series.axes.endswith("YX"):
            array = np.moveaxis(array, 0, -1)
    return _from_array(array, channels, name)
