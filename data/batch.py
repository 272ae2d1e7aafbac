"""What a loader hands to a training step: a small dataclass of tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass
class Batch:
    """One micro-batch of one rank; everything random in it is a function of (seed, epoch, sample id) and the step.

    Masks hold flat patch indices (row-major on the patch grid) and are None where a recipe has none.
    """

    images: Tensor  # [B, C, H, W], or [B, V, C, H, W] of V views: uint8, normalised on the device
    sample_ids: Tensor  # [B] int64, position in the data set
    labels: Tensor  # [B] int64, -1 where unknown
    epochs: Tensor  # [B] int64, the epoch that each sample belongs to: a step may end one and begin the next
    step: int  # global optimiser step this micro-batch belongs to
    context: Tensor | None = None  # [E, B, Nc] int64, ascending per row
    targets: Tensor | None = None  # [T, B, Nt] int64
    visible: Tensor | None = None  # [B, V, K] int64, patches that a masked autoencoder's encoder sees, ascending
    # What a task is to find: soft labels [B, classes], maps [B, H, W], or of each image boxes, labels and so on.
    truth: Tensor | list[dict[str, Tensor]] | None = None
    look: Tensor | None = None  # [B, V, 13] float64, numbers of an augmentation that the device still has to do
    redraws: int = 0  # times that a sample of this batch redrew its target blocks
    skipped: list[str] = field(default_factory=list)  # one line per unreadable image that was replaced

    def __len__(self) -> int:
        """Source images, however many views there are of each."""
        return self.images.shape[0]

    def _map(self, change) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict = {k: change(v) for k, v in tensors.items() if isinstance(v, Tensor)}
        if isinstance(self.truth, list):
            changed["truth"] = [{k: change(v) for k, v in one.items()} for one in self.truth]
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device` (asynchronous from pinned memory)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; torch's DataLoader calls this by name."""
        return self._map(lambda tensor: tensor.pin_memory())

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that `stream` reads the tensors, which another stream made."""
        self._map(lambda tensor: tensor.record_stream(stream))
