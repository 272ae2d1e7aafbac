"""Mixed precision: float32 parameters, autocast in the method's forward, and one loss scaler for float16."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_precision(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute type and the reason for it, for the start-up banner."""
    if wanted == "auto":
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU computes bfloat16"
        return torch.float32, "no GPU with bfloat16" if device.type == "cuda" else "a CPU computes float32 fastest"
    if wanted == "float16" and device.type == "cpu":
        return torch.float16, "as configured; on a CPU it is slow, engine.precision=float32 is not"
    return DTYPES[wanted], "as configured"


class LossScaleTooSmall(FloatingPointError):
    """No loss scale is left to try. All ranks raise it at once."""

    shared, status = True, 3


class LossScaler:
    """Dynamic scale of a float16 loss: halved when a gradient overflows, doubled after `patience` good steps.

    One object decides for everything that is stepped together; `factor` 1 with `enabled=False` does nothing.
    """

    def __init__(self, enabled: bool, scale: float = 2.0**16, patience: int = 2000, smallest: float = 2.0**-14):
        self.enabled, self.value = enabled, scale if enabled else 1.0
        self.patience, self.smallest = patience, smallest
        self.good, self.skipped = 0, 0

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.value if self.enabled else loss

    @torch.no_grad()
    def unscale(self, gradients: Iterable[list[Tensor]]) -> list[Tensor]:
        """Divide gradients, a list for each device, by the scale, in place; for each a flag: 1.0 if not finite."""
        flags = []
        for those in gradients:
            found = torch.zeros((), device=those[0].device)
            torch._amp_foreach_non_finite_check_and_unscale_(  # pyright: ignore
                those, found, torch.full((), 1.0 / self.value, device=found.device)
            )
            flags.append(found)
        return flags

    def update(self, overflow: bool) -> None:
        """Adapt the scale to a step; raises LossScaleTooSmall at the smallest scale, where nothing is left to try."""
        if not self.enabled:
            return
        if not overflow:
            self.good += 1
            if self.good == self.patience:
                self.value, self.good = self.value * 2.0, 0
            return
        self.skipped, self.good = self.skipped + 1, 0
        if self.value <= self.smallest:
            raise LossScaleTooSmall(
                f"float16 gradients overflow even at a loss scale of {self.value:g}: use engine.precision=bfloat16 or "
                "float32, or a lower optim.lr."
            )
        self.value /= 2.0

    def state_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "good": self.good, "skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        """Take up a scale; one saved without float16 holds nothing to take up but the count of skipped steps."""
        self.skipped = int(state["skipped"])
        if self.enabled and state["value"] != 1.0:
            self.value, self.good = float(state["value"]), int(state["good"])
