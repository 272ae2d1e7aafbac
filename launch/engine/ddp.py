"""One process, or one replica per process under DistributedDataParallel; and what FSDP2 shares with it."""

from __future__ import annotations

import contextlib
import inspect
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..optim import clip_gradients
from ..portable import Piece
from .base import MOMENTS, Engine, prepare_moments, set_steps


class TorchEngine(Engine):
    """An engine whose gradients and moments stand beside the parameters, as torch's own optimisers have them."""

    def _begin(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        # Once: FSDP2 shows other parameters while it has gathered them.
        self._parameters = dict(self.method.named_parameters())
        prepare_moments(optimizer)

    @abstractmethod
    def _exchange(self, last: bool) -> contextlib.AbstractContextManager:
        """The context of a micro-batch, whose gradients the ranks exchange if it is the last."""

    def forward_backward(self, batch, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        with self._exchange(micro == self.accumulation - 1):
            loss, scalars = self._train(*self._inputs(batch))
            self.scaler.scale(loss / self.accumulation).backward()
        return loss.detach(), scalars

    def _train(self, *inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.method(*inputs)

    def _step_method(self) -> bool:
        if self.scaler.enabled and self._overflowed():
            self.optimizer.zero_grad()
            return False
        self.clipped_norm = clip_gradients(self._parameters, self.clip_grad, self.clip_scope)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def _overflowed(self) -> bool:
        """Unscale all gradients; whether one is not finite, on any rank."""
        gradients = {
            "method": [self._numbers(p.grad) for p in self._parameters.values() if p.grad is not None],
            "adversary": self._adversary_gradients(),
        }
        flags = torch.zeros(len(gradients), device=self.world.device)
        for flag, those in zip(flags, gradients.values(), strict=True):
            for found in self.scaler.unscale(_of_one_device(those)):
                flag += found.to(flag.device)
        if self.world.size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        if not bool(flags.any()):
            return False
        self.overflow_in = " and ".join(name for name, flag in zip(gradients, flags.tolist(), strict=True) if flag)
        return True

    @staticmethod
    def _numbers(tensor: Tensor) -> Tensor:
        """A tensor's numbers on this rank."""
        return tensor

    def stored(self) -> Iterator[Tensor]:
        return (self._numbers(parameter.detach()) for parameter in self._parameters.values())

    @abstractmethod
    def _piece(self, tensor: Tensor) -> Piece | None:
        """What this rank holds of a weight or moment."""

    def _pieces(self) -> dict[str, Piece]:
        out: dict[str, Piece | None] = {}
        for name, parameter in self._parameters.items():
            out[f"method.{name}"] = self._piece(parameter)
            state = self.optimizer.state.get(parameter, {})
            for moment in MOMENTS:
                if moment in state:
                    out[f"{moment}.{name}"] = self._piece(state[moment])
        return {name: piece for name, piece in out.items() if piece is not None}

    def _names(self) -> set[str]:
        return {f"method.{name}" for name in self._parameters}

    def _set_applied(self, steps: int) -> None:
        set_steps(self.optimizer, steps)


def _of_one_device(gradients: Iterable[Tensor]) -> list[list[Tensor]]:
    """Gradients by their device: offloaded ones are not where the adversary's are."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        by_device.setdefault(gradient.device, []).append(gradient)
    return list(by_device.values())


class DdpEngine(TorchEngine):
    """A whole replica in each process; one process needs no process group."""

    kind = "ddp"

    def __init__(self, method, optimizer: Optimizer, world, scaler, *args, **kwargs):
        super().__init__(method, world, scaler, *args, **kwargs)
        self._module: nn.Module = method
        if world.size > 1:
            devices = [world.device.index] if world.device.type == "cuda" else None
            # Buffers are constants here; torch 2.15 calls the option otherwise.
            known = inspect.signature(DistributedDataParallel).parameters
            option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            self._module = DistributedDataParallel(
                method,
                device_ids=devices,
                gradient_as_bucket_view=True,
                **{option: False},  # pyright: ignore
            )
        self._begin(optimizer)

    def _exchange(self, last: bool) -> contextlib.AbstractContextManager:
        waiting = not last and isinstance(self._module, DistributedDataParallel)
        return self._module.no_sync() if waiting else contextlib.nullcontext()  # pyright: ignore

    def _train(self, *inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self._module(*inputs)

    def _piece(self, tensor: Tensor) -> Piece:
        return Piece.whole(tensor)

    def pieces(self) -> dict[str, Piece]:
        """As for any engine; of what all ranks have, each writes its share."""
        rank, size, statistics = self.world.rank, self.world.size, self._statistics()
        return {name: piece for i, (name, piece) in enumerate(super().pieces().items())
                if i % size == rank or name in statistics or name.startswith("adversary.")}  # fmt: skip
