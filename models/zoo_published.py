"""The published checkpoints of StoP, I-JEPA, MAE and AdPE: what they are, where they are, and under which licence.

None is part of this package. Sources are the projects' own pages; sizes are of the encoder's float32 weights, which
is what is read: files that also hold a predictor, a teacher and an optimiser are several times as large.
"""

from __future__ import annotations

from dataclasses import dataclass

from .vit import SIZES
from .zoo_in import ForeignEncoder

_STOP = "https://huggingface.co/amirbar1/StoP"
_IJEPA = "https://github.com/facebookresearch/ijepa"
_MAE = "https://github.com/facebookresearch/mae"
_ADPE = "https://github.com/maple-research-lab/AdPE"
_NC = "CC-BY-NC 4.0"


@dataclass(frozen=True)
class Published:
    """A published checkpoint; `lookup` is how relative positions are read, None for absolute ones alone."""

    name: str
    method: str
    size: str
    patch: int
    image_size: int
    data: str
    source: str
    licence: str
    class_token: bool
    file: str = "see source"
    lookup: str | None = None
    adversary: bool = False
    md5: str | None = None  # as far as the source prints it
    result: str = ""

    @property
    def architecture(self) -> str:
        """E.g. `ViT-B/16 at 224`."""
        return f"ViT-{self.size[0].upper()}/{self.patch} at {self.image_size}"

    @property
    def heads(self) -> int:
        """Heads of its attention."""
        return SIZES[self.size].heads

    @property
    def numbers(self) -> int:
        """Numbers of its encoder, without a fixed position table."""
        size, tables = SIZES[self.size], 0
        hidden = int(size.width * size.mlp_ratio)
        if self.lookup is not None:
            tables = (7**2 + 1) * size.width // size.heads
        block = 4 * size.width * (size.width + 1) + 2 * size.width * hidden + hidden + size.width + 4 * size.width
        embedding = size.width * (3 * self.patch**2 + 1) + (size.width if self.class_token else 0)
        return size.depth * (block + tables) + embedding + 2 * size.width

    @property
    def megabytes(self) -> float:
        """Size of the encoder's weights in float32, in 10⁶ bytes."""
        return 4 * self.numbers / 1e6


def _stop(size: str, result: str) -> Published:
    name = f"stop_vit_{size[0]}16"
    return Published(
        name, "StoP", size, 16, 224, "ImageNet-1k", _STOP, _NC, False, f"vit-{size[0]}16.pth.tar", result=result
    )


def _ijepa(size: str, patch: int, pixels: int, data: str, file: str) -> Published:
    name = f"ijepa_vit_{size[0]}{patch}" + ("_448" if pixels == 448 else "") + ("_in22k" if "22k" in data else "")
    return Published(name, "I-JEPA", size, patch, pixels, data, _IJEPA, _NC, False, file)


def _mae(size: str, patch: int, md5: str) -> Published:
    return Published(
        f"mae_vit_{size[0]}{patch}", "MAE", size, patch, 224, "ImageNet-1k", _MAE, _NC, True,
        f"mae_pretrain_vit_{size}.pth", md5=md5,
    )  # fmt: skip


def _adpe(kind: str, lookup: str | None, size: str = "base", result: str = "") -> Published:
    method = "MAE+" if kind.startswith("maeplus") else "AdPE"
    return Published(
        f"{kind}_vit_{size[0]}16", method, size, 16, 112, "ImageNet-1k", _ADPE, "MIT for academic use", True,
        lookup=lookup, adversary=method == "AdPE", result=result,
    )  # fmt: skip


PUBLISHED = {
    one.name: one
    for one in (
        _stop("base", "1 % linear 60.3, linear 72.6, last four 74.5"),
        _stop("large", "1 % linear 65.1, linear 77.1, last four 78.5"),
        _stop("huge", "1 % linear 65.4, linear 79.0, last four 79.6"),
        _ijepa("huge", 14, 224, "ImageNet-1k", "IN1K-vit.h.14-300e.pth.tar"),
        _ijepa("huge", 16, 448, "ImageNet-1k", "IN1K-vit.h.16-448px-300e.pth.tar"),
        _ijepa("huge", 14, 224, "ImageNet-22k", "IN22K-vit.h.14-900e.pth.tar"),
        _ijepa("giant", 16, 224, "ImageNet-22k", "IN22K-vit.g.16-600e.pth.tar"),
        _mae("base", 16, "8cad7c"),
        _mae("large", 16, "b8b06e"),
        _mae("huge", 14, "9bdbb0"),
        _adpe("maeplus_ape", None, result="fine-tuned 83.9"),
        _adpe("adpe_ape_embed", None, result="fine-tuned 84.1"),
        _adpe("adpe_ape_coord", None, result="fine-tuned 84.2"),
        _adpe("maeplus_rpe", "hard", result="fine-tuned 84.2"),
        _adpe("adpe_rpe_embed", "hard", result="fine-tuned 84.3"),
        _adpe("adpe_rpe_coord", "published", result="fine-tuned 84.4"),
        _adpe("adpe_rpe_coord", "published", "large", result="fine-tuned 86.3"),
    )
}


def differs(entry: Published, found: ForeignEncoder) -> str | None:
    """In which respect an encoder is not that of the published checkpoint; None where it is."""
    size = SIZES[entry.size]
    grid = (entry.image_size // entry.patch,) * 2
    there = {
        "width": found.width, "depth": found.depth, "MLP width": found.hidden, "patch": found.patch,
        "channels": found.channels, "grid": f"{found.grid[0]}x{found.grid[1]}",
        "class token": "a" if found.class_token else "no", "positions": found.positions,
        "relative positions": "some" if found.relative else "no", "last norm": "no" if found.pooled else "a",
        "adversary": "an" if "adversary" in found.parts else "no",
    }  # fmt: skip
    wanted = {
        "width": size.width, "depth": size.depth, "MLP width": int(size.width * size.mlp_ratio), "patch": entry.patch,
        "channels": 3, "grid": f"{grid[0]}x{grid[1]}", "class token": "a" if entry.class_token else "no",
        "positions": "sincos", "relative positions": "some" if entry.lookup else "no", "last norm": "a",
        "adversary": "an" if entry.adversary else "no",
    }  # fmt: skip
    for name, value in wanted.items():
        if there[name] != value:
            text = {"class token": "{} class token", "relative positions": "{} relative positions",
                    "last norm": "{} last norm", "adversary": "{} adversary"}.get(name, name + " {}")  # fmt: skip
            return f"it has {text.format(there[name])}, and {entry.name} {text.format(value)}"
    lookup = (found.relative or {}).get("lookup", "hard") if found.relative else None
    if (lookup == "published") != (entry.lookup == "published"):
        return (
            f"its relative tables were trained with lookup={lookup}, and those of {entry.name} with "
            f"lookup={entry.lookup}"
        )
    return None
