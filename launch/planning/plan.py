"""A recipe on so many GPUs, in numbers: memory by part, batches that fit, exchanges, step time, days."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...data.images import DataError
from ...data.order import check_batch_sizes, epoch_length
from ...models.mae import Mae
from ..build import build_masks
from ..config import TASKS, Config
from ..engine.precision import DTYPES
from ..errors import UserError, user_errors
from ..parts import flops_per_image, open_sources
from . import pace
from .activations import Activations, activations, fake_batch, on_meta
from .hardware import Gpu, gpu, link
from .memory import ALWAYS, FLOAT, ROUNDING, Division, Weight, buffers, divide, numel, states, weights_of

IMAGENET, CIFAR10, ADE20K, COCO = 1_281_167, 50_000, 20_210, 118_287  # training images
SCALES = tuple(2**k for k in range(3, 13))
POLICIES = ("none", "selective", 2, "full")


@dataclass(frozen=True)
class Place:
    """What is rented: GPUs, how many share a node, and the names of the links."""

    gpus: int
    gpu: str
    per_node: int = 8
    interconnect: str = "ib-400g"
    nvlink: str | None = None  # None: what the GPU has


@dataclass(frozen=True)
class Case:
    """A recipe, and what planning asks of its method, once for all numbers of GPUs."""

    config: Config
    gpu: Gpu
    dtype: torch.dtype
    weights: list[Weight]
    adversary: int
    batch_bytes: float  # of an image on its way to the GPU, with its masks
    flops: float
    images: int
    unseen: str | None  # data.path, where it is not on this machine
    again: float

    def activations(self, policy: str | int) -> Activations:
        return activations(self.config, policy, self.dtype)


def open_case(config: Config, gpu_name: str, images: int | None, recipe: str) -> Case:
    """What is the same at every number of GPUs; UserError for a GPU that cannot, and for what `build` refuses."""
    found, precision = gpu(gpu_name), config.engine.precision
    if precision == "bfloat16" and not found.bfloat16:
        raise UserError(f"{gpu_name} does not compute bfloat16: set engine.precision=float16, or float32.")
    dtype = (torch.bfloat16 if found.bfloat16 else torch.float32) if precision == "auto" else DTYPES[precision]
    method = on_meta(config)
    make = build_masks(config, method.encoder.grid)
    masks = make(config.seed, 0, 0, np.arange(64)) if make else None
    unseen = _unseen(config) if images is None else None
    if images is None and config.data.path and not unseen:
        with user_errors():
            images = _images(config)
    attack = method.attack_tensors() if isinstance(method, Mae) else {}
    batch = fake_batch(config, masks, 64)
    parts = [part for part in vars(batch).values() if isinstance(part, torch.Tensor)]
    flops = flops_per_image(method, masks)
    return Case(
        config=config, gpu=found, dtype=dtype, weights=weights_of(method),
        adversary=sum(tensor.numel() for tensor in attack.values()),
        batch_bytes=sum(part.nbytes for part in parts) / 64, flops=flops,
        images=images or _usual_images(config, recipe), unseen=unseen,
        again=pace.computed_again(method, flops, config.engine.activation_checkpointing),
    )  # fmt: skip


def _images(config: Config) -> int:
    """The training images at data.path."""
    if config.method.kind == "segment":
        from ..evaluate.segment import open_maps

        return len(open_maps(config)[0])
    if config.method.kind == "detect":
        from ..evaluate.detect import open_coco

        return len(open_coco(config)[0])
    return len(open_sources(config, None, None)[0])


def _usual_images(config: Config, recipe: str) -> int:
    """Of the data set that the recipe is known by."""
    known = {"segment": ADE20K, "detect": COCO}
    return known.get(config.method.kind, CIFAR10 if recipe.startswith("cifar10") else IMAGENET)


def _unseen(config: Config) -> str | None:
    """A folder of data.path that is not on this machine, which need not be the one to train on."""
    paths = [os.path.expanduser(path) for path in config.data.places()[0] if not set(path) & set(":*?[{")]
    return next((path for path in paths if path != "digits" and not os.path.exists(path)), None)


def memory(case: Case, by: Division, micro: int, policy: str | int) -> dict[str, float]:
    """Bytes of a rank by part, `total` the last; `host` in host memory beside it."""
    held, acts, more = states(case.weights, by), case.activations(policy), buffers(case.weights, by)
    parts = dict(held.gpu)
    if case.config.method.kind in TASKS and "teacher" in parts:  # a task's frozen weights are no teacher's
        parts["weights"] += parts.pop("teacher")
    peak, fixed = acts.peak(micro), acts.fixed(micro)
    kept = max(0.0, min(acts.kept.per_image * micro, peak - fixed))
    out = {
        **parts,
        "half-precision copies of weights": fixed,
        "activations kept for the backward": kept,
        "activations at the fullest moment": peak - fixed - kept,
        "batches on the device": 2 * case.batch_bytes * micro,
        "adversary": 4.0 * FLOAT * case.adversary,
        **more,
    }
    out["allocator's gaps (5 %)"] = ROUNDING * (peak + sum(more.values()))
    out["CUDA, NCCL, workspaces"] = ALWAYS
    out = {name: size for name, size in out.items() if size}
    return {**out, "total": sum(out.values())}


def most_images(case: Case, by: Division, policy: str | int) -> int:
    """The largest micro-batch whose memory fits the GPU; 0 if none does."""
    without = sum(states(case.weights, by).gpu.values()) + (1 + ROUNDING) * sum(buffers(case.weights, by).values())
    free = case.gpu.memory - without - ALWAYS - 4 * FLOAT * case.adversary
    return max(0, case.activations(policy).most_images(free, 1 + ROUNDING, 2 * case.batch_bytes))


def most_dividing(case: Case, gpus: int, share: int, policy: str | int) -> int:
    """The largest micro-batch that divides a GPU's share of the batch and fits; 0 if none does.

    One that is less than the share adds up gradients, which some engines keep whole.
    """
    for micro in range(share, 0, -1):
        if share % micro == 0:
            by = divide(case.config, gpus, micro, share // micro)
            if memory(case, by, micro, policy)["total"] <= case.gpu.memory:
                return micro
    return 0


def check_place(config: Config, place: Place) -> None:
    """Raise UserError for a number of GPUs that cannot be, or that does not divide the batch."""
    if place.gpus < 1:
        raise UserError(f"--gpus {place.gpus} is no number of GPUs; choose 1 or more.")
    if place.per_node < 1:
        raise UserError(f"--gpus-per-node {place.per_node} is no number of GPUs; choose 1 or more.")
    batch = config.optim.batch_size
    try:
        check_batch_sizes(batch, batch, config.loader.micro_batch, place.gpus)
    except DataError as error:
        near = min((n for n in range(1, batch + 1) if batch % n == 0), key=lambda n: abs(n - place.gpus))
        more = f" Or take --gpus {near}." if batch % place.gpus else ""
        raise UserError(f"{error}{more}") from error


def plan(
    recipe: str,
    config: Config,
    place: Place,
    *,
    mfu: float | None = None,
    images: int | None = None,
    images_per_core: float | None = None,
    scales: Sequence[int] = SCALES,
    policies: Sequence[str | int] = POLICIES,
) -> dict[str, Any]:
    """All that `elsewhere plan` prints, as plain numbers: bytes, seconds, images.

    Needs no GPU and no data. Raises UserError for what cannot be rented, divided or trained.
    """
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu:g} is a share of the GPU's peak: choose more than 0 and at most 1, e.g. 0.4.")
    found = gpu(place.gpu)
    within, between = link(place.nvlink or found.link, True), link(place.interconnect, False)
    check_place(config, place)
    case = open_case(config, place.gpu, images, recipe)
    if case.images < config.optim.batch_size:
        raise UserError(
            f"{case.images} images are less than one optim.batch_size={config.optim.batch_size}: set --images, or a "
            "smaller batch."
        )
    assumed = mfu is None
    mfu = pace.assumed_mfu(config.model.size) if mfu is None else mfu
    network = pace.make_network(place.per_node, within, between)
    share = config.optim.batch_size // place.gpus
    micro = config.loader.micro_batch or share
    by = divide(config, place.gpus, micro, share // micro)
    policy = config.engine.activation_checkpointing
    rows = [_policy_row(case, by, micro, share, one) for one in dict.fromkeys([*policies, policy])]
    scaled = [_scale(case, n, network, mfu) for n in sorted({*scales, place.gpus})] if scales else []
    step = _step(case, by, micro, network, mfu)
    per_core = images_per_core or pace.images_per_core(config.data.views)
    trained, frozen = numel(case.weights, True), numel(case.weights, False)
    return {
        "recipe": recipe, "task": TASKS.get(config.method.kind),
        "gpus": place.gpus, "gpu": place.gpu, "nodes": -(-place.gpus // place.per_node),
        "gpus_per_node": place.per_node, "links": [place.nvlink or found.link, place.interconnect],
        "gpu_memory": found.memory, "engine": _engine_name(config), "precision": str(case.dtype).partition(".")[2],
        "activation_checkpointing": policy, "compile": config.engine.compile, "trained": trained, "frozen": frozen,
        "adversary": case.adversary, "gflop_per_image": case.flops / 1e9, "views": config.data.views,
        "batch": config.optim.batch_size, "micro_batch": micro, "accumulation": share // micro,
        "memory": memory(case, by, micro, policy), "host": states(case.weights, by).host, "policies": rows,
        "exchanges": [
            {
                "what": one.what, "kind": one.kind, "ranks": pace.members(one, by), "times": one.times,
                "sent": pace.sent(one, by), "seconds": pace.exchange_seconds(one, by, network),
            }
            for one in pace.exchanges(case.weights, by, case.adversary)
        ],
        "mfu": mfu, "mfu_assumed": assumed, "images": case.images, "epochs": _epochs(case), **step,
        "unseen": case.unseen, "decoded": config.data.path != "digits",
        "images_per_core": per_core, "rate_given": images_per_core is not None,
        "loader_cores": config.optim.batch_size / step["seconds"] / place.gpus / per_core,
        "scales": scaled, "apex": config.model.norm == "apex" or config.optim.kind == "apex_adamw",
    }  # fmt: skip


def _epochs(case: Case) -> float:
    optim = case.config.optim
    return optim.epochs if optim.steps is None else optim.steps * optim.batch_size / case.images


def _engine_name(config: Config) -> str:
    section = config.engine
    if section.kind == "deepspeed":
        return f"deepspeed {section.deepspeed}"
    more = f", {section.replicas} replicas" * (section.replicas > 1) + ", offloaded" * section.offload
    return section.kind + more


def _policy_row(case: Case, by: Division, micro: int, share: int, policy: str | int) -> dict[str, Any]:
    """A checkpointing policy: what the micro-batch takes, and the largest ones that fit and that divide the share."""
    acts, most = case.activations(policy), most_images(case, by, policy)
    total = memory(case, by, micro, policy)["total"]
    return {
        "policy": policy, "kept": acts.kept(micro), "kept_per_image": acts.kept.per_image, "peak": acts.peak(micro),
        "total": total, "fits": total <= case.gpu.memory, "most": most,
        "usable": most_dividing(case, by.ranks, share, policy),
    }  # fmt: skip


def _step(case: Case, by: Division, micro: int, network: pace.Network, mfu: float) -> dict[str, float]:
    """Seconds of a step: computing, sending, and the larger of the two; and of all steps."""
    optim = case.config.optim
    images = micro * by.accumulation
    computing = pace.compute_seconds(images * case.flops * (1 + case.again), case.gpu, case.dtype != torch.float32, mfu)
    sending = sum(pace.exchange_seconds(one, by, network) for one in pace.exchanges(case.weights, by, case.adversary))
    seconds = max(computing, sending)
    epoch = epoch_length(case.images, optim.batch_size, case.config.data.remainder)
    steps = optim.steps or epoch * optim.epochs // optim.batch_size
    return {
        "computing": computing, "sending": sending, "seconds": seconds, "unhidden": computing + sending,
        "images_per_s": optim.batch_size / seconds, "steps": steps, "days": steps * seconds / 86400,
        "gpu_hours": steps * seconds / 3600 * by.ranks,
    }  # fmt: skip


def _scale(case: Case, gpus: int, network: pace.Network, mfu: float) -> dict[str, Any]:
    """The same recipe on another number of GPUs, with the largest micro-batch that fits where the share does not."""
    config, policy = case.config, case.config.engine.activation_checkpointing
    share, rest = divmod(config.optim.batch_size, gpus)
    row: dict[str, Any] = {"gpus": gpus, "divides": not rest and share > 0}
    if not row["divides"]:
        return row
    wanted = config.loader.micro_batch or share
    if share % wanted:
        return {**row, "refused": f"micro-batches of {wanted} do not divide a share of {share}"}
    try:
        by = divide(config, gpus, wanted, share // wanted)
        most = most_images(case, by, policy)
        if wanted > most:
            wanted = most_dividing(case, gpus, share, policy) or wanted
            by = divide(config, gpus, wanted, share // wanted)
    except UserError as error:
        return {**row, "refused": str(error)}
    return {
        **row, "share": share, "micro_batch": wanted, "most": most, "memory": memory(case, by, wanted, policy)["total"],
        "states": sum(states(case.weights, by).gpu.values()), **_step(case, by, wanted, network, mfu),
    }  # fmt: skip
