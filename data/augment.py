"""What happens to a decoded image before it enters a batch: uint8 HWC in, uint8 CHW of the wanted size out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from .decode import luma
from .streams import uniforms

_TRIES = 10  # of RandomResizedCrop, as in torchvision
_CROP, _LOOK = 2 * _TRIES + 2, 13  # random numbers of a view: of its place, and of how it looks
_INTERPOLATIONS = ("bilinear", "bicubic")


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _check_interpolation(interpolation: str) -> None:
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(f"interpolation={interpolation!r} is unknown: choose one of {', '.join(_INTERPOLATIONS)}.")


def _planes(image: np.ndarray) -> Tensor:
    """A writable copy of `[H, W, C]` as `[C, H, W]`."""
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))


def _pixels(planes: Tensor) -> np.ndarray:
    """`[C, H, W]` as an array `[H, W, C]`, which Pillow takes."""
    return np.ascontiguousarray(planes.numpy().transpose(1, 2, 0))


def resize(image: np.ndarray, size: tuple[int, int], interpolation: str) -> Tensor:
    """Antialiased resize, uint8 `[H, W, C]` -> uint8 `[C, *size]`, new memory; Pillow's pixels up to rounding."""
    if image.shape[:2] == tuple(size):
        return _planes(image)
    # Copied because torch wants writable memory and whole rows; a crop is neither.
    pixels = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(pixels, size=size, mode=interpolation, antialias=True)[0].contiguous()


def crop_box(
    height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float], u: np.ndarray
) -> tuple[int, int, int, int]:
    """`(top, left, height, width)` of a random crop, distributed as torchvision's `RandomResizedCrop.get_params`.

    `u` holds 22 uniform numbers: area and aspect of each of ten tries, then the place. `aspect` is width / height.
    """
    for try_ in range(_TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u[2 * try_])
        ratio = math.exp(math.log(aspect[0]) + (math.log(aspect[1]) - math.log(aspect[0])) * u[2 * try_ + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            place = u[2 * _TRIES :]
            return int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1)), h, w
    h, w = height, width
    if width / height < aspect[0]:
        h = max(1, round(width / aspect[0]))
    elif width / height > aspect[1]:
        w = max(1, round(height * aspect[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def blur(planes: Tensor, radius: float) -> Tensor:
    """Pillow's GaussianBlur of `radius` pixels on uint8 `[C, H, W]`, any number of channels."""
    kernel = ImageFilter.GaussianBlur(radius)
    # Pillow blurs bands independently; plane by plane is quicker than packing RGB into its 4-byte pixels.
    return torch.from_numpy(np.stack([np.asarray(Image.fromarray(plane).filter(kernel)) for plane in planes.numpy()]))


def grayscale(planes: Tensor) -> Tensor:
    """uint8 `[C, H, W]` -> its one grey plane `[1, H, W]`: luma of RGB, the mean of other channel counts."""
    if planes.shape[0] == 1:
        return planes
    if planes.shape[0] == 3:
        return torch.from_numpy(luma(planes.numpy().transpose(1, 2, 0))[None, ..., 0])
    return planes.float().mean(dim=0, keepdim=True).round().to(torch.uint8)


def _shift_hue(image: Image.Image, shift: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.array(int(shift * 255) % 256, dtype=np.uint8)  # hue is a circle: let it wrap
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def colour_jitter(image: np.ndarray, factors: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Brightness, contrast, saturation and hue of uint8 `[H, W, C]` changed one after the other in `order`.

    `factors` are (brightness, contrast, saturation, hue): 1, 1, 1, 0 change nothing; hue is in turns, -0.5…0.5.
    RGB gives torchvision's pixels for Pillow images; other channel counts have no saturation and no hue.
    """
    if image.shape[2] == 3:
        picture = Image.fromarray(image)
        for what in order:
            if what == 3:
                picture = _shift_hue(picture, float(factors[3]))
            else:
                enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[what]
                picture = enhance(picture).enhance(float(factors[what]))
        return np.asarray(picture)
    for what in order:
        if what < 2:
            centre = 0.0 if what == 0 else float(np.rint(image.mean()))
            moved = centre + (image.astype(np.float32) - centre) * float(factors[what])
            image = np.clip(moved, 0, 255).astype(np.uint8)
    return image


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The training views: random resized crop, flip, colour jitter, grayscale, blur, in I-JEPA's order.

    `size` is (height, width) in pixels, `crop_scale` a share of the image's area, `crop_aspect` width / height of
    the crop (whatever the size), `blur_radius` in pixels; `flip`, `blur`, `grayscale` are probabilities.
    `colour_jitter` is SimCLR's strength s: ranges 0.8s, 0.8s, 0.8s and 0.2s, with `colour_jitter_probability`.
    `views` is how many an image gives, independent of one another (AdPE's multi-crop: 4 of 112 pixels). With
    `on_device` everything after the crop is left to `device_augment.finish`, which does it for a whole batch.
    Raises ValueError for values out of range.
    """

    size: int | tuple[int, int]
    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    flip: float = 0.5
    blur: float = 0.5
    blur_radius: tuple[float, float] = (0.1, 2.0)
    grayscale: float = 0.2
    colour_jitter: float = 0.0
    colour_jitter_probability: float = 0.8
    views: int = 1
    on_device: bool = False

    def __post_init__(self):
        _check_interpolation(self.interpolation)
        if min(_height_width(self.size)) < 1:
            raise ValueError(f"size={self.size} is empty: give height and width in pixels.")
        for field in ("flip", "blur", "grayscale", "colour_jitter_probability"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field}={getattr(self, field)} is a probability: choose 0 … 1.")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"data.crop_scale={self.crop_scale} is a share of the area: choose 0 < low <= high <= 1.")
        if not 0 < self.crop_aspect[0] <= self.crop_aspect[1]:
            raise ValueError(f"data.crop_aspect={self.crop_aspect} is width / height: choose 0 < low <= high.")
        if not 0 <= self.blur_radius[0] <= self.blur_radius[1]:
            raise ValueError(f"blur_radius={self.blur_radius} is in pixels: choose 0 <= low <= high.")
        if not 0 <= self.colour_jitter <= 2.5:
            raise ValueError(f"data.colour_jitter={self.colour_jitter} is out of range: choose 0 … 2.5.")
        if self.views < 1:
            raise ValueError(f"data.views={self.views} leaves no crop of an image: choose 1 or more.")

    def numbers(self, seed: int, epochs: np.ndarray, sample_ids: np.ndarray) -> np.ndarray:
        """The random numbers of samples `[B]` in `epochs` `[B]`: `[B, V, 35]`, for each view its own.

        More views leave the numbers of the first ones as they were.
        """
        count = _CROP + _LOOK
        drawn = uniforms(seed, "augment", epochs, sample_ids, count * self.views)
        return drawn.reshape(len(sample_ids), self.views, count)

    def left_for_device(self, numbers: np.ndarray) -> Tensor | None:
        """What `finish` needs of `numbers` `[B, V, 35]`: `[B, V, 13]`, or None where nothing is left to do."""
        return torch.from_numpy(numbers[..., _CROP:].copy()) if self.on_device and self.changes_looks else None

    @property
    def changes_looks(self) -> bool:
        """Whether anything is done after the crop."""
        return any((self.flip, self.colour_jitter * self.colour_jitter_probability, self.grayscale, self.blur))

    def __call__(self, image: np.ndarray, numbers: np.ndarray) -> Tensor:
        """uint8 `[H, W, C]` and its `numbers` `[V, 35]` -> uint8 `[C, *size]`, or `[V, C, *size]` of several views."""
        # All numbers are drawn whether used or not, so that switching one augmentation leaves the others alone.
        views = [self._view(image, u) for u in numbers]
        return views[0] if self.views == 1 else torch.stack(views)

    def _view(self, image: np.ndarray, u: np.ndarray) -> Tensor:
        """One view `[C, *size]` from its 35 uniform numbers."""
        height, width = image.shape[:2]
        top, left, h, w = crop_box(height, width, self.crop_scale, self.crop_aspect, u[:_CROP])
        view = resize(image[top : top + h, left : left + w], _height_width(self.size), self.interpolation)
        return view if self.on_device else self._look(view, u[_CROP:])

    @property
    def jitter_bounds(self) -> list[tuple[float, float]]:
        """Least and greatest brightness, contrast, saturation and hue, as `colour_jitter` takes them."""
        colour, hue = self.colour_jitter * 0.8, self.colour_jitter * 0.2
        return [(max(0.0, 1.0 - colour), 1.0 + colour)] * 3 + [(-hue, hue)]

    def _look(self, view: Tensor, u: np.ndarray) -> Tensor:
        """The view flipped, jittered, greyed, blurred by its 13 numbers: flip 1, jitter 1 + 4 + 4, grey 1, blur 2."""
        flip, jitter, factors, order = u[0], u[1], u[2:6], u[6:10]
        grey, blurred, radius = u[10:]
        channels = view.shape[0]
        if flip < self.flip:
            view = view.flip(2)
        if self.colour_jitter and jitter < self.colour_jitter_probability:
            low, high = np.array(self.jitter_bounds).T
            view = _planes(colour_jitter(_pixels(view), low + (high - low) * factors, np.argsort(order)))
        if grey < self.grayscale:
            view = grayscale(view)
        if blurred < self.blur:
            # One grey plane is blurred before it is repeated: the same pixels for a third of the work.
            view = blur(view, self.blur_radius[0] + (self.blur_radius[1] - self.blur_radius[0]) * float(radius))
        return view if view.shape[0] == channels else view.repeat(channels, 1, 1)


def evaluation_view(image: np.ndarray, size: int | tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """The deterministic view, uint8 `[H, W, C]` -> uint8 `[C, *size]`: resize to cover 8/7 of `size`, centre crop.

    8/7 is the usual 256 for 224. An image no larger than `size` (digits, CIFAR) is shown whole, and unchanged if it
    has that size already: cutting a border off what must be enlarged loses more than it gains.
    """
    height, width = _height_width(size)
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return _planes(image)
    tall, wide = (height * 8 // 7, width * 8 // 7) if h > height or w > width else (height, width)
    upright = tall * w >= wide * h
    resized = (tall, max(wide, tall * w // h)) if upright else (max(tall, wide * h // w), wide)
    top, left = round((resized[0] - height) / 2), round((resized[1] - width) / 2)
    return resize(image, resized, interpolation)[:, top : top + height, left : left + width].contiguous()
