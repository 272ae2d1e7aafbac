"""One process, or one replica per process under DistributedDataParallel."""

from __future__ import annotations

import contextlib
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ...models.adversary import Adversary
from ..optim import clip_gradients
from ..world import World
from .precision import LossScaler


class DdpEngine:
    """Steps a method and its optimiser: `loss`, `backward`, `step`, and the state that a checkpoint needs.

    `method` is the bare module; gradients are averaged over ranks and over the micro-batches of a step. An `adversary`
    (on the world's device) goes into the method's forward as a second argument, takes its gradients from the same
    backward, and is stepped or skipped together with the method; clipping leaves it alone.
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
        adversary: Adversary | None = None,
    ):
        self.method, self.optimizer, self.world, self.scaler = method, optimizer, world, scaler
        self.accumulation, self.clip_grad, self.clip_scope = accumulation, clip_grad, clip_scope
        self.adversary = adversary
        self.clipped_norm: Tensor | None = None
        self._module: nn.Module = method
        if world.size > 1:
            devices = [world.device.index] if world.device.type == "cuda" else None
            self._module = DistributedDataParallel(
                method, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
            for tensor in adversary.tensors.values() if adversary else ():
                dist.broadcast(tensor.detach(), 0)  # as DistributedDataParallel does with the weights

    def forward_backward(self, batch, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and scalars of micro-batch `micro` of the step, its gradients added; ranks exchange at the last."""
        last = micro == self.accumulation - 1
        waiting = not last and isinstance(self._module, DistributedDataParallel)
        with self._module.no_sync() if waiting else contextlib.nullcontext():  # pyright: ignore
            loss, scalars = self._module(batch, self.adversary.tensors) if self.adversary else self._module(batch)
            self.scaler.scale(loss / self.accumulation).backward()
        return loss.detach(), scalars

    def step(self, adversary_lr: float = 0.0) -> bool:
        """Apply the gradients and clear them; False if float16 overflowed anywhere and all ranks skipped the step.

        One flag decides for the method and its adversary, and on all ranks; a skipped step leaves both as they were.
        """
        if self.adversary and self.world.size > 1:
            self._average_adversary(self.adversary)
        overflow = False
        if self.scaler.enabled:
            leaves = self.adversary.tensors.values() if self.adversary else ()
            trained = chain(self.method.parameters(), leaves)
            found = self.scaler.unscale(p.grad for p in trained if p.grad is not None)
            if self.world.size > 1:
                dist.all_reduce(found, dist.ReduceOp.MAX)
            overflow = bool(found)
            self.scaler.update(overflow)
        if not overflow:
            self.clipped_norm = clip_gradients(self.method, self.clip_grad, self.clip_scope)
            self.optimizer.step()
            if self.adversary:
                self.adversary.step(adversary_lr)
        self.optimizer.zero_grad()
        if self.adversary:
            self.adversary.zero_grad()
        return not overflow

    def _average_adversary(self, adversary: Adversary) -> None:
        """Average the adversary's gradients over ranks in one exchange; they become views of one buffer."""
        leaves = adversary.tensors.values()
        buffer = torch.cat([gradient.flatten() for gradient in adversary.gradients()])
        dist.all_reduce(buffer)
        buffer /= self.world.size
        for leaf, mean in zip(leaves, buffer.split([leaf.numel() for leaf in leaves]), strict=True):
            leaf.grad = mean.view_as(leaf)

    def state_dict(self) -> dict:
        """Weights (the teacher's included), optimiser, loss scale and adversary, complete on every rank."""
        state = {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        return state | {"adversary": self.adversary.state_dict()} if self.adversary else state

    def load_state_dict(self, state: dict) -> None:
        """Take up what `state_dict` gave; raises RuntimeError or ValueError where names or shapes differ.

        A state with an adversary fits no run without one, nor the other way round: ValueError.
        """
        if ("adversary" in state) != (self.adversary is not None):
            there, here = ("an", "none") if "adversary" in state else ("no", "one")
            raise ValueError(
                f"the saved state holds {there} adversary and this run trains {here}: set method.adversary as in the "
                "saved run"
            )
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.adversary:
            self.adversary.load_state_dict(state["adversary"])
