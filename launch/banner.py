"""What a run says about itself: the banner at its start, its probes, and its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from ..models.jepa import Jepa
from ..models.mae import Mae
from ..models.method import Method
from .config import Config
from .monitor import hardware, say
from .nodes.hosts import versions_line
from .parts import Parts
from .world import World


def _millions(module: nn.Module) -> str:
    # Of a weight that ZeRO 3 has divided, the whole is known as ds_numel.
    return f"{sum(getattr(p, 'ds_numel', p.numel()) for p in module.parameters()) / 1e6:.2f} M"


def _engine(config: Config, world: World) -> str:
    """How weights and their states lie on the ranks, and what else costs or saves memory."""
    section = config.engine
    what = "one process" if world.size == 1 else f"a replica on each of {world.size} ranks"
    if section.kind == "deepspeed":
        what = f"DeepSpeed, {section.deepspeed}, {world.size} ranks"
    elif section.kind == "fsdp":
        what = f"FSDP2, divided over {world.size // section.replicas} ranks"
        what += f", {section.replicas} replicas" if section.replicas > 1 else ""
        what += ", offloaded to the host" if section.offload else ""
    policy = section.activation_checkpointing
    if policy != "none":
        what += f", {policy} activation checkpointing" if isinstance(policy, str) else f", every {policy}th block again"
    return what + (", compiled blocks" if section.compile else "")


def _trained(config: Config, method: Method) -> str:
    """What trains, where its positions are uncertain, and what a published setting is known not to do."""
    size = f"encoder {_millions(method.encoder)}"
    if isinstance(method, Jepa):
        return f"{size}, predictor {_millions(method.predictor)} parameters, noise on {config.method.stop.where}"
    terms, adversary = config.model.relative.terms, config.method.adversary
    positions = "absolute positions" if terms == "none" else f"relative positions on {terms}"
    if not isinstance(method, Mae):
        return f"{size} of {_millions(method)} parameters in all, {positions}"
    text = f"{size}, decoder {_millions(method.decoder)} parameters, {positions}"
    if adversary.mode == "none":
        return text
    bound = "unbounded" if adversary.epsilon is None else f"{adversary.norm} ≤ {adversary.epsilon:g}"
    return f"{text} under {adversary.mode} attack, {bound}"


def cautions(config: Config) -> list[str]:
    """What a user should know of this configuration before spending hours on it."""
    adversary, found = config.method.adversary, []
    if config.optim.warmup_epochs > config.optim.epochs:
        found.append(
            f"caution    optim.warmup_epochs={config.optim.warmup_epochs:g} is longer than optim.epochs="
            f"{config.optim.epochs}: the learning rate never reaches its peak"
        )
    relative = config.model.relative.terms != "none"
    if relative and (adversary.mode, adversary.where, adversary.per) == ("embedding", "queries", "table"):
        found.append(
            "caution    this attack does nothing: softmax cancels one vector on a query's whole row; "
            "method.adversary.where=keys acts"
        )
    if adversary.mode == "coordinate" and adversary.norm == "none":
        found.append(
            "caution    the shift is unbounded (method.adversary.norm=none); a line here will say so above 2 patches"
        )
    return found


def facts(config: Config, world: World, parts: Parts, start: str) -> dict[str, str]:
    """Machines and versions, precision and why, sizes, batch and steps, and where the run starts."""
    method, batch = parts.method, config.optim.batch_size
    dtype = str(method.compute_dtype).removeprefix("torch.")
    micro = f" × {parts.accumulation} micro-batches" if parts.accumulation > 1 else ""
    rows, columns = method.encoder.grid
    held_out = f"{len(parts.val):,} held out" if parts.val is not None else "none held out"
    views = f" ({config.data.views} crops each)" if config.data.views > 1 else ""
    teacher = " and teacher" if isinstance(method, Jepa) else ""
    choices = method.kernel_choices(world.device)
    kernels = "; ".join(f"{path}: {choice.operator} ({choice.why})" for path, choice in choices.items())
    return {
        "run": f"{config.run.dir}  (recipe: {config.about})" if config.about else str(config.run.dir),
        "hardware": hardware(world),
        "versions": versions_line(config),
        "engine": _engine(config, world),
        "precision": f"{dtype} ({parts.precision_reason}); parameters{teacher} float32",
        "kernels": kernels,
        "model": f"{_trained(config, method)}, {rows}×{columns} patches, {parts.gflops_per_image:.3g} GFLOP an image",
        "data": f"{len(parts.train):,} images ({parts.images}) to train{views}, {held_out}, "
        f"{parts.workers} worker{'s' * (parts.workers != 1)}",
        "batch": f"{batch} = {world.size} rank{'s' * (world.size != 1)} × {parts.micro_batch}{micro}; "
        f"{parts.steps_per_epoch:.7g} steps an epoch, {parts.steps} in all",
        "start": start,
    }


def banner(console: Console, lines: dict[str, str], config: Config, world: World, notes: list[str], hosts: list[str]):
    """Print the facts of a start, its machines, and what a user should know."""
    for name, text in lines.items():
        if not text:  # a method without a choice of kernels
            continue
        say(console, f"{name:10} {text}")
        if name == "hardware" and world.size > world.local_size:
            for host in hosts:
                say(console, f"{'':10} {host}")
    for note in [*cautions(config), *notes]:
        say(console, note)


def accuracy(when: str, found: dict[str, Any]) -> str:
    """A probe in one line."""
    few = f", {found['labels_per_class']} labels per class" if "labels_per_class" in found else ""
    spread = {k: f" ± {100 * found[k + '_std']:.1f}" if k + "_std" in found else "" for k in ("knn", "linear")}
    return (
        f"probe {when}{few}: k-NN {100 * found['knn']:.1f}{spread['knn']} %, "
        f"linear {100 * found['linear']:.1f}{spread['linear']} %"
    )


def summary(console: Console, run: Path, steps: int, before: dict | None, after: dict | None) -> None:
    """What training brought, and how to get at the encoder."""
    if before and after:
        for key, name in (("knn", "k-NN"), ("linear", "linear")):
            old, new = 100 * before[key], 100 * after[key]
            say(console, f"{name:10} {old:.1f} % before -> {new:.1f} % after ({new - old:+.1f} points)")
    say(console, f"Finished: {steps} steps in {run}; elsewhere.load({str(run)!r}) gives the encoder.")
