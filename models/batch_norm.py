"""Batch normalisation with the statistics of all ranks, on any device and backend."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class SyncedBatchNorm(nn.Module):
    """BatchNorm of `[B, C, H, W]` over the batches of all ranks of the default process group.

    torch's own needs a GPU. The running statistics are the same on all ranks.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            values = x if x.dtype == torch.float64 else x.float()
            mean, variance = self._of(values) if self.training else (self.running_mean, self.running_var)
            scale = self.weight * torch.rsqrt(variance + self.eps)
            return torch.addcmul((self.bias - mean * scale)[:, None, None], values, scale[:, None, None])

    def _of(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel, and the running ones moved towards them."""
        count = values.new_full((1,), values.numel() / values.shape[1])
        sums = torch.cat([values.sum(dim=(0, 2, 3)), count])
        together = dist.is_initialized() and dist.get_world_size() > 1
        sums = all_reduce(sums) if together else sums
        mean, number = sums[:-1] / sums[-1], sums[-1].detach()
        squares = (values - mean[:, None, None]).square().sum(dim=(0, 2, 3))
        variance = (all_reduce(squares) if together else squares) / number
        with torch.no_grad():
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
            unbiased = variance.detach() * number / (number - 1).clamp(min=1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean, variance
