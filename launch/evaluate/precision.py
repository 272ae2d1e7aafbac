"""In which type a frozen encoder computes: the fastest that leaves its features what they are, which is checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.method import Method
from ..engine.precision import choose_precision

# Of the spread between images: what a rounding may add without changing who is near whom.
LARGEST_ERROR = 0.01
LEAST_AGREEMENT = 0.98


@dataclass(frozen=True)
class Difference:
    """How far features are from those in float32.

    `error` is the root of the mean square difference over that between images, `agreement` the share of images whose
    nearest other image is the same.
    """

    error: float
    agreement: float

    @property
    def harmless(self) -> bool:
        return self.error <= LARGEST_ERROR and self.agreement >= LEAST_AGREEMENT

    def __str__(self) -> str:
        return (
            f"off by {100 * self.error:.2g} % of the spread between images, {100 * self.agreement:.0f} % nearest alike"
        )


def difference(found: Tensor, exact: Tensor) -> Difference:
    """How far features `[n, D]` are from the exact ones; the nearest image is by cosine of standardised features."""
    found, exact = found.double(), exact.double()
    mean, std = exact.mean(dim=0), exact.std(dim=0, correction=0)
    spread = (exact - mean).square().mean().sqrt()
    if not bool(found.isfinite().all()) or not float(spread):
        return Difference(float("inf"), 0.0)
    nearest = []
    for features in (found, exact):
        unit = torch.nn.functional.normalize((features - mean) / std.clamp_min(1e-12), dim=1)
        nearest.append((unit @ unit.T).fill_diagonal_(-2).argmax(dim=1))
    error = float((found - exact).square().mean().sqrt() / spread)
    return Difference(error, float((nearest[0] == nearest[1]).double().mean()))


def choose_compute(method: Method, wanted: str, device: torch.device, sample: Tensor, compiled: bool = False) -> str:
    """Set the method's compute type for measuring and say why; `sample` is uint8 `[B, C, H, W]` on `device`.

    Another type than float32, and compiled blocks, are compared with plain float32 on the sample; a type that was not
    asked for by name, and compiled blocks, are given up where they would change the features.
    """
    dtype, reason = choose_precision(wanted, device)
    name = str(dtype).removeprefix("torch.")
    method.compute_dtype = torch.float32
    if (dtype == torch.float32 and not compiled) or len(sample) < 3:
        return f"float32, {reason if dtype == torch.float32 else 'too few images to check another'}"
    blocks = method.encoder.blocks if compiled else []
    with torch.inference_mode():
        exact = method.observe(sample)
        method.compute_dtype = dtype
        for block in blocks:
            block.compile()
        found = difference(method.observe(sample), exact)
    name = f"{name}{', compiled' if compiled else ''}"
    if found.harmless or (wanted != "auto" and not compiled):
        return f"{name}, {reason}: {found}"
    method.compute_dtype = torch.float32
    for block in blocks:
        block._compiled_call_impl = None  # pyright: ignore
    return f"float32, for {name} changes the features: {found}"
