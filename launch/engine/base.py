"""What every engine does: the adversary's part of a step, the teacher's, and the state that a checkpoint holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ...models.adversary import Adversary
from ...models.method import Method
from ..portable import Piece
from ..world import World
from .precision import LossScaler

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(ABC):
    """Steps a method and its optimiser over all ranks: `forward_backward`, `step`, `after_step`, and their state.

    Gradients are averaged over ranks and over the micro-batches of a step. An `adversary` (on the world's device) stays
    outside of what an engine divides: it goes into the method's forward as a second argument, takes its gradients from
    the same backward, and is stepped or skipped together with the method; clipping leaves it alone. `method` is for
    what it is, not for its weights, which an engine may have divided: ask those through `ask`.
    """

    kind: str
    optimizer: Optimizer

    def __init__(
        self,
        method: Method,
        world: World,
        scaler: LossScaler,
        accumulation: int = 1,
        clip_grad: float = 0.0,
        clip_scope: str = "all",
        adversary: Adversary | None = None,
    ):
        self.method, self.world, self.scaler = method, world, scaler
        self.accumulation, self.clip_grad, self.clip_scope = accumulation, clip_grad, clip_scope
        self.adversary = adversary
        self.clipped_norm: Tensor | None = None
        self.applied = 0  # steps that were not skipped, which Adam's bias correction counts
        # What had a gradient that was not finite at the last step that was skipped; ZeRO names the adversary alone
        # where both had.
        self.overflow_in = ""
        if world.size > 1:
            for tensor in adversary.tensors.values() if adversary else ():
                dist.broadcast(tensor.detach(), 0)

    # Training

    @abstractmethod
    def forward_backward(self, batch, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and scalars of micro-batch `micro` of the step, its gradients added; ranks exchange at the last."""

    def step(self, adversary_lr: float = 0.0) -> bool:
        """Apply the gradients and clear them; False if some were not finite and all ranks skipped the step.

        One decision holds for the method and its adversary, and on all ranks; a skipped step leaves both as they were.
        Outside float16 only ZeRO looks, so that a skip there is the end of a run.
        """
        if self.adversary and self.world.size > 1:
            self._average_adversary(self.adversary)
        applied = self._step_method()
        self.scaler.update(not applied)
        if applied:
            self.applied += 1
            if self.adversary:
                self.adversary.step(adversary_lr)
        if self.adversary:
            self.adversary.zero_grad()
        return applied

    @abstractmethod
    def _step_method(self) -> bool:
        """Unscale the adversary's gradients and the method's, and step the method, unless one is not finite."""

    def after_step(self, momentum: float) -> None:
        """What follows a step that was taken: the teacher, on the weights as they are stored."""
        self.method.after_step(momentum, self._stored)

    def _stored(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's numbers as this rank stores them."""
        return parameter

    @torch.no_grad()
    def ask(self, what: str, *inputs: Any) -> Any:
        """A forward pass of the method that trains nothing, by the name of its function; every rank asks at once."""
        return self._forward(*inputs, ask=what)

    def _forward(self, *inputs: Any, ask: str) -> Any:
        return self.method(*inputs, ask=ask)

    def _inputs(self, batch: Any) -> tuple:
        return (batch, self.adversary.tensors) if self.adversary else (batch,)

    def _average_adversary(self, adversary: Adversary) -> None:
        """Average the adversary's gradients over ranks in one exchange; they become views of one buffer."""
        leaves = adversary.tensors.values()
        buffer = torch.cat([gradient.flatten() for gradient in adversary.gradients()])
        dist.all_reduce(buffer)
        buffer /= self.world.size
        for leaf, mean in zip(leaves, buffer.split([leaf.numel() for leaf in leaves]), strict=True):
            leaf.grad = mean.view_as(leaf)

    def _adversary_gradients(self) -> list[Tensor]:
        return [t.grad for t in self.adversary.tensors.values() if t.grad is not None] if self.adversary else []

    # State

    @abstractmethod
    def stored(self) -> Iterator[Tensor]:
        """Every number of the weights that this rank stores, for a look at them."""

    @abstractmethod
    def _pieces(self) -> dict[str, Piece]:
        """What this rank holds of weights and moments, as views wherever that is possible."""

    @abstractmethod
    def _set_applied(self, steps: int) -> None:
        """Give the optimiser its count of steps."""

    def pieces(self) -> dict[str, Piece]:
        """What this rank writes of a checkpoint: `method.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`, `adversary.…`."""
        found = self._pieces()
        if self.world.first:
            found |= {name: Piece.whole(tensor) for name, tensor in self._statistics().items()}
        if self.world.first and self.adversary:
            for name, tensor in self.adversary.named_state().items():
                found[f"adversary.{name}"] = Piece.whole(tensor)
        return found

    def facts(self) -> dict[str, Any]:
        """The numbers of a checkpoint that are no tensors."""
        return {"kind": self.kind, "applied": self.applied, "scaler": self.scaler.state_dict()}

    def load(self, read, facts: Mapping[str, Any], there: set[str]) -> None:
        """Take up a checkpoint: `read(pieces)` fills them from it, `there` are its tensors.

        Raises ValueError for a checkpoint of another model, without a change to this one where names tell.
        """
        attacked = any(name.startswith("adversary.") for name in there)
        if attacked != (self.adversary is not None):
            holds, here = ("an", "none") if attacked else ("no", "one")
            raise ValueError(
                f"the saved state holds {holds} adversary and this run trains {here}: set method.adversary as in the "
                "saved run"
            )
        adversary = {} if self.adversary is None else self.adversary.named_state()
        statistics = self._statistics()
        known = self._names() | {f"adversary.{name}" for name in adversary} | statistics.keys()
        beyond = sorted(name for name in there if name.startswith(("method.", "adversary.")) and name not in known)
        if beyond:
            raise ValueError(f"it holds {beyond[0]}, which this recipe has not")
        state = {name: torch.empty_like(tensor) for name, tensor in adversary.items()}
        read({f"adversary.{name}": Piece.whole(tensor) for name, tensor in state.items()})
        read({name: Piece.whole(tensor) for name, tensor in statistics.items()})
        self._load(read)
        self.applied = int(facts["applied"])
        self._set_applied(self.applied)
        self.scaler.load_state_dict(facts["scaler"])
        if self.adversary:
            self.adversary.load_named_state(state, self.applied)

    def _statistics(self) -> dict[str, Tensor]:
        """What the method keeps beside its weights, the same on all ranks and divided by none: running statistics."""
        found = {}
        for path, module in self.method.named_modules():
            for name, tensor in module._buffers.items():
                if tensor is not None and name not in module._non_persistent_buffers_set:
                    found[f"method.{path}.{name}"] = tensor
        return found

    def _names(self) -> set[str]:
        return {f"method.{name}" for name, _ in self.method.named_parameters()}

    def _load(self, read) -> None:
        read(self._pieces())


def prepare_moments(optimizer: Optimizer) -> None:
    """Give Adam its moments now, zero as at its first step, so that a checkpoint finds and fills them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state[parameter]:
                continue
            state = {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in MOMENTS}
            if isinstance(optimizer, torch.optim.AdamW):  # Apex counts steps in the group
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            optimizer.state[parameter] = state


def set_steps(optimizer: Optimizer, steps: int) -> None:
    """Give Adam its count of steps, wherever it keeps that."""
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = steps
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"].fill_(steps)
        elif "step" in state:
            state["step"] = steps
