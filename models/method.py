"""What all training methods have in common: how pixels enter, and in which type they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.dispatch import Choice
from .vit import Encoder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Method(nn.Module):
    """A training method around `encoder`: `forward(batch)` gives its `objective`, the loss and scalars to log.

    `mean` and `std` are per channel, of pixels in 0…1. `compute_dtype` other than float32 enters autocast in `forward`
    while parameters stay float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: Encoder,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        compute_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.encoder, self.compute_dtype = encoder, compute_dtype
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)

    @property
    def observed(self) -> Encoder:
        """The encoder that is probed and watched."""
        return self.encoder

    def stacks(self) -> dict[str, nn.ModuleList]:
        """The transformer blocks of every part, by its name; frozen parts (a teacher) among them."""
        return {name: part.blocks for name, part in self.named_children() if hasattr(part, "blocks")}  # pyright: ignore

    def kernel_choices(self, device: torch.device) -> dict[str, Choice]:
        """What computes each hot path on `device`, by its name; ValueError where its `kernels` cannot be had there."""
        return {}

    def autocast(self) -> torch.autocast:
        """The context in which this method computes."""
        return torch.autocast(self.mean.device.type, self.compute_dtype, self.compute_dtype != torch.float32)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The context in which nothing is dropped and no statistics move."""
        was = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was)

    def normalise(self, images: Tensor) -> Tensor:
        """Images `[B, C, H, W]`, uint8 or float32 in 0…255, as normalised float32."""
        return (images.float() / 255 - self.mean) / self.std

    def denormalise(self, images: Tensor) -> Tensor:
        """Normalised images `[B, C, H, W]` as pixels in 0…1."""
        return images * self.std + self.mean

    def forward(self, *inputs: Any, ask: str = "objective") -> Any:
        """What the function called `ask` makes of `inputs`; engines gather divided weights around `forward`."""
        return getattr(self, ask)(*inputs)

    def observe(self, images: Tensor) -> Tensor:
        """Features `[B, width]` float32 of uint8 images `[B, C, H, W]`: what is probed and watched."""
        with self.autocast():
            tokens = self.observed(self.normalise(images))
        return self.observed.forward_head(tokens.float())

    def after_step(self, momentum: float, stored: Callable[[nn.Parameter], Tensor] = lambda p: p) -> None:
        """What follows an optimiser step that was taken: nothing, where there is no teacher.

        `stored` gives the numbers of a parameter that this process keeps.
        """
