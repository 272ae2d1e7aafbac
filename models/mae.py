"""Masked autoencoders: MAE, MAE+ (all tokens in the encoder), and AdPE's adversarial positions on top of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..kernels.dispatch import Choice
from .method import IMAGENET_MEAN, IMAGENET_STD, Method
from .positions import Positions, shifted_sincos
from .relative import Relative, RelativeAttack
from .vit import Encoder, Size, encoder_flops, initialise, norm_layer, run_blocks, transformer_blocks


class VisibleBatch(Protocol):
    """What `Mae` reads of a batch: images `[B, C, H, W]` or `[B, V, C, H, W]`, and `visible` `[B, V, K]`."""

    images: Tensor
    visible: Tensor | None


@dataclass(frozen=True)
class Attack:
    """Where adversarial positions act (AdPE).

    `embedding` adds a vector to positions, `coordinate` moves the masked patches by rows and columns; with relative
    positions an embedding acts on masked `keys` or `queries`, with one vector per `table` or per `bucket`.
    """

    mode: str = "none"  # none | embedding | coordinate
    where: str = "keys"  # keys | queries
    per: str = "table"  # table | bucket


class Decoder(nn.Module):
    """Predicts the pixels of every patch, `[B, N, patch²·channels]`, from encoder tokens `[B, prefix + K, width]`.

    With `mask_token` (MAE) the tokens are those of visible patches, and the others are filled in here; without (MAE+)
    all patches are there already.
    """

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        size: Size,
        values: int,
        mask_token: bool,
        prefix: int = 1,
        positions: str = "sincos",
        relative: Relative | None = None,
        norm: str = "torch",
        depth_scaled_init: bool = True,
        init_std: float | None = 0.02,
    ):
        super().__init__()
        self.size, self.grid, self.prefix = size, grid, prefix
        self.embed = nn.Linear(width, size.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, size.width)) if mask_token else None
        self.positions = Positions(size.width, grid, positions)
        self.blocks = transformer_blocks(size, norm, relative, prefix)
        self.norm = norm_layer(norm)(size.width)
        self.proj = nn.Linear(size.width, values)
        initialise(self, self.blocks, init_std, depth_scaled_init)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        tokens: Tensor,
        visible: Tensor | None = None,
        attacks: Sequence[RelativeAttack | None] | None = None,
    ) -> Tensor:
        """Predicted patches; `visible` `[B, K]` says which patches the tokens of an MAE are."""
        x = self.embed(tokens)
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        if self.mask_token is not None:
            assert visible is not None, "an MAE decoder must know which patches its tokens are"
            everywhere = self.mask_token.to(patches.dtype).expand(len(x), self.grid[0] * self.grid[1], -1)
            patches = everywhere.scatter(1, visible[..., None].expand_as(patches), patches)
        x = torch.cat([prefix.to(self.positions.table.dtype), patches + self.positions()], dim=1)
        decoded = x
        for decoded in run_blocks(self.blocks, x, self.grid, attacks):  # noqa: B007
            pass
        return self.proj(self.norm(decoded)[:, self.prefix :])


class Mae(Method):
    """Reconstruct masked patches; `visible_only` encodes the visible ones alone (MAE), otherwise all tokens (MAE+).

    `mask_token` is what a masked patch of MAE+ holds beside its position: a `learned` token, or the `adversary`'s
    (AdPE as released in its absolute embedding mode, where the mask token is only ever ascended).
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        *,
        visible_only: bool = False,
        mask_token: str = "learned",
        attack: Attack | None = None,
        normalise_pixels: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        compute_dtype: torch.dtype = torch.float32,
    ):
        super().__init__(encoder, mean, std, compute_dtype)
        self.decoder = decoder
        self.visible_only, self.attack, self.normalise_pixels = visible_only, attack or Attack(), normalise_pixels
        learned = not visible_only and mask_token == "learned"
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, encoder.size.width)) if learned else None

    def attack_tensors(self) -> dict[str, Tensor]:
        """What the adversary of this method starts from, float32; every row of a tensor is bounded on its own.

        Absolute positions: `positions` `[N, D]` (or the released `mask_token` `[1, D]`), or `shift` `[1, 2]` in rows
        and columns. Relative ones: `encoder` and `decoder`, `[layers, numbers]`. None: no tensors.
        """
        encoder, decoder = self.encoder, self.decoder
        if self.attack.mode == "none":
            return {}
        if encoder.relative is None:
            if self.attack.mode == "coordinate":
                return {"shift": torch.zeros(1, 2)}
            if self.mask_token is None:
                return {"mask_token": 0.02 * torch.randn(1, encoder.size.width)}
            return {"positions": torch.zeros(encoder.grid[0] * encoder.grid[1], encoder.size.width)}
        out = {}
        for name, part in (("encoder", encoder), ("decoder", decoder)):
            numbers = 2
            if self.attack.mode == "embedding":
                table: Tensor = part.blocks[0].attn.relative_k.table  # pyright: ignore
                groups, width, buckets = table.shape
                numbers = groups * width * (buckets if self.attack.per == "bucket" else 1)
            out[name] = torch.zeros(len(part.blocks), numbers)
        return out

    def kernel_choices(self, device: torch.device) -> dict[str, Choice]:
        found = super().kernel_choices(device)
        if self.encoder.relative is None:
            return found
        mode = {"none": "none", "coordinate": "shift"}.get(self.attack.mode)
        mode = mode or ("bucket" if self.attack.per == "bucket" else self.attack.where)
        grid, dtype = self.encoder.grid, self.compute_dtype
        encoder, decoder = (
            part.blocks[0].attn.choose(grid, device, dtype, mode)  # pyright: ignore
            for part in (self.encoder, self.decoder)
        )
        if encoder == decoder:
            return found | {"relative attention": encoder}
        return found | {"relative attention of the encoder": encoder, "of the decoder": decoder}

    def objective(
        self, batch: VisibleBatch, adversary: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch (a float32 scalar) under the attack, and detached scalars to log."""
        assert batch.visible is not None, "batches of a masked autoencoder say which patches are visible"
        raw, visible = batch.images.flatten(0, -4), batch.visible.flatten(0, 1)
        with self.autocast():
            images = self.normalise(raw)
            predictions, masked = self.predict(images, visible, adversary)
        predictions = predictions.float()
        spread = predictions.detach().flatten(0, 1).std(dim=0).mean()
        return self.loss(images, predictions, masked), {"prediction_std": spread}

    def predict(
        self, images: Tensor, visible: Tensor, adversary: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predicted patches `[B, N, patch²·C]` of normalised images `[B, C, H, W]`, and the masked ones, `[B, N]` bool.

        `visible` is `[B, K]`; `adversary` holds the tensors of `attack_tensors`, or None for no attack.
        """
        encoder = self.encoder
        rows, columns = encoder.grid
        masked = torch.ones(len(images), rows * columns, dtype=torch.bool, device=images.device)
        masked.scatter_(1, visible, False)
        if self.visible_only:
            return self.decoder(encoder(images, visible), visible), masked
        adversary = adversary or {}
        tokens = torch.where(masked[..., None], self._masked_tokens(adversary), encoder.patch_embed(images))
        positions = encoder.positions()
        if "shift" in adversary:
            moved = shifted_sincos(encoder.size.width, encoder.grid, adversary["shift"][0])
            positions = torch.where(masked[..., None], moved, positions)
        attacks = {name: self._relative_attacks(masked, adversary.get(name)) for name in ("encoder", "decoder")}
        latent = encoder.encode(tokens + positions, encoder.grid, attacks["encoder"])
        return self.decoder(latent, None, attacks["decoder"]), masked

    def _masked_tokens(self, adversary: Mapping[str, Tensor]) -> Tensor:
        """What stands in the place of a masked patch, broadcast over `[B, N, D]`."""
        if self.mask_token is not None:
            return self.mask_token + adversary["positions"] if "positions" in adversary else self.mask_token
        if "mask_token" in adversary:
            return adversary["mask_token"][None]
        return torch.zeros(1, 1, self.encoder.size.width, device=self.encoder.cls_token.device)  # pyright: ignore

    def _relative_attacks(self, masked: Tensor, rows: Tensor | None) -> list[RelativeAttack | None] | None:
        """One attack a layer, from the adversary's `rows` `[layers, numbers]`."""
        if rows is None:
            return None
        with_prefix = nn.functional.pad(masked, (self.encoder.num_prefix_tokens, 0))
        if self.attack.mode == "coordinate":
            return [RelativeAttack(masked=with_prefix, shift=row) for row in rows]
        where, per = self.attack.where, self.attack.per
        return [RelativeAttack(masked=with_prefix, embedding=row, where=where, per=per) for row in rows]

    def patches(self, images: Tensor) -> Tensor:
        """The pixels of each patch, `[B, N, patch²·C]`, rows of pixels first, channels last."""
        (rows, columns), size = self.encoder.grid, self.encoder.patch_size
        parts = images.unflatten(3, (columns, size)).unflatten(2, (rows, size))  # [B, C, rows, p, columns, p]
        return parts.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def images_of(self, patches: Tensor) -> Tensor:
        """Images `[B, C, H, W]` of patches `[B, N, patch²·C]`; the inverse of `patches`."""
        size = self.encoder.patch_size
        parts = patches.unflatten(1, self.encoder.grid).unflatten(3, (size, size, -1))
        return parts.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def targets(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is predicted, `[B, N, patch²·C]`, and the mean and deviation `[B, N, 1]` that were taken out of it."""
        target = self.patches(images)
        if not self.normalise_pixels:
            return target, torch.zeros_like(target[..., :1]), torch.ones_like(target[..., :1])
        mean, deviation = target.mean(-1, keepdim=True), (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return (target - mean) / deviation, mean, deviation

    def reconstruct(self, images: Tensor, predictions: Tensor) -> Tensor:
        """Normalised images `[B, C, H, W]` that `predictions` stand for.

        Where pixels are predicted normalised, each patch gets the mean and deviation of the true one in `images`.
        """
        _, mean, deviation = self.targets(images)
        return self.images_of(predictions * deviation + mean)

    def repaint(
        self, raw: Tensor, visible: Tensor, adversary: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The pixels in 0…1 that are predicted of uint8 images `[B, C, H, W]`, and the masked patches `[B, N]`."""
        with self.autocast():
            images = self.normalise(raw)
            predictions, masked = self.predict(images, visible, adversary)
        return self.denormalise(self.reconstruct(images, predictions.float())), masked

    def loss(self, images: Tensor, predictions: Tensor, masked: Tensor) -> Tensor:
        """Mean squared error over masked patches."""
        error = (predictions - self.targets(images)[0]).square().mean(dim=-1)
        return (error * masked).sum() / masked.sum()

    def flops_per_image(self, views: int, visible: int) -> float:
        """Floating-point operations of one training step per image of `views` crops: backward as two forwards."""
        encoder, decoder = self.encoder, self.decoder
        patches, width, narrow = encoder.grid[0] * encoder.grid[1], encoder.size.width, decoder.size.width
        embedded = visible if self.visible_only else patches
        seen = embedded + encoder.num_prefix_tokens
        pixels = encoder.channels * encoder.patch_size**2
        ends = 2 * embedded * pixels * width + 2 * seen * width * narrow + 2 * patches * narrow * pixels
        inner = encoder_flops(encoder.size, seen, encoder.relative)
        inner += encoder_flops(decoder.size, patches + encoder.num_prefix_tokens, encoder.relative)
        return 3.0 * views * (ends + inner)
