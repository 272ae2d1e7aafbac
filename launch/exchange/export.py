"""`elsewhere export`: an encoder in the files of another project, with a model card beside it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ...models.vit import Encoder
    from ..config import Config
    from ..encoder_weights import EncoderWeights

TARGETS = ("timm", "hf", "detectron2", "mmseg", "vissl", "ijepa", "mae")
_FILES = {"ijepa": "encoder.pth.tar", "mae": "encoder.pth", "detectron2": "encoder.pth", "mmseg": "encoder.pth",
          "vissl": "encoder.torch"}  # fmt: skip
_SUFFIXES = (".pth", ".pt", ".tar", ".torch", ".bin")


def add_export_command(commands: Any) -> None:
    """Add `export` to `commands`, what `add_subparsers` returned."""
    text = "Write an encoder for another project, with a model card."
    more = (
        "timm and hf are folders that timm.create_model('local-dir:FOLDER') and transformers' AutoModel load; the "
        "others are files under the names of detectron2's ViTDet, mmsegmentation's VisionTransformer, VISSL, the "
        "released I-JEPA and StoP, and the released MAE and AdPE. Nothing is overwritten."
    )
    command = commands.add_parser("export", help=text, description=f"{text} {more}")
    command.add_argument(
        "checkpoint", help="a run, a checkpoint folder, a file of weights, timm:NAME, or zoo:NAME=PATH"
    )
    command.add_argument("--to", choices=TARGETS, required=True, help="the project that is to read it")
    command.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PATH",
        help="a new folder; for others than timm and hf also a new file (.pth, .pt, .tar, .torch, .bin)",
    )  # fmt: skip
    command.add_argument(
        "--which", choices=("teacher", "student"), default="teacher",
        help="of a run that has both (%(default)s)",
    )  # fmt: skip
    command.add_argument("--recipe", help="of weights that do not describe their encoder")
    command.add_argument(
        "--allow", type=lambda text: [item for item in text.split(",") if item], default=[], metavar="NAME,…",
        help="tensors that may be missing or left out, by name or pattern",
    )  # fmt: skip


def run_export(arguments: argparse.Namespace) -> int:
    """Run `elsewhere export`; the exit status. Raises UserError for something to mend."""
    print(
        export(arguments.checkpoint, arguments.to, arguments.output, arguments.which, arguments.recipe, arguments.allow)
    )
    return 0


def export(
    checkpoint: str | Path,
    target: str,
    output: Path,
    which: str = "teacher",
    recipe: str | None = None,
    allow: list[str] | None = None,
) -> str:
    """Write the encoder at `checkpoint` (see `encoder_weights`) for `target`, one of `TARGETS`; says what was written.

    `output` is a new folder, or for a format of one file also that. Raises UserError if it exists, if the encoder has
    what the project cannot express, or if the weights cannot be read.
    """
    from ...models.zoo_out import refusal
    from ..encoder_weights import encoder_weights
    from ..load import encoder_with
    from .model_card import model_card

    as_file = target in _FILES and output.suffix in _SUFFIXES
    _check_free(output, as_file)
    weights = encoder_weights(checkpoint, which)
    encoder, config = encoder_with(weights, str(checkpoint), recipe, allow or [])
    problem = refusal(encoder, target)
    if problem is not None:
        raise UserError(f"{checkpoint} {problem}.")
    name = output.name if as_file else _FILES.get(target, "model.safetensors")
    # A folder may have a README of its own, beside which a file gets a card by its name.
    card_name = f"{output.name}.README.md" if as_file and (output.parent / "README.md").exists() else "README.md"
    card = model_card(weights, encoder, config, target, checkpoint, name)
    aside = output.with_name(f".{output.name}.part")
    try:
        aside.mkdir()
    except OSError as error:
        raise UserError(f"{aside} could not be made ({error.strerror}); choose another place.") from error
    try:
        _WRITERS.get(target, _write_file)(aside, name, encoder, weights, config, target, Path(str(checkpoint)), which)
        (aside / card_name).write_text(card, encoding="utf-8")
        _check_free(output, as_file, aside_is_ours=True)
        if as_file:
            for written in (name, card_name):
                (aside / written).rename(output.parent / written)
        else:
            aside.rename(output)
    except OSError as error:
        raise UserError(f"{output} could not be written ({error.strerror or error}); choose another place.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size = sum(file.stat().st_size for file in ([output] if as_file else output.iterdir()))
    return f"{output}: {weights.what}, for {target}, {size:,} bytes, with its model card in {card_name}."


def _check_free(output: Path, as_file: bool, aside_is_ours: bool = False) -> None:
    """Raises UserError if something stands where it is to be written, or there is no such folder."""
    taken = [output, *([output.with_name(f"{output.name}.README.md")] if as_file else [])]
    taken += [] if aside_is_ours else [output.with_name(f".{output.name}.part")]
    for path in taken:
        if os.path.lexists(path):
            raise UserError(f"{path} exists already and is not overwritten; choose a new folder, or move it away.")
    if not output.parent.is_dir():
        raise UserError(f"{output.parent} is not a folder; make it, or choose another place.")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"{output.parent} is not writable; choose another folder.")


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _tensors(path: Path, state: dict[str, Tensor]) -> None:
    from ..safetensors_file import write_tensors
    from ..tensor_files import Described

    described = {name: Described(tuple(one.shape), one.dtype) for name, one in state.items()}
    write_tensors(path, described, lambda name: state[name], {"format": "pt"})


def _write_timm(folder: Path, name: str, encoder: Encoder, *_: Any) -> None:
    from ...models.zoo_out import released, timm_settings

    architecture, settings = timm_settings(encoder)
    _tensors(folder / name, released(encoder))
    mean, std = encoder.pixel_mean, encoder.pixel_std  # pyright: ignore
    _json(folder / "config.json", {
        "architecture": architecture, "num_classes": 0, "num_features": encoder.num_features,
        "global_pool": settings["global_pool"], "model_args": settings,
        "pretrained_cfg": {
            "num_classes": 0, "input_size": [encoder.channels, *encoder.image_size], "fixed_input_size": True,
            "interpolation": "bicubic", "crop_pct": 1.0, "mean": mean, "std": std,
            "first_conv": "patch_embed.proj", "classifier": "head",
        },
    })  # fmt: skip


def _write_hugging_face(folder: Path, name: str, encoder: Encoder, *_: Any) -> None:
    from ...models.zoo_out import hugging_face, hugging_face_settings

    _tensors(folder / name, hugging_face(encoder))
    _json(folder / "config.json", {**hugging_face_settings(encoder), "dtype": "float32"})
    rows, columns = encoder.image_size
    _json(folder / "preprocessor_config.json", {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": rows, "width": columns},
        "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": encoder.pixel_mean, "image_std": encoder.pixel_std,  # pyright: ignore
    })  # fmt: skip


def _write_file(
    folder: Path,
    name: str,
    encoder: Encoder,
    weights: EncoderWeights,
    config: Config,
    target: str,
    checkpoint: Path,
    which: str,
) -> None:
    """The formats that are one file by `torch.save`; what they cannot say of the encoder goes to an entry of ours."""
    import torch

    from ...models import zoo_out

    content: dict[str, Any]
    if target == "vissl":
        trunk = {"trunk": zoo_out.vissl(encoder), "heads": {}}
        content = {"classy_state_dict": {"base_model": {"model": trunk}}}
    elif target == "mmseg":
        content = {"state_dict": zoo_out.mmsegmentation(encoder)}
    elif target == "detectron2":
        content = {"model": zoo_out.detectron2(encoder)}
    elif target == "ijepa":
        content = _ijepa(encoder, config, checkpoint, which)
    else:
        content = {"model": _mae(encoder, config, checkpoint)}
    # What is written is alone in memory: a view would be saved with all that it is a view of.
    content = _cloned(content)
    content["elsewhere"] = {"config": json.dumps(config.to_dict()), "what": weights.what}
    torch.save(content, folder / name)


def _cloned(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _cloned(one) for name, one in value.items()}
    return value.detach().clone().contiguous() if hasattr(value, "detach") else value


def _saved_method(config: Config, checkpoint: Path) -> Any:
    """The whole method of a run or checkpoint, None for weights of an encoder alone."""
    from ..build import build_method
    from ..encoder_weights import find_checkpoint

    saved = find_checkpoint(checkpoint) if checkpoint.is_dir() else None
    if saved is None:
        return None
    method = build_method(config)
    method.load_state_dict({name.removeprefix("method."): one for name, one in saved.tensors("method.").items()})
    return method


def _ijepa(encoder: Encoder, config: Config, checkpoint: Path, which: str) -> dict[str, Any]:
    """`{encoder, target_encoder, predictor}` of a run as the released code saves them; else the encoder that is there.

    The released evaluation reads `target_encoder`.
    """
    from ...models.jepa import Jepa
    from ...models.zoo import to_released_predictor
    from ...models.zoo_out import released

    def wrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"module.{name}": tensor for name, tensor in state.items()}

    method = _saved_method(config, checkpoint)
    if isinstance(method, Jepa):
        return {
            "encoder": wrapped(released(method.encoder)), "target_encoder": wrapped(released(method.teacher)),
            "predictor": wrapped(to_released_predictor(method.predictor)),
        }  # fmt: skip
    return {"target_encoder" if which == "teacher" else "encoder": wrapped(released(encoder))}


def _mae(encoder: Encoder, config: Config, checkpoint: Path) -> dict[str, Tensor]:
    """The released names of the whole method of a run, without its adversary; else of the encoder."""
    from ...models.mae import Mae
    from ...models.zoo import to_released_mae
    from ...models.zoo_out import released

    method = _saved_method(config, checkpoint)
    state = released(encoder)
    return {**to_released_mae(method), **state} if isinstance(method, Mae) else state


_WRITERS: dict[str, Callable[..., None]] = {"timm": _write_timm, "hf": _write_hugging_face}
