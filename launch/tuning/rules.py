"""The rules by which a recipe is fitted to other images and GPUs: numbers in, numbers out.

Those with a source in their docstring are published; the others are rules of thumb, as is where each is applied.
"""

from __future__ import annotations

import math

IMAGES_FOR = {"tiny": 20_000, "small": 100_000}  # fewer images than this: an encoder no larger
LEAST_BATCH = 256  # per which MAE and AdPE give their learning rates
STEPS_AN_EPOCH = 8  # at least, or an epoch's last batch would hold much of the next
TEACHER_SHARE = 0.1  # of all steps, over which the teacher forgets at most
WARMUP_SHARE = 0.2  # of all steps, at most
SMALLEST_BLURRED = 64  # pixels


def rounded(value: float, digits: int = 3) -> float:
    """A number with so many significant digits."""
    return float(f"{value:.{digits}g}")


def nearest_patch(size: int, patch: int, grid: int) -> int | None:
    """The divisor of `size` that keeps the grid nearest to `grid`, but no patch larger than `patch`; of two the larger.

    None where it leaves fewer than half or more than twice the patches along a side, larger images apart.
    """
    # An image larger than the recipe's keeps its patch, and has more of them: nothing is gained by blurring it.
    wanted = min(patch, size / grid)
    divisors = [p for p in range(1, min(size, patch) + 1) if size % p == 0]
    best = min(reversed(divisors), key=lambda p: abs(math.log(p / wanted)))
    return best if 0.5 < wanted / best < 2 else None


def share_of_patches(count: int, patches: int, before: int) -> int:
    """As large a share of `patches` as `count` is of `before`."""
    return max(1, round(count * patches / before))


def encoder_for(images: int, size: str) -> str:
    """A smaller encoder where there are few images; only `base` gives way, since larger recipes differ in more."""
    if size != "base":
        return size
    return next((name for name, most in IMAGES_FOR.items() if images < most), size)


def predictor_width(encoder: int, before: int) -> int:
    """Half the encoder's width, as 384 of 768 (StoP, I-JEPA ViT-B), and no more than the recipe's."""
    return min(before, encoder // 2)


def decoder_size(encoder: int, before: int) -> tuple[int, int]:
    """Two thirds of the encoder's width in heads of 32, as 512 of 768 (MAE, AdPE ViT-B): (width, heads)."""
    width = min(before, encoder * 2 // 3 // 32 * 32)
    return width, width // 32


def epochs_for(images: int, published_epochs: float, published_images: int, length: str) -> int:
    """Epochs of `images`: as many `epochs`, as many `samples` seen, or the geometric mean of the two (`between`).

    With more images than published, `between` sees as many samples. Two significant digits, at least one epoch.
    """
    same = published_epochs * published_images / images
    if length == "epochs":
        found = published_epochs
    elif length == "samples" or images >= published_images:
        found = same
    else:
        found = math.sqrt(published_epochs * same)
    return max(1, round(rounded(found, 2)))


def batch_for(published: int, images: int, gpus: int, fits: int) -> int | None:
    """Images of an optimiser step: `gpus` times the largest power of two that none of three bounds forbids.

    They are the published batch, an epoch of eight steps, and what `gpus` hold at once (`fits` each) or 256, whichever
    is more. None where that is less than one image a GPU.
    """
    bound = min(published, images // STEPS_AN_EPOCH, max(gpus * fits, LEAST_BATCH))
    return gpus * 2 ** int(math.log2(bound / gpus)) if bound >= gpus else None


def scaled_momentum(momentum: float, batch: int, published: int) -> float:
    """Momentum of a moving average at another batch: m ** (batch / published) (Busbridge et al. 2023, EMA scaling)."""
    return momentum ** (batch / published)


def teacher_momentum(momentum: float, batch: int, published: int, steps: int) -> float:
    """The scaled momentum, but so that the teacher forgets its start within a tenth of all steps.

    That never makes it forget faster per step than the recipe's: a teacher that follows too fast collapses.
    """
    scaled = scaled_momentum(momentum, batch, published)
    slowest = 1 - 1 / max(1.0, TEACHER_SHARE * steps)
    return min(scaled, max(slowest, momentum)) if scaled > momentum else scaled


def adam_warmup(beta2: float) -> float:
    """Steps of linear warm-up that Adam's second moment asks for: 2 / (1 - β₂) (Ma and Yarats 2021)."""
    return 2 / (1 - beta2)


def warmup_steps(steps: int, share: float, beta2: float) -> float:
    """The recipe's share of all steps, or what Adam asks for where that is more, but a fifth of the steps at most."""
    return min(max(share * steps, adam_warmup(beta2)), max(share, WARMUP_SHARE) * steps)
