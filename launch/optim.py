"""Parameter groups, AdamW, clipping, and the schedules of learning rate, weight decay and teacher momentum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Freeze:
    """From `epoch` on a value stays (`const`) or runs in a line to the end value of its cosine (`linear`)."""

    epoch: float
    strategy: str = "const"


@dataclass(frozen=True)
class Schedules:
    """Learning rate, weight decay and teacher momentum of every step, as the released StoP computes them.

    The released code advances its counters before their first use, so step 0 takes the values of counter 1; the
    momentum alone starts at 0. `stretch` lengthens all three beyond the end of training (`ipe_scale` there).
    """

    steps_per_epoch: int
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

    @property
    def span(self) -> int:
        """Length of the cosines in steps."""
        return int(self.stretch * self.epochs * self.steps_per_epoch)

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up."""
        return int(self.warmup_epochs * self.steps_per_epoch)

    def lr_at(self, step: int) -> float:
        """Learning rate of optimiser step `step` (0-based)."""
        counter = step + 1
        if counter < self.warmup:  # tested before the freeze, which therefore waits for the warm-up
            return self.start_lr + counter / self.warmup * (self.lr - self.start_lr)
        return self._frozen(counter, self.freeze_lr, self._lr_cosine)

    def weight_decay_at(self, step: int) -> float:
        """Weight decay of optimiser step `step` (0-based)."""
        return self._frozen(step + 1, self.freeze_weight_decay, self._decay_cosine)

    def momentum_at(self, step: int) -> float:
        """Teacher momentum after optimiser step `step` (0-based)."""
        total = self.steps_per_epoch * self.epochs * self.stretch
        return self.momentum + step * (self.final_momentum - self.momentum) / total

    def _lr_cosine(self, counter: int) -> float:
        progress = (counter - self.warmup) / max(1, self.span - self.warmup)
        return max(self.final_lr, _cosine(self.lr, self.final_lr, progress))

    def _decay_cosine(self, counter: int) -> float:
        value = _cosine(self.weight_decay, self.final_weight_decay, counter / max(1, self.span))
        stop = max if self.final_weight_decay <= self.weight_decay else min
        return stop(self.final_weight_decay, value)

    def _frozen(self, counter: int, freeze: Freeze | None, cosine) -> float:
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


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to biases, vectors, and position tables."""
    return parameter.ndim > 1 and "bias" not in name and not name.endswith("positions.table")


def make_optimizer(
    method: nn.Module, kind: str = "adamw", betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> Optimizer:
    """AdamW over the trainable parameters, in a decayed and an undecayed group; lr and decay are set every step.

    Raises ValueError where `apex_adamw` is asked for and NVIDIA Apex or a GPU is missing.
    """
    named = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if decays(name, p) is decayed], "decayed": decayed}
        for decayed in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
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
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0


def clip_gradients(method: nn.Module, max_norm: float, scope: str = "all") -> Tensor | None:
    """Clip the gradient norm of the method, or of its encoder alone (`scope="encoder"`, as released); 0 is off.

    Returns the norm before clipping, or None where nothing is clipped.
    """
    if not max_norm:
        return None
    module = method.get_submodule("encoder") if scope == "encoder" else method
    return torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], max_norm)
