"""The looks of `Augment` for a whole batch on its device: uint8 in, uint8 out, Pillow's arithmetic in torch.

No step waits for a GPU: nothing is read back and no shape depends on a random number. There every operation is done to
all samples and kept for those that drew it; on a CPU, where looking costs nothing, it is done to these alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from .augment import Augment

_BOXES = 3  # box blurs that Pillow makes a Gaussian of
# Values worked on at once: float32 temporaries are five times 128 MiB on a device, and stay in the cache of a CPU.
_AT_ONCE, _AT_ONCE_CPU = 1 << 25, 1 << 20


def finish(images: Tensor, look: Tensor, augment: Augment) -> Tensor:
    """uint8 `[B, C, H, W]` or `[B, V, C, H, W]` flipped, jittered, greyed and blurred as `augment` does on a CPU.

    `look` `[B, V, 13]` float64 are the random numbers that `augment.left_for_device` gives, on the images' device.
    Returns new images of the same shape: Pillow's pixels, but for a level where float32 falls on the other side of a
    half. The first call for a device copies tables to it and waits for that.
    """
    views, numbers = images.flatten(0, -4), look.flatten(0, 1)  # [N, C, H, W], [N, 13]
    at_once = max(1, (_AT_ONCE_CPU if _can_choose(images) else _AT_ONCE) // max(1, math.prod(views.shape[1:])))
    chunks = zip(views.split(at_once), numbers.split(at_once), strict=True)
    return torch.cat([_finish(some, u, augment) for some, u in chunks]).view(images.shape)


def _can_choose(tensor: Tensor) -> bool:
    """Whether random numbers may decide shapes; on a GPU the host would have to wait for them."""
    return tensor.device.type == "cpu"


def _where(chosen: Tensor, images: Tensor, change: Callable[..., Tensor], *numbers: Tensor) -> Tensor:
    """`change(images, *numbers)` where `chosen` `[N]`, the other images as they are; each of `numbers` is `[N, …]`."""
    if not _can_choose(images):
        return torch.where(chosen[:, None, None, None], change(images, *numbers), images)
    rows = chosen.nonzero()[:, 0]
    if len(rows) == 0:
        return images
    return images.index_copy(0, rows, change(images[rows], *(number[rows] for number in numbers)))


def _finish(images: Tensor, numbers: Tensor, augment: Augment) -> Tensor:
    """`Augment._look` of views `[N, C, H, W]` by their numbers `[N, 13]`."""
    flip, jitter, factors, order = numbers[:, 0], numbers[:, 1], numbers[:, 2:6], numbers[:, 6:10]
    grey, blurred, radius = numbers[:, 10:].unbind(1)
    if augment.flip:
        images = _where(flip < augment.flip, images, lambda views: views.flip(3))
    if augment.colour_jitter and augment.colour_jitter_probability:
        # One by one: a tensor of the bounds would be a copy to the device for which the host waits.
        bounds = zip(augment.jitter_bounds, factors.unbind(1), strict=True)
        factors = torch.stack([low + (high - low) * u for (low, high), u in bounds], dim=1)
        images = _jitter(images, jitter < augment.colour_jitter_probability, factors, order.argsort(dim=1, stable=True))
    if augment.grayscale and images.shape[1] > 1:
        images = _where(grey < augment.grayscale, images, lambda views: _grey(views).expand_as(views))
    if augment.blur:
        low, high = augment.blur_radius
        weights = _box_weights(_box_radius(low + (high - low) * radius), math.ceil(high))
        images = _where(blurred < augment.blur, images, _blur, weights)
    return images


def _grey(images: Tensor) -> Tensor:
    """`augment.grayscale` of uint8 `[N, C, H, W]`: `[N, 1, H, W]`."""
    if images.shape[1] != 3:
        return images.float().mean(dim=1, keepdim=True).round().to(torch.uint8)
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000 >> 16).to(torch.uint8)


def _jitter(images: Tensor, chosen: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """`augment.colour_jitter` of the `chosen` `[N]`, with factors `[N, 4]` in `order` `[N, 4]` (0 … 3 in each row)."""
    colours = images.shape[1] == 3
    for what in order.unbind(1):
        images = _where(chosen & (what < (3 if colours else 2)), images, _blend, what, factors)
        if colours:
            images = _where(chosen & (what == 3), images, _turn_hue, factors[:, 3])
    return images


def _blend(images: Tensor, what: Tensor, factors: Tensor) -> Tensor:
    """Pillow's enhancements of uint8 `[N, C, H, W]`: blends with black, the mean or the greys where `what` is 0, 1, 2.

    `what` is `[N]`, `factors` are `[N, 4]`; rows with `what` 3 come out as anything.
    """
    count = math.prod(images.shape[2:])
    planes = images.float()
    if images.shape[1] == 3:
        grey = _grey(images)
        mean = (grey.sum((1, 2, 3)) * 2 + count) // (2 * count)  # Pillow rounds halves up
        centre = torch.where(_wide(what == 2), grey, _wide(mean * (what == 1))).float()
    else:
        mean = (images.sum((1, 2, 3)).double() / (images.shape[1] * count)).round()
        centre = _wide(mean * (what == 1)).float()
    factor = factors.gather(1, what[:, None])[:, 0].float()
    return (planes - centre).mul_(_wide(factor)).add_(centre).clamp_(0, 255).to(torch.uint8)


def _wide(numbers: Tensor) -> Tensor:
    """`[N]` as `[N, 1, 1, 1]`."""
    return numbers[:, None, None, None]


@cache
def _hue_tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hue, saturation and the way back, as Pillow's 8-bit HSV has them.

    Hue int32 by (greatest channel, chroma, 255 + difference of the other two) `[3 * 256 * 511]`; saturation in 0…1 by
    (greatest value, chroma) `[256 * 256]`; and by hue how much of the chroma each channel lacks, `[3, 256]`.
    """
    # Pillow's own conversion, tabulated: its rounding decides between neighbouring hues, up to 6 levels apart.
    which, chroma, differ = np.ogrid[0:3, 0:256, -255:256]
    least = 255 - chroma + 0 * (which + differ)
    after = np.clip(least + np.maximum(differ, 0), 0, 255)  # of the two that follow the greatest, cyclically
    last = np.clip(least + np.maximum(-differ, 0), 0, 255)
    around = np.stack([np.full_like(after, 255), after, last], axis=-1)
    rgb = np.stack([np.roll(around[i], i, axis=-1) for i in range(3)]).astype(np.uint8)
    hue = np.asarray(Image.fromarray(rgb.reshape(-1, 511, 3)).convert("HSV"))[..., 0]

    greatest, chroma = np.ogrid[0:256, 0:256]
    other = np.maximum(greatest - chroma, 0)
    rgb = np.stack(np.broadcast_arrays(greatest, other, other), axis=-1).astype(np.uint8)
    saturation = np.asarray(Image.fromarray(rgb).convert("HSV"))[..., 1]

    along = (np.array([[5.0], [3.0], [1.0]]) + np.arange(256) * 6 / 255) % 6
    lacking = np.clip(np.minimum(along, 4 - along), 0, 1)
    return (
        torch.tensor(hue.ravel(), dtype=torch.int32, device=device),
        torch.tensor(saturation.ravel() / 255, dtype=torch.float32, device=device),
        torch.tensor(lacking, dtype=torch.float32, device=device),
    )


def _turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Hue of uint8 `[N, 3, H, W]` moved by `turns` `[N]` (-0.5…0.5) through Pillow's 8-bit HSV."""
    hues, saturations, lacking = _hue_tables(images.device)
    red, green, blue = images.int().unbind(1)
    greatest = torch.maximum(torch.maximum(red, green), blue)
    chroma = greatest - torch.minimum(torch.minimum(red, green), blue)
    is_red, is_green = red == greatest, green == greatest
    differ = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    which = torch.where(is_red, 0, torch.where(is_green, 1, 2))
    hue = hues[(which * 256 + chroma) * 511 + differ + 255]
    saturation = saturations[greatest * 256 + chroma]
    hue = hue + (turns * 255).trunc().int()[:, None, None] & 255
    channels = [greatest * (1 - saturation * lack[hue]) for lack in lacking]
    return torch.stack(channels, dim=1).add_(0.5).to(torch.uint8)


def _box_radius(radius: Tensor) -> Tensor:
    """Radius in pixels, with its fraction, of the boxes that make a Gaussian of std `radius` `[N]`: never more than it.

    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering" (2011), equations 7, 11
    and 14.
    """
    variance = radius * radius / _BOXES
    whole = ((12 * variance + 1) ** 0.5 - 1) // 2
    share = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole + share / (6 * (variance - (whole + 1) ** 2))


def _box_weights(radius: Tensor, reach: int) -> Tensor:
    """Weights of the pixels 0 … `reach` away in boxes of `radius` `[N]`: float32 `[N, reach + 1]`."""
    one = 1 << 24  # Pillow's fixed point, in which it rounds the weights down
    whole = radius.floor()
    inner = (one / (2 * radius + 1)).floor()
    edge = ((one - (2 * whole + 1) * inner) / 2).floor()
    away = torch.arange(reach + 1, device=radius.device) - whole[:, None]
    return (torch.where(away <= 0, inner[:, None], edge[:, None] * (away == 1)) / one).float()


def _blur(images: Tensor, weights: Tensor) -> Tensor:
    """uint8 `[N, C, H, W]` blurred with boxes of `weights` `[N, reach + 1]`, edges replicated, rounded as Pillow."""
    # Each box rounds and replicates on its own: one kernel for the three would be no fewer operations, and differ.
    planes = images.float()
    for dim in (3, 2):
        for _ in range(_BOXES):
            planes = _box(planes, weights, dim)
    return planes.to(torch.uint8)


def _box(planes: Tensor, weights: Tensor, dim: int) -> Tensor:
    """One box along `dim` of whole float32 values `[N, C, H, W]`, rounded to whole values."""
    reach, size = weights.shape[1] - 1, planes.shape[dim]
    wide = pad(planes, (reach, reach, 0, 0) if dim == 3 else (0, 0, reach, reach), mode="replicate")
    total = planes * _wide(weights[:, 0])
    for away in range(1, reach + 1):
        both = wide.narrow(dim, reach - away, size) + wide.narrow(dim, reach + away, size)
        total.addcmul_(both, _wide(weights[:, away]))
    return total.add_(0.5).floor_()
