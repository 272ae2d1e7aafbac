"""Bytes that one rank holds of weights, gradients and moments, and in what an engine gathers and collects."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...models.method import Method
from ..config import Config
from ..engine.choose import check_engine
from ..engine.ds_settings import load_settings, stage
from ..world import World

FLOAT = 4  # bytes: weights, gradients and moments are float32 in every engine
ALWAYS = 1.5e9  # assumed: CUDA's context, NCCL's buffers and the libraries' workspaces
ROUNDING = 0.05  # assumed: of all that comes and goes, what the allocator's rounding and gaps take


@dataclass(frozen=True)
class Weight:
    """A parameter: its shape, whether it is trained, and the block that it belongs to, "" for none."""

    shape: tuple[int, ...]
    trained: bool
    block: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def rows_of(self, shards: int) -> int:
        """Numbers that FSDP2 gives to the first of `shards` ranks: it divides whole rows of dimension 0."""
        return -(-self.shape[0] // shards) * math.prod(self.shape[1:]) if self.shape else 1


def weights_of(method: Method) -> list[Weight]:
    """The parameters of a method, in the order of its modules."""
    blocks = [f"{name}.blocks.{i}." for name, stack in method.stacks().items() for i in range(len(stack))]
    of = {block: block.rstrip(".") for block in blocks}
    out = []
    for name, parameter in method.named_parameters():
        head = ".".join(name.split(".")[:3]) + "."
        out.append(Weight(tuple(parameter.shape), parameter.requires_grad, of.get(head, "")))
    return out


def numel(weights: Iterable[Weight], trained: bool | None = None) -> int:
    """Numbers in weights: all, or the trained or the frozen ones."""
    return sum(one.numel for one in weights if trained in (None, one.trained))


@dataclass(frozen=True)
class Division:
    """How an engine lays weights, gradients and moments over `ranks`."""

    kind: str  # ddp, fsdp or zero
    ranks: int
    accumulation: int = 1
    stage: int = 0
    replicas: int = 1
    offload_optimizer: bool = False
    offload_weights: bool = False
    zero: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's section zero_optimization

    @property
    def shards(self) -> int:
        return self.ranks // self.replicas


def divide(config: Config, ranks: int, micro_batch: int, accumulation: int) -> Division:
    """The division that the recipe's engine makes; UserError for what the engine refuses."""
    section, clip = config.engine, config.optim.clip_grad
    world = World(size=ranks, local_size=ranks, device=torch.device("cuda"))
    check_engine(config, world, micro_batch, accumulation)
    if section.kind == "ddp":
        return Division("ddp", ranks, accumulation)
    if section.kind == "fsdp":
        return Division("fsdp", ranks, accumulation, 3, section.replicas, section.offload, section.offload)
    settings = load_settings(
        section.deepspeed, batch_size=config.optim.batch_size, micro_batch=micro_batch, accumulation=accumulation,
        clip_grad=clip, world=ranks, device_type="cuda",
    )  # fmt: skip
    zero = settings["zero_optimization"]
    return Division(
        "zero", ranks, accumulation, stage(settings), 1, "offload_optimizer" in zero, "offload_param" in zero, zero
    )


@dataclass(frozen=True)
class Held:
    """Bytes by part, on the GPU and in host memory."""

    gpu: Mapping[str, float]
    host: Mapping[str, float]


def states(weights: list[Weight], by: Division) -> Held:
    """What a rank holds of a method's states between a backward and its step.

    `masters` are the float32 weights that ZeRO 1 and 2 step beside those that the model computes with.
    """
    trained, frozen = FLOAT * numel(weights, True), FLOAT * numel(weights, False)
    gpu: dict[str, float]
    if by.kind == "fsdp":
        share, teacher = (
            FLOAT * sum(one.rows_of(by.shards) for one in weights if one.trained == kind) for kind in (True, False)
        )
        parts = {"weights": share, "teacher": teacher, "gradients": share, "moments": 2 * share}
        return Held({}, parts) if by.offload_weights else Held(parts, {})
    if by.stage == 0:
        return Held({"weights": trained, "teacher": frozen, "gradients": trained, "moments": 2 * trained}, {})
    if by.stage == 3:
        share, teacher = (
            FLOAT * sum(-(-one.numel // by.ranks) for one in weights if one.trained == kind) for kind in (True, False)
        )
        gpu = {"weights": share, "teacher": teacher, "gradients": share, "moments": 2 * share}
    else:
        share = FLOAT * -(-numel(weights, True) // by.ranks)
        gradients = share if by.stage == 2 else trained
        gpu = {
            "weights": trained, "teacher": frozen, "gradients": gradients, "moments": 2 * share, "masters": share
        }  # fmt: skip
    host: dict[str, float] = {}
    if by.offload_optimizer:
        # A master of its own beside the weights: DeepSpeed shares them where both are on the GPU alone.
        host = {"masters": share, "moments": gpu.pop("moments"), "gradients": share}
        gpu.pop("masters", None)
        if by.stage > 1:
            gpu.pop("gradients")
    if by.offload_weights:
        host |= {"weights": gpu.pop("weights"), "teacher": gpu.pop("teacher")}
    return Held(gpu, host)


def block_bytes(weights: list[Weight], shards: int = 1) -> dict[str, int]:
    """Bytes of each block's weights whole, and of all that lies in no block, as "".

    With `shards`, as FSDP2 sends them: padded to as many rows for each. A table of one row is so often there.
    """
    out: dict[str, int] = {"": 0}
    for one in weights:
        out[one.block] = out.get(one.block, 0) + FLOAT * shards * one.rows_of(shards)
    return out


def buffers(weights: list[Weight], by: Division) -> dict[str, float]:
    """What a rank needs beside its states to compute with weights that are divided, and to exchange gradients."""
    trained = FLOAT * numel(weights, True)
    if by.kind == "ddp":
        return {}  # gradients are views of its buckets
    if by.kind == "zero" and by.stage == 0:
        return {"buckets": float(min(trained, FLOAT * 500_000_000))} if by.ranks > 1 else {}
    if by.kind == "fsdp":
        whole = block_bytes(weights, by.shards)
        largest = max((size for block, size in whole.items() if block), default=0)
        out = {
            "gathered outside of blocks": float(whole[""]),  # from the first use until the backward has ended
            # The block at work and the next one, which is received whole and then laid out.
            "gathered blocks": 3.0 * largest,
            # Gradients of a block whole, and laid out to be sent.
            "gradients of blocks": 2.0 * largest,
        }
        if by.accumulation > 1:
            # Not yet reduced, they are added up whole.
            out["gradients of earlier micro-batches"] = float(trained)
        return out
    zero, out = by.zero, {}
    bucket = FLOAT * float(zero.get("reduce_bucket_size", 5e8))
    if by.stage < 3:
        if zero.get("contiguous_gradients", True):
            out["buckets"] = bucket * (2 if zero.get("overlap_comm", False) else 1)
        return out
    # Its default of True copies gradients in there, too.
    out["buckets"] = bucket
    out["gathered weights"] = FLOAT * float(numel(kept_gathered(weights, by)))
    out["prefetched weights"] = FLOAT * min(
        float(zero.get("stage3_prefetch_bucket_size", 5e7)), float(numel(weights, True) + numel(weights, False))
    )
    return out


def persistent(weights: list[Weight], by: Division) -> list[Weight]:
    """The small weights that ZeRO 3 leaves whole on every rank."""
    limit = by.zero.get("stage3_param_persistence_threshold", 1e5)
    return [one for one in weights if one.numel < limit]


def kept_gathered(weights: list[Weight], by: Division) -> list[Weight]:
    """What ZeRO 3 holds whole when the forward has ended: small weights, and those that the backward soon uses again.

    Soon is within `stage3_max_reuse_distance` numbers of weights, counted along forward and backward; the weights of
    models of less than half a billion numbers are never let go in between.
    """
    reach, small = float(by.zero.get("stage3_max_reuse_distance", 1e9)), set(map(id, persistent(weights, by)))
    out, between = [], 0
    for one in reversed(weights):
        if id(one) in small or (one.trained and between < reach):
            out.append(one)
        if one.trained:
            between += 2 * one.numel
    return out
