"""Weights of other projects from disk: read safely, recognised, and described by a configuration."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..models.method import IMAGENET_MEAN, IMAGENET_STD
from ..models.vit import Encoder
from ..models.zoo_in import ForeignEncoder, encoder_content, is_ours, read_foreign
from ..models.zoo_published import PUBLISHED, Published, differs
from .build import has_class_token
from .config import Config
from .errors import UserError

_NAMES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Content:
    """What a file or folder of weights holds: tensors by name, perhaps nested, and what stands beside them."""

    tensors: Mapping[str, Any]
    config: Mapping[str, Any]  # config.json
    preprocessor: Mapping[str, Any]  # preprocessor_config.json
    arguments: Any = None  # of a released script, a Namespace
    ours: Config | None = None  # of files that were exported from here


def read_pickle(path: Path) -> dict[str, Any]:
    """What a released `.pth` file holds; UserError if it cannot be read, or holds more than tensors and arguments."""
    try:
        # The released AdPE saves its arguments, too: a plain namespace, and nothing else beside tensors is allowed.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as weights ({(str(error) or 'it is empty or cut off').splitlines()[0]}); give a "
            "checkpoint's file, whole."
        ) from error
    return content if isinstance(content, dict) else {}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` file; UserError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from error


def weights_in(folder: Path) -> list[Path]:
    """The files of weights of a model's folder as timm and Hugging Face write them; none if it is something else."""
    if not (folder / "config.json").is_file():
        return []
    if (folder / _INDEX).is_file():
        shards = _json(folder / _INDEX).get("weight_map", {})
        return [folder / name for name in sorted(set(shards.values()))]
    return next(([folder / name] for name in _NAMES if (folder / name).is_file()), [])


def read_content(path: Path) -> Content:
    """What a file, or a folder with config.json, holds; UserError if it cannot be read."""
    files = weights_in(path) if path.is_dir() else [path]
    tensors: dict[str, Any] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{path} lacks {file.name}; get the whole model again.")
        tensors |= read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
    beside = path if path.is_dir() else path.parent
    config = _json(beside / "config.json") if path.is_dir() or path.name in _NAMES else {}
    preprocessor = _json(beside / "preprocessor_config.json") if config else {}
    return Content(tensors, config, preprocessor, tensors.get("args"), _own_description(tensors, path))


def _own_description(tensors: Mapping[str, Any], path: Path) -> Config | None:
    """The configuration that `elsewhere export` puts into the files of formats that have no place for one."""
    own = tensors.get("elsewhere")
    if not isinstance(own, Mapping) or "config" not in own:
        return None
    try:
        return Config.stored(json.loads(own["config"]))
    except (TypeError, ValueError) as error:  # a ValidationError of pydantic is a ValueError
        raise UserError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from error


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty without one."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}.") from error
    return value if isinstance(value, dict) else {}


def read_encoder(content: Content, path: object, which: str) -> tuple[ForeignEncoder | dict[str, Tensor], str]:
    """The encoder of another project in `content`, or the bare state of one of ours; and what it is.

    Raises UserError for what is of no known format.
    """
    config = content.config
    hub, timm = _hugging_face(config, path), _timm_model(config, path)
    try:
        state, called = encoder_content(content.tensors, which)
        if called == "encoder" and is_ours(state):
            return state, f"the encoder of {path}"
        size = hub.get("image_size") or timm.get("image_size")
        if content.ours is not None:
            size = content.ours.model.image_size
            # mmsegmentation's ViT always has a class token; `export` gave it zeros.
            if "cls_token" in state and not has_class_token(content.ours) and not state["cls_token"].any():
                state = {**state, "pos_embed": state["pos_embed"][:, 1:]}
                del state["cls_token"]
        found = read_foreign(state, called, size, hub.get("heads") or timm.get("heads"))
    except ValueError as error:
        raise UserError(f"{path} {error}.") from error
    found.norm_eps = hub.get("norm_eps") or timm.get("norm_eps") or found.norm_eps
    said = content.preprocessor or config.get("pretrained_cfg") or {}
    for ours, names in (("mean", ("image_mean", "mean")), ("std", ("image_std", "std"))):
        values = next((said[name] for name in names if name in said), None)
        if values is not None and len(values) in (1, found.channels):
            setattr(found, ours, [float(value) for value in values])
    arguments = vars(content.arguments) if isinstance(content.arguments, argparse.Namespace) else {}
    if found.relative is not None and "lookup" not in found.relative and arguments.get("pe_type") in (1, 2):
        found.relative["lookup"] = "hard" if arguments["pe_type"] == 1 else "published"
        found.unknown = [one for one in found.unknown if "model.relative.lookup" not in one]
    return found, f"the {called if called != 'encoder' else found.kind + ' encoder'} of {path}"


def _hugging_face(config: Mapping[str, Any], path: object) -> dict[str, Any]:
    """What Hugging Face's config.json says of an encoder; UserError for what `Encoder` cannot be."""
    if "model_type" not in config:
        return {}
    if config["model_type"] not in ("vit", "ijepa", "vit_mae"):
        raise UserError(
            f"{path} is a model of type {config['model_type']}; only vit, ijepa and vit_mae are known here."
        )
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{path} has hidden_act={config['hidden_act']}, and an encoder here has gelu.")
    size = config.get("image_size", 224)
    return {
        "heads": config.get("num_attention_heads", 12), "norm_eps": config.get("layer_norm_eps", 1e-12),
        "image_size": (size, size) if isinstance(size, int) else tuple(size),
    }  # fmt: skip


def _timm_model(config: Mapping[str, Any], path: object) -> dict[str, Any]:
    """What timm makes of its own config.json, built without memory; UserError for what `Encoder` cannot be."""
    if "architecture" not in config:
        return {}
    import timm

    try:
        with torch.device("meta"):
            model = timm.create_model(config["architecture"], **config.get("model_args", {}))
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: timm cannot build {config['architecture']}: {str(error).splitlines()[0]}.") from error
    return _told_by_timm(model, f"{path}")


def _told_by_timm(model: Any, path: str) -> dict[str, Any]:
    """Heads, eps and image size of a timm ViT; UserError for another model, or another activation."""
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise UserError(f"{path} is timm's {type(model).__name__}, and only its VisionTransformer is known here.")
    block: Any = model.blocks[0]
    activation = getattr(block.mlp, "act", None)
    if not isinstance(activation, torch.nn.GELU) or activation.approximate != "none":
        raise UserError(f"{path} has {type(activation).__name__} in its MLPs, and an encoder here has exact GELU.")
    return {
        "heads": block.attn.num_heads, "norm_eps": getattr(block.norm1, "eps", None),
        "image_size": tuple(getattr(model.patch_embed, "img_size", None) or ()) or None,
    }  # fmt: skip


def from_timm(name: str) -> tuple[ForeignEncoder, str]:
    """The encoder of `timm.create_model(name, pretrained=True)`; UserError where timm cannot give it."""
    import timm

    path = f"timm:{name}"
    try:
        model = timm.create_model(name, pretrained=True)
    # timm and the hub raise errors of many kinds, from the network's to a KeyError of a configuration.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{path}: timm could not give the pre-trained model ({reason}); check the name, and that its weights can "
            "be downloaded or are in timm's cache."
        ) from error
    told = _told_by_timm(model, path)
    try:
        found = read_foreign(model.state_dict(), "encoder", told["image_size"], told["heads"])
    except ValueError as error:
        raise UserError(f"{path} {error}.") from error
    said: Any = model.pretrained_cfg
    found.norm_eps = told["norm_eps"] or found.norm_eps
    found.mean, found.std = list(said.get("mean") or IMAGENET_MEAN), list(said.get("std") or IMAGENET_STD)
    return found, f"the {found.kind} encoder of {path}"


def completed(found: ForeignEncoder, encoder: Encoder) -> ForeignEncoder:
    """An encoder of which the tensors do not tell everything, with the rest taken from the one that it is to fill."""
    relative = found.relative
    if relative is not None and encoder.relative is not None:
        relative = {**asdict(encoder.relative), **relative}
    return replace(found, heads=found.heads or encoder.size.heads, relative=relative, unknown=[])


def as_published(found: ForeignEncoder, name: str, path: object) -> tuple[ForeignEncoder, Published]:
    """An encoder as the published checkpoint `name`; UserError for an unknown name, or if it is another one."""
    entry = published(name)
    problem = differs(entry, found)
    if problem is not None:
        raise UserError(f"{path} is not {name}: {problem}.")
    relative = None
    if found.relative is not None:
        relative = {**found.relative, "lookup": entry.lookup, "ratio": 1.9}
    return replace(found, kind=entry.method, heads=entry.heads, relative=relative, unknown=[]), entry


def published(name: str) -> Published:
    """The published checkpoint of a name; UserError with the nearest one where there is none."""
    import difflib

    if name not in PUBLISHED:
        near = difflib.get_close_matches(name, PUBLISHED, 1, 0.4)
        hint = f"did you mean {near[0]}?" if near else "`elsewhere zoo` lists them."
        raise UserError(f"There is no published checkpoint called {name}; {hint}")
    return PUBLISHED[name]


def described(found: ForeignEncoder) -> Config | None:
    """The configuration of an encoder's `model` and pixels; None where something is unknown.

    Its method is the pre-training that has such an encoder, or, for one with its norm after pooling, a classifier.
    """
    if found.unknown:
        return None
    relative = found.relative or {}
    ratio = found.hidden / found.width
    if int(found.width * ratio) != found.hidden:
        ratio = (found.hidden + 0.5) / found.width
    model: dict[str, Any] = {
        "width": found.width, "depth": found.depth, "heads": found.heads, "mlp_ratio": ratio,
        "patch_size": found.patch, "image_size": tuple(rows * found.patch for rows in found.grid),
        "channels": found.channels, "positions": found.positions, "norm_eps": found.norm_eps,
    }  # fmt: skip
    kind = "mae_plus" if relative else "mae" if found.class_token else "jepa"
    method: dict[str, Any] = {"kind": kind}
    if relative:
        model["relative"] = relative
    if found.pooled:
        method = {"kind": "classify", "classifier": {"classes": found.classes, "pool": "mean"}}
        model["class_token"] = found.class_token
    elif kind != "jepa" and found.patch**2 * found.channels == 1:
        method["normalise_pixels"] = False
    data = {"mean": found.mean, "std": found.std}
    return Config.model_validate({
        "about": f"{found.kind} encoder, as its file describes it", "model": model, "method": method, "data": data
    })  # fmt: skip
