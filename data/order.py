"""Which sample stands where: the order of all epochs, and the part of it that one rank of a run loads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler

from .images import DataError
from .streams import generator

_BLOCK = 10_000  # positions after which a mixture has its shares exactly


class Order(Protocol):
    """The samples of a run one after another, from position 0 on without end."""

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, sample ids), both int64 like `positions` `[B]`: a function of the position alone."""
        ...


def permutation(seed: int, epoch: int, n: int, purpose: str = "order") -> np.ndarray:
    """The order of the `n` samples in `epoch`, `[n]` int64: a function of (seed, epoch)."""
    return generator(seed, purpose, epoch).permutation(n)


def epoch_length(n: int, global_batch: int, remainder: str) -> int:
    """Positions of one epoch of `n` samples: all with `remainder` "carry", whole global batches with "drop".

    Raises `DataError` for another remainder.
    """
    if remainder not in ("carry", "drop"):
        raise DataError(f"data.remainder={remainder!r} is unknown: choose carry or drop.")
    return n if remainder == "carry" else n // global_batch * global_batch


class Permutations:
    """One permutation of `n` samples after another, each cut to its first `length` places (None: all)."""

    def __init__(self, n: int, seed: int, length: int | None = None, purpose: str = "order"):
        self.n, self.seed, self.length, self._purpose = n, seed, length or n, purpose
        self._known: dict[int, np.ndarray] = {}

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.length)
        ids = np.empty_like(places)
        for epoch in np.unique(epochs):
            ids[epochs == epoch] = self._permutation(int(epoch))[places[epochs == epoch]]
        return epochs, ids

    def _permutation(self, epoch: int) -> np.ndarray:
        """The order of `epoch`; those of the last two asked for are kept, since a step may touch two."""
        if epoch not in self._known:
            self._known = {e: order for e, order in self._known.items() if e == epoch - 1}
            self._known[epoch] = permutation(self.seed, epoch, self.n, self._purpose)
        return self._known[epoch]


class Mixture:
    """Several data sets in shares: of every 10,000 positions each gets its `weights` share, in an order of its own.

    Ids count through the data sets of `sizes`, one after another. Each data set has its own epochs: its samples come
    once before any of them comes again, however small or large its share is. Raises `DataError` for weights that are
    not positive.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        share = np.asarray(weights, dtype=np.float64)
        if not (share > 0).all() or not np.isfinite(share).all():
            raise DataError(f"The weights of data.path are {list(weights)}: give each a number above 0.")
        exact = share / share.sum() * _BLOCK
        self.counts = np.floor(exact).astype(np.int64)
        # The largest remainders get what is left over, the first of equal ones.
        self.counts[np.argsort(self.counts - exact, kind="stable")[: _BLOCK - self.counts.sum()]] += 1
        if not self.counts.all():
            raise DataError(f"The weights of data.path are {list(weights)}: each share must be 1 in {_BLOCK} or more.")
        self.seed = seed
        self._starts = np.cumsum([0, *sizes])[:-1]
        self._orders = [Permutations(n, seed, purpose=f"order of {i}") for i, n in enumerate(sizes)]
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        blocks, places = np.divmod(np.asarray(positions, dtype=np.int64), _BLOCK)
        chosen, within = np.empty_like(places), np.empty_like(places)
        for block in np.unique(blocks):
            sources, ranks = self._block(int(block))
            here = blocks == block
            chosen[here] = sources[places[here]]
            within[here] = ranks[places[here]] + block * self.counts[chosen[here]]
        epochs, ids = np.empty_like(places), np.empty_like(places)
        for source, order in enumerate(self._orders):
            here = chosen == source
            if here.any():
                epochs[here], ids[here] = order.at(within[here])
        return epochs, ids + self._starts[chosen]

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each place of a block its data set, and how many places of that data set stand before it."""
        if block not in self._known:
            sources = np.repeat(np.arange(len(self.counts)), self.counts)
            sources = generator(self.seed, "mixture", block).permutation(sources)
            ranks = np.empty(_BLOCK, dtype=np.int64)
            for source, count in enumerate(self.counts):
                ranks[sources == source] = np.arange(count)
            self._known = {b: found for b, found in self._known.items() if b == block - 1}
            self._known[block] = sources, ranks
        return self._known[block]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one rank loads, from optimiser step `start_step` up to and without `stop_step`, and by what means.

    `global_batch` counts images over all ranks per step, `micro_batch` images of one rank per forward. `workers` are
    processes (0: none; with FFCV threads), `prefetch` batches ahead of each. `on_error` says what an unreadable image
    does: "skip" replaces it, "stop" raises `DataError`. Raises `DataError` where the sizes do not divide.
    """

    seed: int
    global_batch: int
    micro_batch: int
    rank: int = 0
    world: int = 1
    start_step: int = 0
    stop_step: int
    workers: int = 0
    prefetch: int = 2
    pin_memory: bool = False
    on_error: str = "skip"

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world, f"rank {self.rank} of {self.world}"
        if self.on_error not in ("skip", "stop"):
            raise DataError(f"on_error={self.on_error!r} is unknown: choose skip or stop.")
        _check_division(self.global_batch, self.micro_batch, self.world)

    @property
    def share(self) -> int:
        """Images of this rank in one step."""
        return self.global_batch // self.world

    @property
    def micros_per_step(self) -> int:
        return self.share // self.micro_batch

    def __len__(self) -> int:
        """Micro-batches in all."""
        return max(0, self.stop_step - self.start_step) * self.micros_per_step


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _check_division(global_batch: int, micro_batch: int, world: int) -> None:
    if global_batch < 1 or micro_batch < 1:
        raise DataError(f"optim.batch_size={global_batch} and loader.micro_batch={micro_batch} must be 1 or more.")
    unit = world * micro_batch
    if global_batch % unit:
        near = " or ".join(str(size) for size in (global_batch // unit * unit, -(-global_batch // unit) * unit) if size)
        advice = f"set optim.batch_size to {near}"
        if global_batch % world == 0:
            fitting = sorted(_divisors(global_batch // world), key=lambda d: (abs(d - micro_batch), -d))[:3]
            advice += f", or loader.micro_batch to {' or '.join(map(str, sorted(fitting)))}"
        raise DataError(
            f"optim.batch_size={global_batch} does not divide into {world} rank(s) with micro-batches of "
            f"loader.micro_batch={micro_batch}: {advice}."
        )


def check_batch_sizes(n: int, global_batch: int, micro_batch: int | None, world: int) -> int:
    """The micro-batch, by default a rank's whole share.

    Raises `DataError` unless `global_batch` of the `n` images divides into whole micro-batches of `world` ranks.
    """
    if micro_batch is None:
        micro_batch = max(1, global_batch // world)
        if global_batch % world:
            near = " or ".join(str(size) for size in (micro_batch * world, (micro_batch + 1) * world))
            raise DataError(
                f"optim.batch_size={global_batch} does not divide among {world} ranks: set optim.batch_size to {near}."
            )
    _check_division(global_batch, micro_batch, world)
    if n < global_batch:
        unit = world * micro_batch
        raise DataError(
            f"The data set has {n} images, less than one optim.batch_size={global_batch}: "
            f"set optim.batch_size to {n // unit * unit or n} or less, or add images."
        )
    return micro_batch


@dataclass(frozen=True)
class Request:
    """What one micro-batch holds: samples `ids` `[B]` of `epochs` `[B]`, for micro-batch `micro` of step `step`."""

    epochs: np.ndarray
    step: int  # global optimiser step, from 0, over all epochs
    micro: int
    ids: np.ndarray


class Requests(Sampler[Request]):
    """All micro-batches of a plan's rank, one after another.

    Step k takes the positions k · B … (k + 1) · B - 1 of `order`: it may end one epoch and begin the next. Rank r
    takes the r-th of `world` equal slices and cuts it into micro-batches.
    """

    def __init__(self, order: Order, plan: Plan):
        self.order, self.plan = order, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Request]:
        plan = self.plan
        for step in range(plan.start_step, plan.stop_step):
            for micro in range(plan.micros_per_step):
                first = step * plan.global_batch + plan.rank * plan.share + micro * plan.micro_batch
                epochs, ids = self.order.at(np.arange(first, first + plan.micro_batch))
                yield Request(epochs, step, micro, ids)
