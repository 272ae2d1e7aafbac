"""Which patches of an image a masked autoencoder sees: a share of them, drawn uniformly and for each view alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .masks import Size
from .streams import words


@dataclass(frozen=True, kw_only=True)
class Visible:
    """The `Masks` of a masked autoencoder: what its encoder sees."""

    visible: np.ndarray  # [B, V, K] int64, ascending per row
    redraws: int = 0
    context: None = None
    targets: None = None


@dataclass
class RandomMasks:
    """Visible patches, uniform over all subsets of `keep` patches of the `grid` of (rows, columns).

    `ratio` is the share of patches that is masked, `views` the crops of each image, whose masks are independent. A
    mask is a function of (seed, epoch, sample id, view): neither the batch nor the number of views changes it.
    Raises ValueError for a ratio that masks no patch or all of them, and for less than one view.
    """

    grid: Size
    ratio: float
    views: int = 1

    def __post_init__(self) -> None:
        rows, cols = self.grid = (int(self.grid[0]), int(self.grid[1]))
        self.patches = patches = rows * cols
        if min(self.grid) < 1 or patches < 2:
            raise ValueError(
                f"A grid of {rows}×{cols} patches cannot be parted into visible and masked ones: choose a larger image "
                "or a smaller patch."
            )
        if self.views < 1:
            raise ValueError(f"data.views={self.views} leaves no crop of an image: choose 1 or more.")
        # The released int(L * (1 - ratio)), but 100 patches at 0.9 are 9.999…98 to it: nobody means 9.
        self.keep: int = int(patches * (1 - min(self.ratio, 1)) + 1e-9) if self.ratio > 0 else patches
        if self.keep >= patches:
            least = math.ceil(1000 / patches) / 1000
            raise ValueError(f"mask.ratio={self.ratio} masks none of the {patches} patches; choose at least {least}.")
        if self.keep < 1:
            digits = 10 ** max(3, len(str(patches)))
            most = math.floor(digits * (1 - 1 / patches)) / digits
            raise ValueError(f"mask.ratio={self.ratio} keeps none of the {patches} patches; choose at most {most}.")
        self._stride = -(-patches // 4) * 4  # words from one view to the next: a stream is cut at whole Philox blocks
        self._patch_bits = patches.bit_length()

    def __call__(self, seed: int, epoch: int | np.ndarray, step: int, sample_ids: np.ndarray) -> Visible:
        """The masks of the samples `sample_ids` `[B]`: `visible` `[B, V, keep]`, the same at every `step`."""
        ids = np.asarray(sample_ids)
        numbers = words(seed, "visible", epoch, ids, self.views * self._stride).astype(np.int64)
        numbers = numbers.reshape(len(ids), self.views, self._stride)[..., : self.patches]
        # Random word and patch share an int64, so no two keys are equal and the smallest are the same everywhere.
        key = (numbers << self._patch_bits) | np.arange(self.patches)
        key = np.partition(key, self.keep - 1, axis=-1)[..., : self.keep]
        return Visible(visible=np.sort(key & ((1 << self._patch_bits) - 1), axis=-1))
