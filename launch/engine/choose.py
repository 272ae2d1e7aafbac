"""From a configuration to the engine that steps its method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim import Optimizer

from ..build import build_adversary, build_optimizer
from ..config import TASKS, Config
from ..errors import UserError
from ..world import World
from .base import Engine
from .ddp import DdpEngine
from .parallelise import parallelise
from .precision import LossScaler

if TYPE_CHECKING:
    from ...models.method import Method


def check_engine(config: Config, world: World, micro_batch: int, accumulation: int) -> None:
    """Raise UserError for an engine that cannot do what the recipe asks, before anything is built."""
    engine, optim = config.engine, config.optim
    if engine.kind == "fsdp":
        from .fsdp import check_replicas

        check_replicas(world, engine.replicas)
        if engine.offload and optim.kind == "apex_adamw":
            raise UserError("engine.offload=true steps on the CPU, which NVIDIA Apex cannot: set optim.kind=adamw.")
    elif engine.kind == "deepspeed":
        from .ds_settings import check_recipe

        settings = _settings(config, world, micro_batch, accumulation)
        check_recipe(
            settings, optimizer_kind=optim.kind, clip_grad=optim.clip_grad, clip_scope=optim.clip_scope,
            precision=engine.precision, compile=engine.compile,
        )  # fmt: skip


def _settings(config: Config, world: World, micro_batch: int, accumulation: int) -> dict:
    from .ds_settings import load_settings

    return load_settings(
        config.engine.deepspeed, batch_size=config.optim.batch_size, micro_batch=micro_batch,
        accumulation=accumulation, clip_grad=config.optim.clip_grad, world=world.size, device_type=world.device.type,
    )  # fmt: skip


def build_engine(config: Config, method: Method, world: World, micro_batch: int, accumulation: int) -> Engine:
    """The engine of the configuration around a method with its first weights; every rank calls this.

    Raises UserError for what `check_engine` refuses, and where the optimiser needs what this machine lacks.
    """
    section, optim = config.engine, config.optim
    adversary = build_adversary(config, method)
    after = (
        world, LossScaler(section.precision == "float16"), accumulation, optim.clip_grad, optim.clip_scope,
        adversary.to(world.device) if adversary else None,
    )  # fmt: skip
    policy, compiled, few = section.activation_checkpointing, section.compile, few_shapes(config)
    if section.kind == "fsdp":
        from .fsdp import FsdpEngine, sharder

        parallelise(method, policy, compiled, sharder(world, section.replicas, section.offload), few)
        return FsdpEngine(method, lambda divided: build_optimizer(config, divided), *after)
    method.to(world.device)
    parallelise(method, policy, compiled, few_shapes=few)
    if section.kind == "deepspeed":
        from .ds_settings import offloads_optimizer
        from .zero import ZeroEngine

        settings = _settings(config, world, micro_batch, accumulation)
        optimizer = (
            _cpu_adam(config, method, world) if offloads_optimizer(settings) else build_optimizer(config, method)
        )
        return ZeroEngine(method, optimizer, settings, *after)
    return DdpEngine(method, build_optimizer(config, method), *after)


def few_shapes(config: Config) -> bool:
    """Whether a run's blocks see few shapes: published block masks have any length, and pictures of tasks any size."""
    return config.method.kind not in TASKS and (config.method.kind != "jepa" or config.mask.setting == "recommended")


def _cpu_adam(config: Config, method: Method, world: World) -> Optimizer:
    """DeepSpeed's AdamW on the CPU, the one that steps offloaded parts; it is compiled at its first use."""
    from .zero import import_deepspeed

    import_deepspeed(world)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    plain = build_optimizer(config, method)
    optim = config.optim
    return DeepSpeedCPUAdam(
        plain.param_groups,
        lr=0.0, betas=optim.betas, eps=optim.eps, weight_decay=0, adamw_mode=True,
        fp32_optimizer_states=True,
    )  # fmt: skip
