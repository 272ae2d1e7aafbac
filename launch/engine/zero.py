"""DeepSpeed's ZeRO at stages 0 to 3, in float32 with our autocast, our loss scaler and our checkpoints around it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optim import clip_gradients
from ..portable import Piece
from ..world import World
from .base import MOMENTS, Engine, prepare_moments, set_steps


def import_deepspeed(world: World):
    """The package, for this world's kind of device; it takes seconds, and chooses its device when it is imported."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    # It compiles with the ninja of PATH: in an environment that is not activated none, or another than the last time's,
    # which would compile everything again.
    beside = Path(sys.executable).parent
    if (beside / "ninja").exists():
        os.environ["PATH"] = os.pathsep.join([str(beside), os.environ.get("PATH", "")])
    for name, number in (("RANK", world.rank), ("WORLD_SIZE", world.size), ("LOCAL_RANK", world.local_rank)):
        os.environ.setdefault(name, str(number))  # it asks for them even where it is alone
    for name in ("torch.utils.cpp_extension", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)  # we say what matters of it ourselves
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # which it sets itself
    return deepspeed


class ZeroEngine(Engine):
    """Steps a method by `deepspeed.initialize` with filled-in `settings` (see `ds_settings`).

    The optimiser is the client's; at stages 1 to 3 DeepSpeed replaces its parameters by flat parts of float32.
    """

    kind = "deepspeed"

    def __init__(self, method, optimizer: Optimizer, settings: dict[str, Any], world: World, scaler, *args, **kwargs):
        super().__init__(method, world, scaler, *args, **kwargs)
        deepspeed = import_deepspeed(world)
        from deepspeed.utils import safe_set_full_grad

        self._set_full_grad = safe_set_full_grad
        self.stage = int(settings["zero_optimization"]["stage"])
        self._parameters = dict(method.named_parameters())
        self._client = optimizer
        if self.stage == 0:
            settings = {**settings, "gradient_clipping": 0.0}  # we do it, and know the norm
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it has compiled
            self._engine, found, _, _ = deepspeed.initialize(
                model=method, optimizer=optimizer, config=settings, dist_init_required=False
            )
        self.optimizer: Any = found
        self._prepare()

    # Training

    def forward_backward(self, batch, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        if self.scaler.enabled:
            self._zero.override_loss_scale(self.scaler.value)
        loss, scalars = self._engine(*_copied(self._inputs(batch)))
        self._engine.backward(loss)  # which divides by the accumulation
        if micro < self.accumulation - 1:
            self._engine.step()  # counts the micro-batch
        return loss.detach(), scalars

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimiser of stages 1 to 3."""
        return self.optimizer

    def _step_method(self) -> bool:
        adversary = self._adversary_gradients()
        attacked = False
        if self.scaler.enabled and adversary:
            # Averaged over ranks, so that all of them find the same.
            attacked = any(bool(flag) for flag in self.scaler.unscale([adversary]))
            if attacked:
                self._spoil()
        if self.stage == 0:
            self.clipped_norm = clip_gradients(self._parameters, self.clip_grad, self.clip_scope)
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        if applied and self.stage:
            self.clipped_norm = self._norm()
        elif not applied:
            self.overflow_in = "adversary" if attacked else "method"
        return applied

    def _spoil(self) -> None:
        """Make DeepSpeed skip this step on its own, whose flag is all that it asks: one gradient becomes infinite."""
        parameter = next(p for p in self._parameters.values() if p.requires_grad)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        self._set_full_grad(parameter, torch.full(tuple(shape), torch.inf, device=self.world.device))

    def _norm(self) -> Tensor | None:
        if not self.clip_grad:
            return None
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(norm, dtype=torch.float32, device=self.world.device)

    def after_step(self, momentum: float) -> None:
        super().after_step(momentum)
        if self.stage == 3:
            # Small parameters may stay gathered; those copies follow, too.
            self.method.after_step(momentum, self._gathered)

    def _stored(self, parameter: nn.Parameter) -> Tensor:
        return parameter.ds_tensor.data if self.stage == 3 else parameter.data  # pyright: ignore

    @staticmethod
    def _gathered(parameter: nn.Parameter) -> Tensor:
        """A parameter's gathered copy; empty where there is none, or where one rank has but one copy."""
        stored, copy = parameter.ds_tensor.data, parameter.data  # pyright: ignore
        same = stored.untyped_storage().data_ptr() == copy.untyped_storage().data_ptr()
        return copy.new_empty(0) if same else copy

    def _forward(self, *inputs: Any, ask: str) -> Any:
        module: nn.Module = self._engine.module  # pyright: ignore
        return module(*_copied(inputs), ask=ask)

    # State

    def stored(self) -> Iterator[Tensor]:
        return (self._stored(parameter) for parameter in self._parameters.values())

    def _flat(self) -> list[Tensor]:
        """The float32 parts that the optimiser steps on this rank."""
        if self.stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    def _prepare(self) -> None:
        if self.stage == 0:
            prepare_moments(self._client)
            return
        if self.stage == 3 and not self._zero.offload_optimizer:
            self._share_weights()
        for flat in self._flat():
            state = {name: torch.zeros_like(flat) for name in MOMENTS}
            step = torch.zeros((), device=flat.device)
            self._client.state[flat] = {**state, "step": step if isinstance(self._client, torch.optim.AdamW) else 0}

    def _share_weights(self) -> None:
        """Let the optimiser step the very numbers that the model is gathered from.

        In float32 they are copies of each other, which deepspeed means to share but compares a device with a string.
        """
        zero = self._zero
        for flat, stored in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
            if stored is not None and stored.dtype == flat.dtype and stored.device == flat.device:
                flat.data = stored.data

    def _set_applied(self, steps: int) -> None:
        set_steps(self._client, steps)

    def _masters(self) -> Iterator[tuple[str, Tensor, dict[str, Tensor], int]]:
        """Of each trained parameter what this rank steps: name, float32 numbers, moments, and the first one's place."""
        if self.stage == 3:
            yield from self._masters_of_stage_3()
            return
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for flat, group in zip(self._flat(), self._zero.bit16_groups, strict=True):
            state = self._client.state[flat]
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is None:  # another rank's
                    continue
                at = mapping.hp_fragment_address
                moments = {name: state[name].narrow(0, at.start, at.numel) for name in MOMENTS}
                part = flat.detach().narrow(0, at.start, at.numel)
                yield names[id(parameter)], part, moments, mapping.lp_fragment_address.start

    def _masters_of_stage_3(self) -> Iterator[tuple[str, Tensor, dict[str, Tensor], int]]:
        zero = self._zero
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad:
                continue
            start, numel = self._run(parameter)
            if not numel:
                continue
            group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            flat = zero.fp32_partitioned_groups_flat[group]
            state = self._client.state[flat]
            moments = {moment: state[moment].narrow(0, offset, numel) for moment in MOMENTS}
            yield name, flat.detach().narrow(0, offset, numel), moments, start

    def _run(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Where this rank's part of a parameter begins at stage 3, and how many of its numbers are no padding."""
        part = parameter.ds_tensor.numel()  # pyright: ignore
        start = min(self.world.rank * part, parameter.ds_numel)  # pyright: ignore
        return start, min(part, parameter.ds_numel - start)  # pyright: ignore

    def _shape(self, name: str) -> tuple[int, ...]:
        parameter = self._parameters[name]
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def _pieces(self) -> dict[str, Piece]:
        if self.stage == 0:
            return self._pieces_of_stage_0()
        out = {}
        for name, values, moments, start in self._masters():
            out[f"method.{name}"] = Piece(values, self._shape(name), start)
            for moment, numbers in moments.items():
                out[f"{moment}.{name}"] = Piece(numbers, self._shape(name), start)
        for i, (name, parameter) in enumerate(self._parameters.items()):
            if parameter.requires_grad:
                continue
            if self.stage == 3:
                start, numel = self._run(parameter)
                if numel:
                    part = self._stored(parameter).view(-1)[:numel]
                    out[f"method.{name}"] = Piece(part, self._shape(name), start)
            elif i % self.world.size == self.world.rank:
                out[f"method.{name}"] = Piece.whole(parameter)
        return out

    def _pieces_of_stage_0(self, mine: bool = True) -> dict[str, Piece]:
        out = {}
        for i, (name, parameter) in enumerate(self._parameters.items()):
            if mine and i % self.world.size != self.world.rank:
                continue
            out[f"method.{name}"] = Piece.whole(parameter)
            for moment in MOMENTS if parameter.requires_grad else ():
                out[f"{moment}.{name}"] = Piece.whole(self._client.state[parameter][moment])
        return out

    def _load(self, read) -> None:
        """Fill what the optimiser steps and what the model computes with, which are two copies of a weight."""
        if self.stage == 0:
            read(self._pieces_of_stage_0(mine=False))
            return
        read(self._pieces())
        if self.stage < 3:
            read({f"method.{name}": Piece.whole(parameter) for name, parameter in self._parameters.items()})
            return
        zero = self._zero
        zero._partition_all_parameters()
        for name, values, _, _ in self._masters():
            self._stored(self._parameters[name]).view(-1)[: values.numel()].copy_(values)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        if self.world.size > 1:
            dist.barrier()  # all have gathered what they keep before one goes on


def _copied(inputs: tuple) -> tuple:
    """Inputs with dictionaries of their own: stage 3 puts other tensors into those that it is given."""
    return tuple(dict(value) if isinstance(value, dict) else value for value in inputs)
