"""Position tables of a patch grid: sin-cos, low resolution and learned, and their values on another grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ("sincos", "learned", "low_resolution")


def grid_coordinates(
    grid: tuple[int, int], onto: tuple[int, int] | None = None, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Row and column of every patch of `grid`, each `[N]` float64, in units of the grid `onto` (default: the same).

    On another grid the patch centres stay where they are in the picture, so positions interpolate.
    """
    axes = []
    for here, there in zip(grid, onto or grid, strict=True):
        centres = torch.arange(here, dtype=torch.float64, device=device)
        axes.append(centres if here == there else (centres + 0.5) * (there / here) - 0.5)
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    return rows.flatten(), columns.flatten()


def sincos(dim: int, rows: Tensor, columns: Tensor) -> Tensor:
    """2-D sin-cos table `[N, dim]` float64: the first half of the channels encodes the column, the second the row.

    Each half is [sin | cos] with frequencies 10000^(-i / (dim / 4)) (MAE, I-JEPA). Raises ValueError if `dim` is
    not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"Sin-cos positions need a width that is a multiple of 4; {dim} is not.")
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device=columns.device) / (dim / 4))
    halves = []
    for coordinate in (columns, rows):
        angle = coordinate.to(torch.float64)[:, None] * frequencies
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1)


def shifted_sincos(dim: int, grid: tuple[int, int], shift: Tensor) -> Tensor:
    """The sin-cos table `[N, dim]` float32 of a grid moved by `shift` `[2]` (rows and columns, in patches).

    AdPE's coordinate attack on absolute positions; gradients reach `shift`.
    """
    rows, columns = grid_coordinates(grid, device=shift.device)  # made there: a copy would wait for the device
    rows, columns = rows + shift[0].double(), columns + shift[1].double()
    return sincos(dim, rows, columns).float()


def interpolate_table(table: Tensor, grid: tuple[int, int], onto: tuple[int, int]) -> Tensor:
    """A learned table `[N, D]` of `grid`, resampled (bicubic) to the grid `onto`."""
    if grid == onto:
        return table
    image = table.T.reshape(1, -1, *grid)
    return F.interpolate(image, size=onto, mode="bicubic", align_corners=False).flatten(2)[0].T


class Positions(nn.Module):
    """A position table for a patch grid; `[N, D]`, so that sharding along dimension 0 stays possible.

    `low_resolution` gives all patches of a `stride` × `stride` cell the position of the cell's centre (StoP's
    ablation of uncertain positions without noise). Learned tables start as normal noise of std 0.02.
    """

    def __init__(self, dim: int, grid: tuple[int, int], kind: str = "sincos", stride: int = 2):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"Positions of kind {kind!r} are not known; choose one of {', '.join(KINDS)}.")
        self.dim, self.grid, self.kind, self.stride = dim, grid, kind, stride
        if kind == "learned":
            self.table = nn.Parameter(torch.empty(grid[0] * grid[1], dim))
            nn.init.trunc_normal_(self.table, std=0.02)
        else:
            # Not in the checkpoint: it is a function of the configuration.
            self.register_buffer("table", self._fixed(grid), persistent=False)

    def _fixed(self, grid: tuple[int, int]) -> Tensor:
        rows, columns = grid_coordinates(grid, self.grid)
        if self.kind == "low_resolution":
            rows, columns = (
                torch.div(axis, self.stride, rounding_mode="floor") * self.stride + (self.stride - 1) / 2
                for axis in (rows, columns)
            )
        return sincos(self.dim, rows, columns).float()

    def forward(self, grid: tuple[int, int] | None = None) -> Tensor:
        """The table `[N, D]` of `grid` (default: the training grid)."""
        if grid is None or tuple(grid) == self.grid:
            return self.table
        if self.kind == "learned":
            return interpolate_table(self.table, self.grid, grid)
        return self._fixed(grid).to(self.table.device)
