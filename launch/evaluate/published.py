"""What the papers report of published checkpoints, and by which protocol it is measured here."""

from __future__ import annotations

from dataclasses import dataclass

# Protocols by the name that `elsewhere reproduce --only` takes.
PROTOCOLS = {
    "1%": "low-shot: logistic regression on 1 % of the labels (frozen, mean patch token, centre crop)",
    "linear": "linear, last layer (VISSL: batch norm and a linear layer on the mean patch token, 28 epochs)",
    "linear-last4": "linear, mean patch tokens of the last four layers, concatenated",
    "finetune": "fine-tuning of the whole encoder, 100 epochs (50 for ViT-L)",
}
STOP_PAPER, ADPE_PAPER = "StoP, arXiv 2308.00566", "AdPE, arXiv 2303.07598"


@dataclass(frozen=True)
class Published:
    """Top-1 accuracies in percent by protocol, the recipe that describes the encoder, and that of its fine-tuning."""

    recipe: str
    figures: dict[str, float]
    source: str
    finetune: str | None = None


def _probed(recipe: str, few: float, last: float, last4: float) -> Published:
    return Published(recipe, {"1%": few, "linear": last, "linear-last4": last4}, STOP_PAPER)


def _tuned(recipe: str, figure: float, finetune: str) -> Published:
    return Published(recipe, {"finetune": figure}, ADPE_PAPER, finetune)


PUBLISHED = {
    "stop_vit_b16": _probed("published/stop_vit_b16", 60.3, 72.6, 74.5),
    "stop_vit_l16": _probed("published/stop_vit_l16", 65.1, 77.1, 78.5),
    "stop_vit_h16": _probed("published/stop_vit_h16", 65.4, 79.0, 79.6),
    # As StoP's paper reports its baselines.
    "ijepa_vit_b16": _probed("ijepa_vit_b16", 57.1, 70.9, 72.9),
    "ijepa_vit_l16": _probed("ijepa_vit_l16", 64.2, 76.1, 77.5),
    "ijepa_vit_h14": _probed("ijepa_vit_h14", 62.9, 78.2, 79.3),
    "maeplus_ape_vit_b16": _tuned("published/maeplus_ape_vit_b16", 83.9, "published/finetune_ape_vit_b16"),
    "adpe_ape_embed_vit_b16": _tuned("published/adpe_ape_embed_vit_b16", 84.1, "published/finetune_ape_vit_b16"),
    "adpe_ape_coord_vit_b16": _tuned("published/adpe_ape_coord_vit_b16", 84.2, "published/finetune_ape_vit_b16"),
    "maeplus_rpe_vit_b16": _tuned("published/maeplus_rpe_vit_b16", 84.2, "published/finetune_rpe_vit_b16"),
    "adpe_rpe_embed_vit_b16": _tuned("published/adpe_rpe_embed_vit_b16", 84.3, "published/finetune_rpe_vit_b16"),
    "adpe_rpe_coord_vit_b16": _tuned(
        "published/adpe_rpe_coord_vit_b16", 84.4, "published/finetune_rpe_interpolated_vit_b16"
    ),
    "adpe_rpe_coord_vit_l16": _tuned("adpe_rpe_coord_vit_l16", 86.3, "finetune_rpe_vit_l16"),
}
