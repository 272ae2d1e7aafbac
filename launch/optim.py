"""Parameter groups, AdamW, clipping, and the schedules of learning rate, weight decay and teacher momentum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class Freeze:
    """From `epoch` on a value stays (`const`) or runs in a line to the end value of its cosine (`linear`)."""

    epoch: float
    strategy: str = "const"


@dataclass(frozen=True)
class Schedules:
    """Learning rate, weight decay and teacher momentum of every step, as the released StoP, MAE and AdPE compute them.

    StoP advances its counters before their first use, so step 0 takes the values of counter 1, and cuts warm-up and
    span to `whole_steps`; the momentum alone starts at 0. MAE and AdPE cut nothing and start at `mae_first_counter`.
    `stretch` lengthens all three beyond the end of training (`ipe_scale` in StoP). With a `power` the learning rate
    falls as (1 - progress) ** power over all steps, and warm-up is a factor on that (mmsegmentation's `poly`).
    """

    steps_per_epoch: float
    epochs: float
    lr: float
    start_lr: float
    final_lr: float
    warmup_epochs: float
    weight_decay: float
    final_weight_decay: float
    momentum: float = 0.996
    final_momentum: float = 1.0
    stretch: float = 1.0
    freeze_lr: Freeze | None = None
    freeze_weight_decay: Freeze | None = None
    first_counter: float = 1.0
    whole_steps: bool = True
    power: float | None = None
    drops: tuple[float, ...] = ()  # shares of the span after each of which the rate is a tenth, instead of a cosine

    @property
    def span(self) -> float:
        """Length of the cosines in steps."""
        return self._steps(self.stretch * self.epochs)

    @property
    def warmup(self) -> float:
        """Steps of linear warm-up."""
        return self._steps(self.warmup_epochs)

    def with_lr(self, lr: float, constant: bool = False) -> Schedules:
        """The same schedules around another peak, as the adversary's; `constant` is that rate from the first step on.

        Both are the published rates without their minus sign (AdPE `lr_schedule.py`, `fix_lr` 0 and 1).
        """
        return replace(self, lr=lr, start_lr=lr, final_lr=lr) if constant else replace(self, lr=lr)

    def lr_at(self, step: int) -> float:
        """Learning rate of optimiser step `step` (0-based)."""
        counter = step + self.first_counter
        if self.power is not None:
            return self._poly(counter, self.power)
        if counter < self.warmup:  # tested before the freeze, which therefore waits for the warm-up
            return self.start_lr + counter / self.warmup * (self.lr - self.start_lr)
        if self.drops:
            return self.lr * 0.1 ** sum(counter >= drop * self.span for drop in self.drops)
        return self._frozen(counter, self.freeze_lr, self._lr_cosine)

    def weight_decay_at(self, step: int) -> float:
        """Weight decay of optimiser step `step` (0-based)."""
        return self._frozen(step + self.first_counter, self.freeze_weight_decay, self._decay_cosine)

    def momentum_at(self, step: int) -> float:
        """Teacher momentum after optimiser step `step` (0-based)."""
        total = self.steps_per_epoch * self.epochs * self.stretch
        return self.momentum + step * (self.final_momentum - self.momentum) / total

    def _steps(self, epochs: float) -> float:
        steps = epochs * self.steps_per_epoch
        return int(steps) if self.whole_steps else steps

    def _lr_cosine(self, counter: float) -> float:
        progress = (counter - self.warmup) / max(1, self.span - self.warmup)
        return max(self.final_lr, _cosine(self.lr, self.final_lr, progress))

    def _poly(self, counter: float, power: float) -> float:
        regular = self.final_lr + (self.lr - self.final_lr) * max(0.0, 1 - counter / max(1, self.span)) ** power
        warm = min(1.0, counter / self.warmup) if self.warmup else 1.0
        first = self.start_lr / self.lr
        return regular * (first + warm * (1 - first))

    def _decay_cosine(self, counter: float) -> float:
        value = _cosine(self.weight_decay, self.final_weight_decay, counter / max(1, self.span))
        stop = max if self.final_weight_decay <= self.weight_decay else min
        return stop(self.final_weight_decay, value)

    def _frozen(self, counter: float, freeze: Freeze | None, cosine) -> float:
        start = freeze and int(freeze.epoch * self.steps_per_epoch)
        if freeze is None or start is None or counter < start:
            return cosine(counter)
        held = cosine(start)
        if freeze.strategy == "const":
            return held
        progress = (counter - start) / max(1, self.span - start)
        return held + progress * (cosine(self.span) - held)


def _cosine(first: float, last: float, progress: float) -> float:
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * progress))


def mae_first_counter(accumulation: int) -> float:
    """The counter of step 0 in MAE and AdPE, whose learning rate moves with every micro-batch: the last one's counts.

    0 without accumulation, else (A - 1) / A steps (AdPE `train_epoch.py`).
    """
    return (accumulation - 1) / accumulation


def scaled_lr(base: float, batch: int) -> float:
    """The learning rate of `batch` images per optimiser step (crops not counted) for a `base` rate per 256 images."""
    return base * batch / 256


_UNDECAYED = ("_token", "_position", ".table", ".rows_table", ".columns_table")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to biases, vectors, tokens, and tables of positions, absolute or relative."""
    return parameter.ndim > 1 and "bias" not in name and not name.endswith(_UNDECAYED)


def decays_in_adpe(name: str, parameter: nn.Parameter) -> bool:
    """Whether AdPE as released decays it: all but vectors and biases, so tables and tokens `[1, 1, D]` too."""
    return parameter.ndim > 1 and not name.endswith(".bias")


def decays_in_finetuning(name: str, parameter: nn.Parameter) -> bool:
    """Whether AdPE's released fine-tuning decays it: also relative tables, but neither tokens nor positions."""
    return decays_in_adpe(name, parameter) and (decays(name, parameter) or "relative_" in name)


def layer_of(name: str, depth: int) -> int:
    """The layer of a parameter for layer decay: 0 for what makes tokens, i + 1 for block i, depth + 1 for what follows.

    `name` is that in a method, whose encoder has `depth` blocks (BEiT, MAE; AdPE `lr_decay.py`).
    """
    part, _, rest = name.partition(".")
    if part != "encoder":
        return depth + 1
    if rest.startswith("blocks."):
        return int(rest.split(".")[1]) + 1
    return 0 if rest.startswith(("patch_embed.", "positions.", "cls_")) else depth + 1


def make_optimizer(
    method: nn.Module,
    kind: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    rule: Callable[[str, nn.Parameter], bool] = decays,
    layer_decay: float = 1.0,
    depth: int = 0,
) -> Optimizer:
    """AdamW over the trainable parameters in groups of one decay and layer; lr and decay are set every step.

    `rule(name, parameter)` says what decays. With `layer_decay` below 1 the learning rate of layer l (see `layer_of`)
    is `layer_decay ** (depth + 1 - l)` of the schedule's, the group's `lr_scale`. Raises ValueError where `apex_adamw`
    is asked for and NVIDIA Apex or a GPU is missing.
    """
    grouped: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            layer = layer_of(name, depth) if layer_decay != 1.0 else depth + 1
            grouped.setdefault((layer, rule(name, parameter)), []).append(parameter)
    groups = [
        {"params": parameters, "decayed": decayed, "lr_scale": layer_decay ** (depth + 1 - layer)}
        for (layer, decayed), parameters in sorted(grouped.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]
    if kind == "apex_adamw":
        return _apex_adamw()(groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, adam_w_mode=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=True)


def _apex_adamw():
    if not torch.cuda.is_available():
        raise ValueError("optim.kind=apex_adamw needs an NVIDIA GPU and none is visible; use optim.kind=adamw.")
    try:
        from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "optim.kind=apex_adamw needs NVIDIA Apex, built from its own repository (the package called apex on "
            "PyPI is something else); install it or use optim.kind=adamw."
        ) from error
    return FusedAdam


def set_step(optimizer: Optimizer, schedules: Schedules, step: int) -> None:
    """Give the optimiser's groups the learning rate and weight decay of `step`."""
    lr, weight_decay = schedules.lr_at(step), schedules.weight_decay_at(step)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0


def clip_gradients(parameters: Mapping[str, nn.Parameter], max_norm: float, scope: str = "all") -> Tensor | None:
    """Clip the gradient norm of all named parameters, or of the encoder's (`scope="encoder"`, as released); 0 is off.

    Returns the norm before clipping, or None where nothing is clipped.
    """
    if not max_norm:
        return None
    prefix = "encoder." if scope == "encoder" else ""
    chosen = [p for name, p in parameters.items() if name.startswith(prefix) and p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(chosen, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
