"""Which patches of an image are shown (context) and which are predicted (targets): rectangles on the patch grid.

Two settings. `published` has the distribution of the released I-JEPA and StoP collators, their flaws included: the
last row and column are never used, and contexts are cut to the shortest of the batch from the bottom of the image.
`recommended` reaches every patch, keeps the same number of context patches for every sample whatever the batch, and
draws each sample's mask from that sample's own stream.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from .streams import words

Size = tuple[int, int]  # (height, width) in patches
Range = tuple[float, float]

# What the released collator does where a key is left out.
RELEASED_DEFAULTS = {
    "context_blocks": 1,
    "target_blocks": 2,
    "context_scale": (0.2, 0.8),
    "target_scale": (0.2, 0.8),
    "target_aspect": (0.3, 3.0),
    "min_keep": 4,
}
MOST_SHAPES = 5  # a compiled model is specialised once for each target length
MOST_REDRAWS = 20
FAILURES_PER_REGION = 20  # released: one region is given up after this many invalid blocks


class Masks(Protocol):
    """What every mask maker returns: flat row-major patch indices, the same number in every row, or None."""

    @property
    def context(self) -> np.ndarray | None: ...  # [E, B, Nc] int64, ascending per row

    @property
    def targets(self) -> np.ndarray | None: ...  # [T, B, Nt] int64, row-major

    @property
    def visible(self) -> np.ndarray | None: ...  # [B, V, K] int64, ascending per row

    @property
    def redraws(self) -> int: ...  # times that a sample redrew its target blocks


@dataclass(frozen=True, kw_only=True)
class ContextAndTargets:
    """The `Masks` of a predictor: what it is shown and what it is asked for."""

    context: np.ndarray  # [E, B, Nc]
    targets: np.ndarray  # [T, B, Nt]
    redraws: int = 0
    visible: None = None


@dataclass(kw_only=True)
class BlockMasks:
    """What both settings share: the patch grid, the number of blocks, and the ranges their sizes come from.

    A scale is the block's part of the grid's area, an aspect is height / width.
    """

    grid: Size
    context_blocks: int = 1
    target_blocks: int = 4
    context_scale: Range = (0.85, 1.0)
    context_aspect: Range = (1.0, 1.0)
    target_scale: Range = (0.15, 0.2)
    target_aspect: Range = (0.75, 1.5)

    def __post_init__(self) -> None:
        self.rows, self.cols = self.grid = (int(self.grid[0]), int(self.grid[1]))
        if min(self.grid) < 1:
            raise ValueError(f"The patch grid is {self.rows}×{self.cols}: choose an image at least one patch large.")
        for name in ("context_blocks", "target_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"mask.{name}={getattr(self, name)} must be at least 1.")
        for name, top in (("context_scale", 1), ("target_scale", 1), ("context_aspect", 0), ("target_aspect", 0)):
            low, high = value = tuple(float(bound) for bound in getattr(self, name))
            setattr(self, name, value)
            if not (0 < low <= high < math.inf and (not top or high <= top)):
                limit = "0 < low <= high <= 1" if top else "0 < low <= high"
                raise ValueError(f"mask.{name}={list(value)} must be [low, high] with {limit}.")


def block_masks(
    setting: str, *, grid: Size, min_keep: int = 10, context_keep: int | None = None, **ranges
) -> PublishedBlockMasks | RecommendedBlockMasks:
    """The mask maker called `published` or `recommended` for a `grid` of (rows, columns) patches.

    `ranges` are fields of `BlockMasks`; `min_keep` is read by `published` and `context_keep` by `recommended` alone.
    Raises ValueError for another name and for ranges that no mask can meet.
    """
    if setting == "published":
        return PublishedBlockMasks(grid=grid, min_keep=min_keep, **ranges)
    if setting == "recommended":
        return RecommendedBlockMasks(grid=grid, context_keep=context_keep, **ranges)
    raise ValueError(f"mask.setting={setting!r} is unknown: choose published or recommended.")


@dataclass(kw_only=True)
class PublishedBlockMasks(BlockMasks):
    """Equal in distribution to the released collator (StoP src/mask_generators.py, after I-JEPA's multiblock.py).

    Block sizes are its own, exactly: they follow from `step` alone. Positions come from (seed, epoch, sample id). Rows
    are cut to the shortest of the batch, so here a sample's mask does depend on the rest of its batch.
    """

    min_keep: int = 10  # a block is valid with more patches than this

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_keep < 0:
            raise ValueError(f"mask.min_keep={self.min_keep} must be at least 0.")
        # The released loop would never end for a block that can't be valid even where nothing constrains it.
        for rand in np.linspace(0, 1, 1025):
            self._refuse_small(*self._sizes(rand, rand))

    def sizes(self, step: int) -> tuple[Size, Size]:
        """Height and width of every target block and of every context block at `step`, both (height, width)."""
        generator = torch.Generator().manual_seed(step)
        target, context = torch.rand(1, generator=generator).item(), torch.rand(1, generator=generator).item()
        return self._sizes(target, context)

    def __call__(self, seed: int, epoch: int | np.ndarray, step: int, sample_ids: np.ndarray) -> ContextAndTargets:
        """The masks of one rank's micro-batch `sample_ids` `[B]`; Nc and Nt depend on `step` and on the batch."""
        ids = np.asarray(sample_ids)
        first = 4 * (self.target_blocks + self.context_blocks)  # two tries for each block
        heads = words(seed, "published block masks", epoch, ids, first).tolist()
        epochs = np.broadcast_to(epoch, ids.shape)
        streams = [_endless(head, seed, int(epochs[i]), ids[i : i + 1]) for i, head in enumerate(heads)]
        return self.draw(step, len(ids), lambda image, high: next(streams[image]) * high >> 32)

    def draw(self, step: int, batch: int, randint: Callable[[int, int], int]) -> ContextAndTargets:
        """The masks of `batch` images with positions from `randint(image, high)`, an integer in 0 … high-1.

        Images are drawn one after another, each block as row then column, in the order of the released code: with
        `randint = lambda image, high: int(torch.randint(high, (1,)))` this replays a seeded run of it.
        """
        target, context = sizes = self.sizes(step)
        self._refuse_small(*sizes)
        free_targets = math.prod(context) > math.prod(target)  # else the context goes first, targets give way to it
        kinds = [(self.target_blocks, target), (self.context_blocks, context)]
        drawn: list[list[list[np.ndarray]]] = [[[] for _ in range(count)] for count, _ in kinds]
        for image in range(batch):
            regions = None
            for kind in (0, 1) if free_targets else (1, 0):
                count, (height, width) = kinds[kind]
                outside = np.ones((count, *self.grid), dtype=bool)
                for block in range(count):
                    top, left, kept = self._place((height, width), regions, image, randint)
                    outside[block, top : top + height, left : left + width] = False
                    drawn[kind][block].append(kept)
                # The released code passes the last context's mask where a list of masks is due, so its ROWS become
                # the regions, and the rows' blanks are taken out of the whole height.
                regions = outside if free_targets else outside[-1]
        targets, contexts = (_cut_to_shortest(kind) for kind in drawn)
        return ContextAndTargets(context=contexts, targets=targets)

    def _place(
        self, size: Size, regions: np.ndarray | None, image: int, randint: Callable[[int, int], int]
    ) -> tuple[int, int, np.ndarray]:
        """A valid block of `size` inside all `regions` `[R, rows, cols]` or `[R, cols]`: top, left and its patches.

        After each 20 failures the last of the regions is given up.
        """
        height, width = size
        for failures in itertools.count():
            top, left = randint(image, self.rows - height), randint(image, self.cols - width)
            inside = np.zeros(self.grid, dtype=bool)
            inside[top : top + height, left : left + width] = True
            if regions is not None:
                inside &= regions[: max(len(regions) - failures // FAILURES_PER_REGION, 0)].all(axis=0)
            kept = np.flatnonzero(inside)
            if len(kept) > self.min_keep:
                return top, left, kept
        raise AssertionError("unreachable")

    def _sizes(self, target: float, context: float) -> tuple[Size, Size]:
        return (
            self._size(target, self.target_scale, self.target_aspect),
            self._size(context, self.context_scale, self.context_aspect),
        )

    def _size(self, rand: float, scale: Range, aspect: Range) -> Size:
        # One number drives both, so large blocks are always tall; a block never fills the grid's height or width.
        area = int(self.rows * self.cols * (scale[0] + rand * (scale[1] - scale[0])))
        ratio = aspect[0] + rand * (aspect[1] - aspect[0])
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        return min(height, self.rows - 1), min(width, self.cols - 1)

    def _refuse_small(self, target: Size, context: Size) -> None:
        for name, (height, width) in (("target", target), ("context", context)):
            if height * width <= self.min_keep:
                raise ValueError(
                    f"A {name} block of {height}×{width} patches on a {self.rows}×{self.cols} grid has no more than "
                    f"mask.min_keep={self.min_keep}: raise mask.{name}_scale or the image size, or lower mask.min_keep."
                )


def _endless(head: list[int], seed: int, epoch: int, sample_id: np.ndarray) -> Iterator[int]:
    """A sample's 32-bit words, of which `head` holds the first."""
    yield from head
    for start in itertools.count(len(head), 64):
        yield from words(seed, "published block masks", epoch, sample_id, 64, start)[0].tolist()


def _cut_to_shortest(blocks: list[list[np.ndarray]]) -> np.ndarray:
    shortest = min(len(kept) for block in blocks for kept in block)
    return np.array([[kept[:shortest] for kept in block] for block in blocks], dtype=np.int64)


@dataclass(kw_only=True)
class RecommendedBlockMasks(BlockMasks):
    """Blocks anywhere on the grid, one target size per step, and exactly `context_keep` context patches per sample.

    `shapes` holds the target sizes that occur, at most five. Contexts never overlap targets. A sample's mask is a
    function of (seed, epoch, sample id) and of the step's target size, whatever else is in the batch. Only patches
    that every place of a target covers (targets over half the grid's height and width have such) are never context.
    """

    context_keep: int | None = None  # None: 54 of 196 patches, about what the published runs saw

    def __post_init__(self) -> None:
        super().__post_init__()
        patches = self.rows * self.cols
        self.keep: int = round(54 / 196 * patches) if self.context_keep is None else int(self.context_keep)
        if self.keep < 1:
            raise ValueError(f"mask.context_keep={self.keep} on a {self.rows}×{self.cols} grid must be at least 1.")
        self.shapes = target_shapes(self.grid, self.target_scale, self.target_aspect)
        height, width = max(self.shapes, key=math.prod)
        if patches - height * width < self.keep:
            raise ValueError(
                f"A target block of {height}×{width} patches leaves {patches - height * width} of the "
                f"{self.rows}×{self.cols} grid for a context of mask.context_keep={self.keep}: lower mask.context_keep "
                "or mask.target_scale, or choose a larger image or a smaller patch."
            )
        # Words of a sample's stream: its first target positions, its contexts' sizes and positions, one for each patch
        # to drop by, then the target positions of each redraw.
        self._sized = 2 * self.target_blocks
        self._keyed = self._sized + 4 * self.context_blocks
        self._first = self._keyed + patches * self.context_blocks
        self._patch_bits = patches.bit_length()

    def shape(self, seed: int, step: int) -> Size:
        """Height and width of every target block of every rank at `step`."""
        chunk, place = divmod(step, _SHAPE_CHUNK)
        return self.shapes[int(_shape_words(seed, chunk)[place]) * len(self.shapes) >> 32]

    def __call__(self, seed: int, epoch: int | np.ndarray, step: int, sample_ids: np.ndarray) -> ContextAndTargets:
        """The masks of the samples `sample_ids` `[B]`: Nc is context_keep, Nt the patches of the step's shape."""
        ids = np.asarray(sample_ids)
        shape = self.shape(seed, step)
        numbers = words(seed, "block masks", epoch, ids, self._first).astype(np.int64)
        tops, lefts = self._positions(numbers[:, : self._sized], shape)  # [B, T] each
        inside = self._contexts(numbers[:, self._sized : self._keyed])  # [B, E, rows, cols]
        hidden = self._covered(tops, lefts, shape)  # [B, rows, cols]
        redraws = self._redraw(seed, epoch, ids, shape, tops, lefts, inside, hidden)
        self._gather(shape, tops, lefts, hidden)

        # The smallest keys stay: free patches of the block in random order, then, where a sample lacks some, others
        # outside its targets. Rank, random word and patch share an int64, so no two keys are equal.
        rank = np.where(hidden[:, None], np.int64(2), np.int64(1) - inside).reshape(len(ids), self.context_blocks, -1)
        key = numbers[:, self._keyed :].reshape(rank.shape)
        key = ((rank << 32 | key) << self._patch_bits) | np.arange(rank.shape[-1])
        key = np.partition(key, self.keep - 1, axis=-1)[..., : self.keep]
        context = np.sort(key & ((1 << self._patch_bits) - 1), axis=-1)  # [B, E, Nc]

        corner = (tops * self.cols + lefts).T[..., None]  # [T, B, 1]
        block = np.arange(shape[0])[:, None] * self.cols + np.arange(shape[1])
        return ContextAndTargets(
            context=np.ascontiguousarray(context.swapaxes(0, 1)), targets=corner + block.ravel(), redraws=redraws
        )

    def _positions(self, numbers: np.ndarray, shape: Size) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns `[B, T]` of the upper left corners, from 32-bit words `[B, 2T]`."""
        tops = numbers[:, 0::2] * (self.rows - shape[0] + 1) >> 32
        lefts = numbers[:, 1::2] * (self.cols - shape[1] + 1) >> 32
        return tops, lefts

    def _contexts(self, numbers: np.ndarray) -> np.ndarray:
        """The context blocks as bool `[B, E, rows, cols]`, from 32-bit words `[B, 4E]`."""
        scale, aspect, top, left = (numbers[:, part::4] for part in range(4))
        area = _between(scale, self.context_scale) * (self.rows * self.cols)
        height = np.clip(np.rint(np.sqrt(area * _between(aspect, self.context_aspect))), 1, self.rows)
        # A block that the grid is too narrow or too flat for keeps its area and bends its aspect.
        width = np.clip(np.rint(area / height), 1, self.cols)
        height = np.clip(np.rint(area / width), 1, self.rows).astype(np.int64)
        width = width.astype(np.int64)
        top = top * (self.rows - height + 1) >> 32
        left = left * (self.cols - width + 1) >> 32
        return self._rectangles(top, left, height, width)

    def _rectangles(self, top: np.ndarray, left: np.ndarray, height, width) -> np.ndarray:
        row = np.arange(self.rows) - top[..., None]
        col = np.arange(self.cols) - left[..., None]
        in_rows = (row >= 0) & (row < np.asarray(height)[..., None])
        in_cols = (col >= 0) & (col < np.asarray(width)[..., None])
        return in_rows[..., :, None] & in_cols[..., None, :]

    def _covered(self, tops: np.ndarray, lefts: np.ndarray, shape: Size) -> np.ndarray:
        """The union of the target blocks as bool `[B, rows, cols]`."""
        covered = self._rectangles(tops[:, 0], lefts[:, 0], *shape)
        for block in range(1, self.target_blocks):
            covered |= self._rectangles(tops[:, block], lefts[:, block], *shape)
        return covered

    def _redraw(self, seed, epoch, ids, shape, tops, lefts, inside, hidden) -> int:
        """Redraws in place the targets of samples that leave too few free patches, keeping the best draw of each."""
        free = _fewest_free(inside, hidden)  # [B]
        short = np.flatnonzero(free < self.keep)
        redraws = 0
        stride = -(-self._sized // 4) * 4
        start = -(-self._first // 4) * 4
        for attempt in range(MOST_REDRAWS):
            if not len(short):
                break
            redraws += len(short)
            epochs = np.broadcast_to(epoch, ids.shape)[short]
            numbers = words(seed, "block masks", epochs, ids[short], self._sized, start + attempt * stride)
            new_tops, new_lefts = self._positions(numbers.astype(np.int64), shape)
            new_hidden = self._covered(new_tops, new_lefts, shape)
            new_free = _fewest_free(inside[short], new_hidden)
            better = new_free > free[short]
            to = short[better]
            tops[to], lefts[to] = new_tops[better], new_lefts[better]
            hidden[to], free[to] = new_hidden[better], new_free[better]
            short = short[free[short] < self.keep]
        return redraws

    def _gather(self, shape, tops, lefts, hidden) -> None:
        """Moves in place target blocks onto the first one where their union leaves fewer patches than a context has."""
        for block in range(self.target_blocks - 1, 0, -1):
            full = np.flatnonzero(self.rows * self.cols - hidden.sum(axis=(1, 2)) < self.keep)
            if not len(full):
                return
            tops[full, block], lefts[full, block] = tops[full, 0], lefts[full, 0]
            hidden[full] = self._covered(tops[full], lefts[full], shape)


_SHAPE_CHUNK = 256


@lru_cache(maxsize=8)
def _shape_words(seed: int, chunk: int) -> np.ndarray:
    """The words that pick the target size at the steps of a chunk; one step alone would cost as much to compute."""
    return words(seed, "target block size", 0, np.arange(chunk * _SHAPE_CHUNK, (chunk + 1) * _SHAPE_CHUNK), 1)[:, 0]


def _between(numbers: np.ndarray, bounds: Range) -> np.ndarray:
    return bounds[0] + numbers * (2.0**-32 * (bounds[1] - bounds[0]))


def _fewest_free(inside: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Patches outside the targets in the poorest context block of each sample `[B]`."""
    return (inside & ~hidden[:, None]).sum(axis=(2, 3)).min(axis=1)


def target_shapes(grid: Size, scale: Range, aspect: Range) -> list[Size]:
    """At most five block sizes (height, width) spread over `scale` and `aspect`, or the nearest one if none is inside.

    Raises ValueError if even the smallest block of the ranges is larger than the grid.
    """
    rows, cols = grid
    least = scale[0] * rows * cols
    if max(aspect[0], least / cols**2) > min(aspect[1], rows**2 / least) * (1 + 1e-9):
        raise ValueError(
            f"A target block of mask.target_scale={list(scale)} and mask.target_aspect={list(aspect)} does not fit in "
            f"a grid of {rows}×{cols} patches: lower mask.target_scale or widen mask.target_aspect."
        )
    sizes = np.array([(height, width) for height in range(1, rows + 1) for width in range(1, cols + 1)])
    ranges = np.log([scale, aspect])  # [2, low and high]
    points = np.log(np.stack([sizes.prod(axis=1) / (rows * cols), sizes[:, 0] / sizes[:, 1]], axis=1))
    excess = np.maximum(np.maximum(ranges[:, 0] - points, points - ranges[:, 1]), 0).sum(axis=1)
    inside = np.flatnonzero(excess < 1e-9)
    if not len(inside):
        inside = np.argsort(excess, kind="stable")[:1]
    if len(inside) > MOST_SHAPES:
        # Five points of a lattice fill the two ranges evenly; each takes the nearest size that is left.
        spread = np.maximum(ranges[:, 1] - ranges[:, 0], 1e-9)
        places = (points[inside] - ranges[:, 0]) / spread
        left = list(range(len(inside)))
        chosen = []
        for i in range(MOST_SHAPES):
            ideal = (np.array([2 * i % MOST_SHAPES, i]) + 0.5) / MOST_SHAPES
            nearest = min(left, key=lambda k: float(((places[k] - ideal) ** 2).sum()))
            left.remove(nearest)
            chosen.append(nearest)
        inside = inside[sorted(chosen)]
    return [(int(height), int(width)) for height, width in sizes[inside]]
