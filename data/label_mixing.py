"""What fine-tuning does to images and labels beyond a crop: RandAugment, random erasing, mixup and cutmix, by timm.

timm draws from the global generators of Python, NumPy and torch. Here each is seeded before a draw with what the draw
is for, and put back afterwards, so that a batch is a function of the seed and of what it holds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from .augment import Augment
from .batch import Batch
from .streams import uniforms, words


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """The global generators of Python, NumPy and, where a `device` is named, torch, begun with a 32-bit `seed`."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        if device is None:
            yield
        else:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@lru_cache(maxsize=4)
def _policy(policy: str, size: int, fill: tuple[int, int, int], interpolation: str):
    """timm's transform, which is the same for all images; raises what timm raises for a policy it does not know."""
    if not policy.startswith("rand"):
        raise ValueError(policy)
    # As timm's own transforms: translations up to 45 % of the side.
    hints = {"translate_const": int(size * 0.45), "img_mean": fill}
    if interpolation == "bicubic":
        hints["interpolation"] = Image.Resampling.BICUBIC
    return rand_augment_transform(policy, hints)


@dataclass(frozen=True, kw_only=True)
class RandAugmented(Augment):
    """The training view of fine-tuning: `Augment`'s, then timm's RandAugment of `policy`, e.g. rand-m9-mstd0.5-inc1.

    Raises ValueError for a policy that timm does not know, and for images that are not RGB.
    """

    policy: str = "rand-m9-mstd0.5-inc1"
    fill: tuple[int, int, int] = (124, 116, 104)  # ImageNet's mean, where a picture is moved out of its frame

    def __post_init__(self):
        super().__post_init__()
        if self.on_device:
            raise ValueError("loader.augment=device does not go with data.rand_augment; use loader.augment=workers.")
        try:
            self._transform()
        except (AssertionError, KeyError, ValueError, IndexError) as error:
            raise ValueError(
                f"data.rand_augment={self.policy} is not a policy of timm; write one like rand-m9-mstd0.5-inc1."
            ) from error

    def _transform(self):
        size = self.size if isinstance(self.size, int) else min(self.size)
        return _policy(self.policy, size, self.fill, self.interpolation)

    def numbers(self, seed: int, epochs: np.ndarray, sample_ids: np.ndarray) -> np.ndarray:
        """As `Augment`'s, `[B, V, 36]`: the last number of a view begins its RandAugment."""
        first = super().numbers(seed, epochs, sample_ids)
        more = uniforms(seed, "rand augment", epochs, sample_ids, self.views)
        return np.concatenate([first, more[..., None]], axis=2)

    def __call__(self, image: np.ndarray, numbers: np.ndarray) -> Tensor:
        if image.shape[2] != 3:
            raise ValueError("data.rand_augment needs RGB images; set data.rand_augment=null for other channels.")
        transform, views = self._transform(), []
        for u in numbers:
            view = self._view(image, u[:-1])
            with seeded(int(u[-1] * 2**32)):
                changed = transform(Image.fromarray(view.permute(1, 2, 0).numpy()))
            views.append(torch.from_numpy(np.array(changed)).permute(2, 0, 1).contiguous())
        return views[0] if self.views == 1 else torch.stack(views)


class LabelMixing:
    """Random erasing of each image, then mixup or cutmix of a micro-batch, with soft labels: `Batch` to `Batch`.

    Images become float32 in 0…255, as the erased part is normal noise of the pixels' `mean` and `std`. Mixup pairs the
    images of a micro-batch, so that its size belongs to the result. Raises ValueError for an odd `micro_batch` that is
    to be mixed.
    """

    def __init__(
        self,
        seed: int,
        classes: int,
        micro_batch: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        erase: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
    ):
        self.seed, self.classes, self.erase, self.smoothing = seed, classes, erase, label_smoothing
        self.mixes = mixup > 0 or cutmix > 0
        if self.mixes and micro_batch % 2:
            raise ValueError(
                f"data.mixup and data.cutmix pair images, and a micro-batch of {micro_batch} is odd; choose an even "
                "optim.batch_size or loader.micro_batch, or set both to 0."
            )
        self._mix = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=classes) if self.mixes else None
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, batch: Batch, host: Batch | None = None) -> Batch:
        """The batch on its device; `host` is the same on the host (default: it is there already)."""
        images, truth, host = batch.images, None, host or batch
        if self.erase:
            images = self._erased(batch, host)
        if self._mix is not None:
            with seeded(self._of_batch(host)):
                images, truth = self._mix(images.float(), batch.labels)
        elif self.smoothing:
            even = self.smoothing / self.classes
            truth = torch.full((len(batch), self.classes), even, device=images.device)
            truth.scatter_add_(1, batch.labels[:, None], torch.full_like(truth[:, :1], 1 - self.smoothing))
        return replace(batch, images=images, truth=truth)

    def _of_batch(self, batch: Batch) -> int:
        """A seed of a micro-batch: its first image and the step, and so no other's."""
        return int(words(self.seed, "mixing", batch.step % 2**20, batch.sample_ids[:1].numpy(), 1)[0, 0])

    def _erased(self, batch: Batch, host: Batch) -> Tensor:
        device = batch.images.device
        mean, std = self.mean.to(device), self.std.to(device)
        images = (batch.images.float() / 255 - mean) / std
        erase = RandomErasing(self.erase, mode="pixel", device=str(device))
        seeds = words(self.seed, "erasing", host.epochs.numpy(), host.sample_ids.numpy(), 1)[:, 0]
        for image, seed in zip(images, seeds.tolist(), strict=True):
            with seeded(seed, device):
                erase(image)
        return (images * std + mean) * 255
