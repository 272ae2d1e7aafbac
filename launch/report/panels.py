"""Which figures a report has: their order, titles, units and scales, and what is said where one is absent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .read import Run, finite

Scale = Literal["auto", "linear", "powers of two"]  # auto: logarithmic where that is right


@dataclass(frozen=True)
class Panel:
    """A figure of one number over training, `scale` being its y axis."""

    key: str  # of Run.curves
    title: str
    unit: str = ""
    factor: float = 1.0  # from what was written to the unit
    scale: Scale = "linear"


@dataclass(frozen=True)
class Section:
    """Figures that belong together, and the sentence for runs that have none of them."""

    title: str
    panels: tuple[Panel, ...]
    others: tuple[str, ...]  # what the key of a number begins with that is not among them
    absent: str


def _percent(key: str, title: str) -> Panel:
    return Panel(key, title, "%", 100.0)


_HELD_OUT = (
    _percent("probe/knn", "k-NN accuracy"), _percent("probe/linear", "linear probe accuracy"),
    _percent("probe/top1", "top-1 accuracy"), _percent("probe/top5", "top-5 accuracy"),
    _percent("probe/miou", "mean IoU"), _percent("probe/macc", "mean class accuracy"),
    _percent("probe/aacc", "pixel accuracy"), _percent("probe/box_AP", "box AP"),
    _percent("probe/box_AP50", "box AP50"), _percent("probe/box_AP75", "box AP75"),
    _percent("probe/box_APs", "box AP, small"), _percent("probe/box_APm", "box AP, medium"),
    _percent("probe/box_APl", "box AP, large"),
    _percent("probe/mask_AP", "mask AP"), _percent("probe/mask_AP50", "mask AP50"),
    _percent("probe/mask_AP75", "mask AP75"), _percent("probe/mask_APs", "mask AP, small"),
    _percent("probe/mask_APm", "mask AP, medium"), _percent("probe/mask_APl", "mask AP, large"),
    Panel("probe/loss", "loss on held-out images", scale="auto"),
)  # fmt: skip

SECTIONS = (
    Section("Loss and learning rate", (
        Panel("loss", "training loss", scale="auto"),
        Panel("lr", "learning rate"),
        _percent("accuracy", "accuracy on training batches"),
        _percent("pixel_accuracy", "pixel accuracy on training batches"),
    ), ("loss_",), "No training step was finished."),
    Section("Held-out images", _HELD_OUT, ("probe/",),
            "Nothing was measured on held-out images (probe.before, probe.every_epochs, probe.after; labels of two "
            "classes or more are needed)."),
    Section("Features", (
        Panel("collapse/rank_me", "effective rank (RankMe)"),
        Panel("collapse/feature_std", "spread of features over images"),
        Panel("target_std", "standard deviation of targets"),
        Panel("prediction_std", "standard deviation of predictions"),
    ), ("collapse/",), "The features were not looked at (monitor.collapse_every; tasks are measured by labels)."),
    Section("Adversary", (
        Panel("adversary/loss_gain", "what the attack adds to the loss"),
        Panel("adversary/loss_with", "loss under attack", scale="auto"),
        Panel("adversary/loss_without", "loss without the attack", scale="auto"),
        Panel("adversary_encoder_norm", "norm of the attack, encoder, mean"),
        Panel("adversary_encoder_norm_max", "norm of the attack, encoder, largest"),
        Panel("adversary_decoder_norm", "norm of the attack, decoder, mean"),
        Panel("adversary_decoder_norm_max", "norm of the attack, decoder, largest"),
        Panel("adversary_lr", "learning rate of the adversary"),
    ), ("adversary",), "There is no adversary (method.adversary.mode=none)."),
    Section("Other schedules", (
        Panel("weight_decay", "weight decay"),
        Panel("momentum", "momentum of the teacher"),
    ), (), "No training step was finished."),
    Section("Stability", (
        Panel("gradient_norm", "norm of the gradient before clipping", scale="auto"),
        Panel("loss_scale", "loss scale of float16", scale="powers of two"),
        Panel("skipped_steps", "skipped steps, in all"),
    ), (), "There is no norm of the gradient (optim.clip_grad=0) and no loss scale (engine.precision is not float16)."),
    Section("Speed", (
        Panel("images_per_s", "throughput", "images/s"),
        _percent("data_wait", "time spent waiting for data"),
        _percent("mfu", "model FLOPs utilisation"),
        Panel("memory_gb", "peak memory of the first GPU", "GB"),
    ), (), "No speed was measured: fewer steps than monitor.log_every."),
    Section("Other numbers of training", (
        Panel("redraw_rate", "masks drawn again", "per image"),
        Panel("skipped_images", "unreadable images", "per step"),
    ), ("",), ""),
)  # fmt: skip


def sections(runs: Sequence[Run]) -> list[tuple[Section, list[Panel]]]:
    """Every section with the panels of what some run has; a number that is not listed goes where its name begins."""
    present = {key for run in runs for key, curve in run.curves.items() if finite(curve.y).size}
    constant = {"skipped_images"} - {
        key for run in runs for key in ("skipped_images",) if key in run.curves and finite(run.curves[key].y).any()
    }
    known = {panel.key for section in SECTIONS for panel in section.panels}
    unlisted = sorted(present - known)
    out = []
    for section in SECTIONS:
        panels = [panel for panel in section.panels if panel.key in present - constant]
        mine = [key for key in unlisted if section.others and key.startswith(section.others)]
        unlisted = [key for key in unlisted if key not in mine]
        panels += [Panel(key, key.split("/", 1)[-1].replace("_", " "), scale="auto") for key in mine]
        out.append((section, panels))
    return out


def is_log(scale: Scale, values: Sequence[np.ndarray]) -> bool:
    """Whether the y axis is logarithmic: as told, or where all values are positive and span more than a decade."""
    if scale == "linear":
        return False
    joined = finite(np.concatenate(list(values))) if values else np.empty(0)
    if not joined.size or joined.min() <= 0:
        return False
    return scale == "powers of two" or joined.max() / joined.min() > 10
