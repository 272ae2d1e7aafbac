"""Where a run's numbers and pictures go besides `metrics.jsonl`: TensorBoard, Weights & Biases."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .errors import UserError

WANDB_PROJECT = "elsewhere"  # for monitor.wandb=true


class Sink(Protocol):
    """Takes what rank 0 measures."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step by names such as `train/loss`."""
        ...

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """A picture, uint8 `[3, H, W]`."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `folder`; what an earlier life of the run wrote of `first_step` and later is withdrawn."""

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, image: Tensor, step: int) -> None:
        self._writer.add_image(name, image, step)

    def close(self) -> None:
        self._writer.close()


def load_wandb() -> Any:
    """The package wandb; raises UserError where it is not there."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "monitor.wandb needs the package wandb: python3 -m pip install wandb, or leave the setting out."
        ) from error
    return wandb


class Wandb:
    """A run of Weights & Biases in the project that `wanted` names, the same for every life of the run in `folder`.

    Its mode, account and server are those of wandb's own variables (WANDB_MODE, WANDB_ENTITY, WANDB_BASE_URL). Numbers
    come over `step`, so that a run that goes on from a checkpoint may log a step again. Raises UserError where wandb
    cannot start.
    """

    def __init__(self, folder: Path, wanted: bool | str, name: str | None, config: Mapping[str, Any]):
        self._wandb = wandb = load_wandb()
        known = folder / "wandb_id.txt"
        if not known.exists():
            known.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
        try:
            self._run = wandb.init(
                project=wanted if isinstance(wanted, str) else WANDB_PROJECT, name=name or folder.name, dir=str(folder),
                id=known.read_text(encoding="utf-8").strip(), resume="allow", config=dict(config),
                allow_val_change=True,
                settings=wandb.Settings(console="off", silent=True),
            )  # fmt: skip
        except wandb.errors.Error as error:  # no account, no network
            said = str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")
            raise UserError(
                f"monitor.wandb: Weights & Biases cannot start ({said}): run `wandb login`, or set WANDB_MODE=offline."
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if values:
            self._run.log({**values, "step": step})

    def picture(self, name: str, image: Tensor, step: int) -> None:
        self._run.log({name: self._wandb.Image(image.permute(1, 2, 0).cpu().numpy()), "step": step})

    def close(self) -> None:
        self._run.finish(exit_code=1 if sys.exc_info()[0] else 0)
