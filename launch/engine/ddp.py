"""One process, or one replica per process under DistributedDataParallel."""

from __future__ import annotations

import contextlib

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..optim import clip_gradients
from ..world import World
from .precision import LossScaler


class DdpEngine:
    """Steps a method and its optimiser: `loss`, `backward`, `step`, and the state that a checkpoint needs.

    `method` is the bare module; gradients are averaged over ranks and over the micro-batches of a step.
    """

    def __init__(
        self,
        method: nn.Module,
        optimizer: Optimizer,
        world: World,
        scaler: LossScaler,
        accumulation: int = 1,
        clip_grad: float = 0.0,
        clip_scope: str = "all",
    ):
        self.method, self.optimizer, self.world, self.scaler = method, optimizer, world, scaler
        self.accumulation, self.clip_grad, self.clip_scope = accumulation, clip_grad, clip_scope
        self.clipped_norm: Tensor | None = None
        self._module: nn.Module = method
        if world.size > 1:
            devices = [world.device.index] if world.device.type == "cuda" else None
            self._module = DistributedDataParallel(
                method, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def forward_backward(self, batch, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and scalars of micro-batch `micro` of the step, its gradients added; ranks exchange at the last."""
        last = micro == self.accumulation - 1
        waiting = not last and isinstance(self._module, DistributedDataParallel)
        with self._module.no_sync() if waiting else contextlib.nullcontext():  # pyright: ignore
            loss, scalars = self._module(batch)
            self.scaler.scale(loss / self.accumulation).backward()
        return loss.detach(), scalars

    def step(self) -> bool:
        """Apply the gradients and clear them; False if float16 overflowed anywhere and all ranks skipped the step."""
        overflow = False
        if self.scaler.enabled:
            found = self.scaler.unscale(p.grad for p in self.method.parameters() if p.grad is not None)
            if self.world.size > 1:
                dist.all_reduce(found, dist.ReduceOp.MAX)
            overflow = bool(found)
            self.scaler.update(overflow)
        if not overflow:
            self.clipped_norm = clip_gradients(self.method, self.clip_grad, self.clip_scope)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return not overflow

    def state_dict(self) -> dict:
        """Weights (the teacher's included), optimiser and loss scale, complete on every rank."""
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up what `state_dict` gave; raises RuntimeError where names or shapes differ."""
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
