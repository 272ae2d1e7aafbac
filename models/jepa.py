"""I-JEPA with stochastic positions (StoP): encoder, predictor, teacher and loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import dispatch
from ..kernels.stochastic_positions import position_noise, stochastic_positions
from .method import IMAGENET_MEAN, IMAGENET_STD, Method
from .positions import Positions
from .vit import Encoder, LastBlock, Size, encoder_flops, initialise, norm_layer, take, transformer_blocks

CONTEXT_STREAM = 1 << 15  # context blocks draw from block numbers of their own


class MaskedBatch(Protocol):
    """What `Jepa` reads of a batch; `context` is `[E, B, Nc]`, `targets` `[T, B, Nt]`."""

    images: Tensor
    sample_ids: Tensor
    epochs: Tensor
    context: Tensor | None
    targets: Tensor | None


@dataclass(frozen=True)
class Stop:
    """Stochastic positions: which tokens get noise, its standard deviation, and its covariance.

    `tied` uses the matrix that projects the context (covariance std² W Wᵀ), `fixed` the identity in predictor width.
    """

    where: str = "targets"  # none | targets | context | both
    std: float = 0.25
    covariance: str = "tied"  # tied | fixed

    @property
    def targets(self) -> bool:
        return self.where in ("targets", "both")

    @property
    def context(self) -> bool:
        return self.where in ("context", "both")


class Predictor(nn.Module):
    """Predicts teacher features of target blocks from context tokens and (stochastic) target positions.

    `mask_token` is what a target token holds beside its position: a `learned` token, the `projection_bias` of the
    context projection (what the released StoP does), or `none` (the released code with StoP off).
    """

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        size: Size,
        stop: Stop | None = None,
        mask_token: str = "learned",
        positions: str = "sincos",
        norm: str = "torch",
        depth_scaled_init: bool = True,
        init_std: float = 0.02,
    ):
        super().__init__()
        self.size, self.stop = size, stop or Stop("none")
        self.bias_as_token = mask_token == "projection_bias"
        self.embed = nn.Linear(width, size.width)
        self.positions = Positions(size.width, grid, positions)
        self.mask_token = nn.Parameter(torch.empty(size.width)) if mask_token == "learned" else None
        self.blocks = transformer_blocks(size, norm, last=LastBlock)
        self.norm = norm_layer(norm)(size.width)
        self.proj = nn.Linear(size.width, width)
        initialise(self, self.blocks, init_std, depth_scaled_init)
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    @property
    def noise_width(self) -> int:
        """Columns of noise per token: the encoder's width, or the predictor's where the covariance is fixed."""
        return self.embed.in_features if self.stop.covariance == "tied" else self.embed.out_features

    def _positions(self, patches: Tensor, noise: Tensor | None, bias: bool = False) -> Tensor:
        """Positions `[R, N, D]` of `patches` `[R, N]`, noised where `noise` is given."""
        table = self.positions()
        if noise is None:
            found = table[patches]
        elif self.stop.covariance == "tied":
            found = stochastic_positions(table, patches, noise, self.embed.weight)
        else:
            found = stochastic_positions(table, patches, noise, None)
        return found + self.embed.bias if bias else found

    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        targets: Tensor,
        noise: Tensor | None = None,
        context_noise: Tensor | None = None,
    ) -> Tensor:
        """Predictions `[T·E·B, Nt, width]`; rows run over target blocks, then context blocks, then images.

        `tokens` `[E·B, Nc, width]` are the encoder's at `context` `[E, B, Nc]`; `targets` is `[T, B, Nt]`, `noise`
        `[T, E·B, Nt, noise_width]` and `context_noise` `[E·B, Nc, noise_width]`, normal with `stop.std`.
        """
        blocks, contexts = targets.shape[0], context.shape[0]
        if noise is not None:
            noise = noise.flatten(0, 1)
        known = self.embed(tokens) + self._positions(context.flatten(0, 1), context_noise)
        wanted = targets[:, None].expand(-1, contexts, -1, -1).flatten(0, 2)  # [T·E·B, Nt]
        masked = self._positions(wanted, noise, self.bias_as_token)
        if self.mask_token is not None:
            masked = masked + self.mask_token
        # One pass for all target blocks; the context is copied once, into its place before each.
        x = torch.cat([known.expand(blocks, -1, -1, -1), masked.unflatten(0, (blocks, -1))], dim=2).flatten(0, 1)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.proj(self.norm(self.blocks[-1](x, targets.shape[2])))


def predictor_flops(size: Size, context: int, target: int) -> float:
    """Floating-point operations of a predictor's blocks for one target block, the last of which predicts that alone."""
    spared = (2 + 4 * size.mlp_ratio) * size.width**2 + 4 * (context + target) * size.width
    return encoder_flops(size, context + target) - context * spared


class Jepa(Method):
    """I-JEPA: predict the teacher's features of target blocks from a context block; StoP where `stop` says so.

    `pairing="published"` keeps the released code's mismatch of predictions and targets for two or more context
    blocks. `kernels` (auto, reference or triton) is what draws the noise; another raises ValueError.
    """

    def __init__(
        self,
        encoder: Encoder,
        predictor: Predictor,
        *,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        teacher_layers: int = 1,
        pairing: str = "paired",
        compute_dtype: torch.dtype = torch.float32,
        kernels: str = "auto",
    ):
        super().__init__(encoder, mean, std, compute_dtype)
        dispatch.check(kernels)
        self.predictor = predictor
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        self.seed, self.teacher_layers, self.pairing, self.kernels = seed, teacher_layers, pairing, kernels

    @property
    def observed(self) -> Encoder:
        """The encoder that is probed and watched: the teacher."""
        return self.teacher

    def kernel_choices(self, device: torch.device) -> dict[str, dispatch.Choice]:
        found = super().kernel_choices(device)
        drawn = self.predictor.stop.targets or self.predictor.stop.context
        return found | {"noise": dispatch.choose_noise(self.kernels, device)} if drawn else found

    def objective(self, batch: MaskedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch (a float32 scalar) and detached scalars to log."""
        assert batch.context is not None and batch.targets is not None, "I-JEPA batches carry masks"
        noise, context_noise = self.keyed_noise(batch)
        with self.autocast():
            images = self.normalise(batch.images)
            predictions, features = self.predict(images, batch.context, batch.targets, noise, context_noise)
        loss = F.smooth_l1_loss(predictions.float(), features.float())
        return loss, {"target_std": features.detach().float().flatten(0, 1).std(dim=0).mean()}

    def keyed_noise(self, batch: MaskedBatch) -> tuple[Tensor | None, Tensor | None]:
        """Noise for targets `[T, E·B, Nt, K]` and context `[E·B, Nc, K]`, keyed by sample; None where unused.

        Its standard deviation is `predictor.stop.std`, and its type that of the projection.
        """
        stop, context, targets = self.predictor.stop, batch.context, batch.targets
        assert context is not None and targets is not None
        (contexts, images, _), blocks = context.shape, targets.shape[0]
        # A fixed covariance is added to the float32 table as it is.
        dtype = self.compute_dtype if stop.covariance == "tied" else torch.float32

        def draw(shape: tuple[int, ...], block: Tensor, patches: Tensor) -> Tensor:
            epochs, ids = (each.expand(shape).flatten() for each in (batch.epochs, batch.sample_ids))
            return position_noise(
                self.seed, epochs, ids, block.flatten(), patches, self.predictor.noise_width,
                scale=stop.std, dtype=dtype, kernels=self.kernels,
            )  # fmt: skip

        noise = context_noise = None
        if stop.targets:
            # Two context blocks of one image predict the same target block from different positions.
            pair = torch.arange(contexts, device=context.device) * blocks
            number = torch.arange(blocks, device=context.device)[:, None] + pair  # [T, E]
            number = number[..., None].expand(-1, -1, images)
            wanted = targets[:, None].expand(-1, contexts, -1, -1)
            noise = draw((blocks, contexts, images), number, wanted.flatten(0, 2)).unflatten(0, (blocks, -1))
        if stop.context:
            number = CONTEXT_STREAM + torch.arange(contexts, device=context.device)[:, None].expand(-1, images)
            context_noise = draw((contexts, images), number, context.flatten(0, 1))
        return noise, context_noise

    def predict(
        self,
        images: Tensor,
        context: Tensor,
        targets: Tensor,
        noise: Tensor | None = None,
        context_noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predictions and teacher features, each `[T·E·B, Nt, width]`, of normalised images `[B, C, H, W]`."""
        contexts = context.shape[0]
        # Not inference mode: FSDP2 fails to gather weights in it, and it saves under a microsecond an operation.
        with torch.no_grad():
            features = self.teacher(images, last=self.teacher_layers)
            wanted = take(features, targets)  # [T, B, Nt, width]
            wanted = F.layer_norm(wanted, wanted.shape[-1:])
            if contexts > 1 and self.pairing == "published":
                wanted = wanted.repeat_interleave(contexts, dim=1)
            elif contexts > 1:
                wanted = wanted[:, None].expand(-1, contexts, -1, -1, -1).flatten(1, 2)
            wanted = wanted.flatten(0, 1)
        tokens = self.encoder(images, context)
        return self.predictor(tokens, context, targets, noise, context_noise), wanted

    def flops_per_image(self, contexts: int, context: int, blocks: int, target: int) -> float:
        """Floating-point operations of one training step per image: matrix products, backward as two forwards.

        `contexts` blocks of `context` tokens predict `blocks` target blocks of `target` tokens; the teacher sees all.
        """
        encoder, predictor = self.encoder, self.predictor
        patches, width, narrow = encoder.grid[0] * encoder.grid[1], encoder.num_features, predictor.embed.out_features
        patching = 2 * encoder.channels * encoder.patch_size**2 * width
        student = contexts * (context * patching + encoder_flops(encoder.size, context))
        teacher = patches * patching + encoder_flops(encoder.size, patches)
        ends = 2 * contexts * width * narrow * (context + blocks * target)
        noise = 2 * contexts * blocks * target * width * narrow if predictor.stop.targets else 0
        predicting = ends + noise + contexts * blocks * predictor_flops(predictor.size, context, target)
        return 3.0 * (student + predicting) + teacher

    @torch.no_grad()
    def after_step(self, momentum: float, stored: Callable[[nn.Parameter], Tensor] = lambda p: p) -> None:
        """Move the float32 teacher towards the student: teacher = momentum · teacher + (1 - momentum) · student.

        `stored` gives the numbers of a parameter that this process keeps, of teacher and student alike.
        """
        teacher, student = ([stored(p) for p in part.parameters()] for part in (self.teacher, self.encoder))
        torch._foreach_lerp_(teacher, student, 1.0 - momentum)  # pyright: ignore
