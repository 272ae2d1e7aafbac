"""The adversary of AdPE: tensors that climb the loss the method descends, each row held inside a ball around zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

NORMS = ("none", "l2", "linf")


def _check_bound(norm: str, epsilon: float | None) -> None:
    if norm not in NORMS:
        raise ValueError(f"method.adversary.norm={norm} is not known; choose one of {', '.join(NORMS)}.")
    if epsilon is None:
        if norm != "none":
            raise ValueError(f"method.adversary.norm={norm} needs a bound; set method.adversary.epsilon or norm=none.")
        return
    if norm == "none":
        raise ValueError(
            f"method.adversary.epsilon={epsilon:g} bounds nothing without a norm; set method.adversary.norm=l2 or "
            "linf, or leave epsilon out."
        )
    if not epsilon > 0:
        raise ValueError(f"method.adversary.epsilon={epsilon:g} leaves the adversary no room; set it above 0.")


def _row_norms(tensor: Tensor, norm: str) -> Tensor:
    """Norms `[rows]` of a tensor `[rows, …]`: the largest magnitude for `linf`, else Euclidean."""
    return torch.linalg.vector_norm(tensor.reshape(len(tensor), -1), torch.inf if norm == "linf" else 2, dim=1)


@torch.no_grad()
def project_(tensor: Tensor, norm: str, epsilon: float | None) -> None:
    """Move every row of `tensor` `[rows, …]` into the ball of radius `epsilon` around zero, in place.

    l2: p · ε / max(ε, ‖p‖), which leaves a zero row at zero (the released AdPE divides by its norm); linf: a clamp.
    """
    if norm == "none":
        return
    assert epsilon is not None
    if norm == "linf":
        tensor.clamp_(-epsilon, epsilon)
        return
    scale = epsilon / _row_norms(tensor, norm).clamp_min(epsilon)
    tensor.mul_(scale.reshape(-1, *[1] * (tensor.ndim - 1)))


class Adversary:
    """Named tensors `[rows, …]` that AdamW moves up the loss and that are then projected row by row (AdPE).

    A row is what is bounded on its own: the shift of one layer, the δ of one patch. The tensors are float32 leaves
    in `tensors`; a method takes them as an input, so that they are no part of its parameters or its checkpoint.
    `epsilon` has the unit of the tensors (patches for a shift of coordinates). Raises ValueError where norm and bound
    do not fit together.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        norm: str,
        epsilon: float | None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        _check_bound(norm, epsilon)
        self.norm, self.epsilon = norm, epsilon
        self._options = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        # AdamW's state goes by position: sorted, it belongs to the names whatever order they came in.
        self.tensors: dict[str, Tensor] = {name: _leaf(tensors[name]) for name in sorted(tensors)}
        self.optimizer = self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(list(self.tensors.values()), lr=0.0, maximize=True, fused=True, **self._options)

    def step(self, lr: float) -> None:
        """Ascend by one AdamW step of rate `lr` and project; a missing gradient counts as zero.

        At rate 0, the first iteration of a published run, moments are gathered but nothing moves or is projected.
        """
        assert lr >= 0, "the adversary ascends by itself; its rate is positive"
        for tensor, gradient in zip(self.tensors.values(), self.gradients(), strict=True):
            tensor.grad = gradient
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        if lr > 0:
            for tensor in self.tensors.values():
                project_(tensor, self.norm, self.epsilon)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()

    def gradients(self) -> list[Tensor]:
        """The gradient of every tensor in the order of `tensors`, zeros where backward left none."""
        return [torch.zeros_like(t) if t.grad is None else t.grad for t in self.tensors.values()]

    def to(self, device: torch.device | str) -> Adversary:
        """Move to `device`, in place: new leaves, and the optimiser with its moments on them; gradients are dropped."""
        state = self.optimizer.state_dict()
        self.tensors.update({name: _leaf(tensor.to(device)) for name, tensor in self.tensors.items()})
        self.optimizer = self._make_optimizer()
        self.optimizer.load_state_dict(state)
        return self

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """Mean and largest row norm of every tensor, `NAME_norm` and `NAME_norm_max`, scalars on its device.

        The norm is the one that is bounded: the largest magnitude for `linf`, else Euclidean.
        """
        out = {}
        for name, tensor in self.tensors.items():
            rows = _row_norms(tensor, self.norm)
            out[f"{name}_norm"], out[f"{name}_norm_max"] = rows.mean(), rows.max()
        return out

    def named_state(self) -> dict[str, Tensor]:
        """The tensors by name and their moments, `exp_avg.NAME` and `exp_avg_sq.NAME`, zeros before the first step."""
        out = {name: tensor.detach() for name, tensor in self.tensors.items()}
        for moment in ("exp_avg", "exp_avg_sq"):
            for name, tensor in self.tensors.items():
                found = self.optimizer.state.get(tensor, {}).get(moment)
                out[f"{moment}.{name}"] = torch.zeros_like(out[name]) if found is None else found
        return out

    @torch.no_grad()
    def load_named_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Take up what `named_state` gave after `steps` steps; the names and shapes must be these tensors'."""
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])
            self.optimizer.state[tensor] = {
                "step": torch.full((), float(steps), device=tensor.device),
                "exp_avg": state[f"exp_avg.{name}"].to(tensor.device, copy=True),
                "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(tensor.device, copy=True),
            }


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).clone(memory_format=torch.contiguous_format).requires_grad_()
