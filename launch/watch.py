"""What is looked at now and then while a method trains: pictures, collapse, and what the adversary gains."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..data.batch import Batch
from ..models.jepa import Jepa
from ..models.mae import Mae
from ..models.method import Method
from ..models.segmenter import Segmenter
from .config import Config
from .engine.base import Engine
from .evaluate.overlays import map_panels, palette
from .monitor import Monitor, rank_me
from .pictures import draw_masks, draw_reconstructions, draw_shifts
from .world import World

_FAR = 2.0  # patches; a shift beyond it says more of the optimiser than of the picture


class Watch:
    """Called after every step with the number of finished steps and its last micro-batch."""

    def __init__(self, config: Config, world: World, engine: Engine, monitor: Monitor):
        self.config, self.world, self.engine, self.monitor = config.monitor, world, engine, monitor
        self._warned = False

    def __call__(self, step: int, batch: Batch) -> None:
        every = self.config
        picture = every.pictures_every and (step == 1 or step % every.pictures_every == 0)
        if isinstance(self.method, Segmenter) and picture:
            self._draw_maps(batch)
        if not isinstance(self.method, (Jepa, Mae)):
            return  # a task has labels to be measured by
        if picture:
            self._draw(batch)
        if every.collapse_every and step % every.collapse_every == 0:
            self._collapse(batch)
        if self.engine.adversary and every.adversary_every and step % every.adversary_every == 0:
            self._gain(batch)

    @property
    def method(self) -> Method:
        return self.engine.method

    @torch.no_grad()
    def _draw(self, batch: Batch) -> None:
        method = self.method
        if isinstance(method, Jepa):
            assert batch.context is not None and batch.targets is not None
            if self.world.first:
                picture = draw_masks(batch.images, batch.context, batch.targets, method.encoder.grid)
                self.monitor.picture("masks", picture)
            return
        assert isinstance(method, Mae) and batch.visible is not None
        raw, visible = batch.images.flatten(0, -4)[:8], batch.visible.flatten(0, 1)[:8]
        tensors = self.engine.adversary.tensors if self.engine.adversary else None
        painted, masked = self.engine.ask("repaint", raw, visible, tensors)
        if not self.world.first:
            return
        self.monitor.picture("reconstruction", draw_reconstructions(raw, masked, 255 * painted, method.encoder.grid))
        if tensors and method.attack.mode == "coordinate":
            shifts = {name: tensor.detach() for name, tensor in tensors.items()}
            self.monitor.picture("adversary", draw_shifts(shifts, masked[0], method.encoder.grid))

    @torch.no_grad()
    def _draw_maps(self, batch: Batch) -> None:
        """Crops of the batch, their labels, and what is found in them."""
        found = self.engine.ask("predict", batch.images[:4])
        if not self.world.first:
            return
        assert isinstance(batch.truth, Tensor)
        colours = palette(found.shape[1])
        images, truth, labels = (
            part.to(torch.uint8).cpu().numpy()
            for part in (batch.images[:4].permute(0, 2, 3, 1), batch.truth[:4], found.argmax(dim=1))
        )
        rows = [map_panels(*row, colours) for row in zip(images, truth, labels, strict=True)]
        self.monitor.picture("label maps", torch.from_numpy(np.concatenate(rows)).permute(2, 0, 1))

    @torch.no_grad()
    def _collapse(self, batch: Batch) -> None:
        method = self.method
        pooled = self.engine.ask("observe", batch.images.flatten(0, -4)[: len(batch)])
        pooled = self.world.gather(pooled).flatten(0, 1)
        rank, spread = rank_me(pooled), float(pooled.std(dim=0).mean() / pooled.square().mean().sqrt().clamp_min(1e-12))
        self.monitor.note({"rank_me": round(rank, 4), "feature_std": round(spread, 6)}, "collapse")
        if rank < self.config.collapse_rank:
            whose = "teacher's" if isinstance(method, Jepa) else "encoder's"
            self.monitor.say(
                f"The {whose} features have an effective rank of {rank:.2f} (monitor.collapse_rank="
                f"{self.config.collapse_rank:g}): they may have collapsed; look at the probe and at optim.lr."
            )

    @torch.no_grad()
    def _gain(self, batch: Batch) -> None:
        """How much the attack raises the loss of this batch, the mean over ranks."""
        method, adversary = self.method, self.engine.adversary
        assert isinstance(method, Mae) and adversary is not None
        ask = self.engine.ask
        found = torch.stack([ask("objective", batch, adversary.tensors)[0], ask("objective", batch, None)[0]])
        under_attack, without = self.world.gather(found).double().mean(dim=0).tolist()
        values = {"loss_gain": under_attack - without, "loss_with": under_attack, "loss_without": without}
        self.monitor.note(values, "adversary")
        if method.attack.mode == "coordinate" and not self._warned:
            self._warn(adversary.tensors)

    def _warn(self, shifts: dict[str, Tensor]) -> None:
        largest = max(float(tensor.detach().norm(dim=1).max()) for tensor in shifts.values())
        if largest > _FAR:
            self._warned = True
            self.monitor.say(
                f"The adversary moves patches by {largest:.1f} patches, more than {_FAR:g}: bound it with "
                "method.adversary.norm=l2 and method.adversary.epsilon=1, unless that is what you want."
            )
