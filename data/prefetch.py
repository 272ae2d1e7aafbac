"""Batches on their way to the device: copied beside the computation, and finished there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from .augment import Augment
from .batch import Batch
from .device_augment import finish


class OnDevice:
    """The batches of `loader` on `device`, with the looks that `augment` left for it (flip, jitter, grey, blur).

    On a GPU both happen on a stream of their own: while the GPU computes one batch, the next is copied from pinned
    memory and finished. `after(batch, host)` is what else is to be done to a batch there;
    `host` is the same on the host, whose numbers can be read without waiting. Raises what `loader` raises.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        augment: Augment,
        device: torch.device,
        after: Callable[[Batch, Batch], Batch] | None = None,
    ):
        self._loader, self._augment, self._device, self._after = loader, augment, device, after

    def __iter__(self) -> Iterator[Batch]:
        side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        for host in self._loader:
            if side is None:
                yield self._finished(host)
                continue
            with torch.cuda.stream(side):
                batch = self._finished(host)
            here = torch.cuda.current_stream(self._device)
            here.wait_stream(side)
            batch.used_on(here)  # or its memory would go to the next copy while this stream still reads it
            yield batch

    def _finished(self, host: Batch) -> Batch:
        batch = host.to(self._device)
        if batch.look is not None:
            batch.images = finish(batch.images, batch.look, self._augment)
        return batch if self._after is None else self._after(batch, host)
