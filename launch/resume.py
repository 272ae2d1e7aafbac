"""Where a run goes on: its folder, its newest undamaged checkpoint, and whether the settings are still the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..data.sources import Joined
from ..data.webdataset import Stream
from . import portable
from .checkpoint import Checkpoints, Saved, lock
from .config import Config, differences, result_settings
from .engine.base import Engine
from .errors import UserError
from .parts import Parts

# Settings that decide which tensors there are: with another value, a checkpoint cannot be taken up at all.
_SHAPES = (
    "model.size", "model.width", "model.depth", "model.heads", "model.mlp_ratio", "model.patch_size", "model.channels",
    "model.positions", "model.relative.terms", "model.relative.shared", "model.relative.method", "model.relative.mode",
    "model.relative.ratio", "method.kind", "method.decoder", "method.predictor", "method.mask_token",
    "method.adversary.mode", "method.adversary.per", "method.classifier", "model.class_token", "model.image_size",
)  # fmt: skip


def open_run(run: Path, checkpoints: Checkpoints, fresh: bool, held: list[int]) -> tuple[Saved | None, list[str]]:
    """The checkpoint to go on from, and what is damaged; the folder's lock is added to `held`.

    Raises UserError if `fresh` meets a run, if another process holds the folder, or if every checkpoint is damaged.
    """
    held.append(lock(run))
    if fresh and ((run / "metrics.jsonl").exists() or checkpoints.folders()):
        raise UserError(f"--fresh: {run} holds a run already; move it away yourself, or choose another run.dir.")
    checkpoints.clean()
    saved, complaints = checkpoints.newest()
    if saved is None and complaints:
        raise UserError(
            f"None of the {len(complaints)} checkpoints in {checkpoints.folder} can be used. {complaints[0]} Restore "
            "a copy, or start anew with another run.dir."
        )
    return saved, complaints


def describe(config: Config, parts: Parts, engine: Engine, step: int, before: dict | None) -> dict[str, Any]:
    """What a checkpoint says of itself, for a later start to compare with."""
    return {
        "step": step,
        "epoch": step / parts.steps_per_epoch,
        "samples": len(parts.train),
        "images": parts.images,
        "layout": _layout(parts),
        "before": before,
        "config": config.to_dict(),
        "micro_batch": parts.micro_batch,
        "accumulation": parts.accumulation,
        "precision": str(parts.method.compute_dtype).removeprefix("torch."),
        "ranks": engine.world.size,
        "engine": engine.facts(),
        "torch": torch.__version__,
    }


def _layout(parts: Parts) -> int | list[int] | None:
    """What beside the number of images decides their order: of a stream its shards, of several places their sizes."""
    if isinstance(parts.train, Stream):
        return parts.train.fingerprint
    return parts.train.sizes if isinstance(parts.train, Joined) else None


def check_same(config: Config, parts: Parts, saved: Saved, allow_change: bool) -> list[str]:
    """Notes on what differs without harm; UserError where a setting that changes the result is another than before."""
    # Through today's schema, so that a setting that is newer than the run counts as its default.
    before = Config.stored(saved.about["config"])
    if before.method.kind != config.method.kind:
        raise UserError(
            f"The run in {config.run.dir} is of method.kind={before.method.kind}, and this recipe of "
            f"{config.method.kind}: choose another run.dir."
        )
    changed = differences(result_settings(before), result_settings(config))
    if len(parts.train) != saved.about["samples"]:
        changed.append(f"images to train: {saved.about['samples']} -> {len(parts.train)}")
    images = saved.about.get("images", parts.images)
    if images != parts.images:
        changed.append(f"images, which come in another order or with other pixels: {images} -> {parts.images}")
    if images == parts.images and saved.about.get("layout") not in (None, _layout(parts)):
        what = "shards or data.streams" if isinstance(parts.train, Stream) else "images of each place in data.path"
        changed.append(f"{what}, and with them the order")
    changed += _efficiency_that_matters(config, parts, saved)
    if changed and not allow_change:
        fitting = not any(line.startswith(_SHAPES) for line in changed)
        way = "set them back, choose another run.dir, or pass --allow-config-change"
        raise UserError(
            f"The run in {config.run.dir} was started with other settings ({'; '.join(changed)}): "
            f"{way if fitting else 'set them back, or choose another run.dir'}."
        )
    notes = [f"changed    {line}" for line in changed]
    precision = str(parts.method.compute_dtype).removeprefix("torch.")
    if precision != saved.about["precision"]:
        notes.append(f"changed    precision: {saved.about['precision']} -> {precision}; losses will differ slightly")
    return notes


def _efficiency_that_matters(config: Config, parts: Parts, saved: Saved) -> list[str]:
    """How the batch is divided, where a published setting lets that change the result."""
    changed = []
    micro_batch = saved.about.get("micro_batch", parts.micro_batch)
    if config.method.kind == "jepa" and config.mask.setting == "published" and micro_batch != parts.micro_batch:
        changed.append(f"images a micro-batch, which mask.setting=published cuts to one length: {micro_batch} -> "
                       f"{parts.micro_batch}")  # fmt: skip
    if (config.data.mixup or config.data.cutmix) and micro_batch != parts.micro_batch:
        changed.append(f"images a micro-batch, which data.mixup and data.cutmix pair: {micro_batch} -> "
                       f"{parts.micro_batch}")  # fmt: skip
    accumulation = saved.about.get("accumulation", parts.accumulation)
    if config.optim.schedule == "mae_micro" and accumulation != parts.accumulation:
        changed.append(f"micro-batches a step, which optim.schedule=mae_micro counts: {accumulation} -> "
                       f"{parts.accumulation}")  # fmt: skip
    segmenter = config.method.segmenter
    if config.method.kind == "segment" and segmenter.norm == "batch" and accumulation != parts.accumulation:
        changed.append(f"micro-batches a step, which method.segmenter.norm=batch norms apart: {accumulation} -> "
                       f"{parts.accumulation}")  # fmt: skip
    return changed


def restore(engine: Engine, saved: Saved) -> None:
    """Take up the state of a checkpoint; UserError if it is of another model."""
    try:
        engine.load(saved.fill, saved.about["engine"], portable.names(saved.path))
    except ValueError as error:
        way = str(error) if ":" in str(error) else f"{error}; set model, method and optim back"
        raise UserError(f"{saved.path} does not fit this recipe: {way}, or choose another run.dir.") from error
    except OSError as error:
        raise UserError(f"{saved.path} cannot be read: {error}.") from error
    except KeyError as error:
        raise UserError(f"{saved.path} lacks {error} in its about.json; choose another run.dir.") from error
