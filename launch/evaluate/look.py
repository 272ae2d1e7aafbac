"""`elsewhere look`: what a frozen encoder sees in images, as a picture."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ...models.method import Method
    from ..config import Config
    from ..world import World

WHAT = ("pca", "neighbours", "reconstruction")
_SIDE, _MOST, _NEAREST, _ACROSS = 128, 16, 6, 3


def add_look_command(commands: Any) -> None:
    """Add `look` to `commands`, what `add_subparsers` returned."""
    text = "Draw what an encoder sees: principal components of its patches, nearest images, reconstructions."
    command = commands.add_parser("look", help=text, description=text)
    command.add_argument("checkpoint", type=Path, help="a run, a checkpoint folder, or a file of weights")
    command.add_argument(
        "overrides", nargs="+", metavar="IMAGE|key=value",
        help="image files, or folders of which the first are taken; and settings, e.g. model.image_size=448",
    )  # fmt: skip
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="a new .png")
    command.add_argument(
        "--what", type=_listed, metavar="A,B",
        help=f"of {', '.join(WHAT)} (default: pca, neighbours with --among, reconstruction of a run of MAE or MAE+)",
    )  # fmt: skip
    command.add_argument("--among", metavar="FOLDER", help="where nearest images are looked for")
    command.add_argument("--which", choices=("teacher", "student"), default="teacher", help="(%(default)s)")
    command.add_argument("--recipe", help="that describes the encoder, where a file of weights does not")


def run_look(arguments: argparse.Namespace) -> int:
    """Run `elsewhere look`; the exit status. Raises UserError for something to mend."""
    from .session import Options, joined

    paths = [item for item in arguments.overrides if "=" not in item or os.path.exists(item)]
    overrides = [item for item in arguments.overrides if item not in paths]
    _check_output(arguments.output)
    if not paths:
        raise UserError("Name the images to look at, e.g. elsewhere look RUN photo.jpg -o out.png.")
    options = Options(arguments.checkpoint, overrides, arguments.which, arguments.recipe)
    with joined(options) as (world, method, config, what):
        if world.size > 1:
            raise UserError("elsewhere look draws in one process: start it without a launcher.")
        from .precision import choose_compute

        names, views = _images(paths, method, config)
        wanted = arguments.what or _default(arguments, config)
        choose_compute(method, config.engine.precision, world.device, views.to(world.device))
        parts = []
        for name in wanted:
            if name == "pca":
                parts.append(draw_components(method, views.to(world.device)))
            elif name == "neighbours":
                parts.append(_neighbours(method, config, world, names, views, arguments.among))
            else:
                parts.append(_reconstruction(arguments.checkpoint, names, what))
        _save(parts, arguments.output)
    print(f"{arguments.output}: {', '.join(wanted)} of {len(names)} image{'s' * (len(names) != 1)} by {what}")
    return 0


def _listed(text: str) -> list[str]:
    found = [item for item in text.split(",") if item]
    if not found or any(item not in WHAT for item in found):
        raise argparse.ArgumentTypeError(f"{text!r}: choose of {', '.join(WHAT)}")
    return found


def _check_output(path: Path) -> None:
    from ..safetensors_file import check_free

    if path.suffix.lower() != ".png":
        raise UserError(f"--output {path}: its name must end in .png, which is what is written.")
    check_free(path)


def _default(arguments: argparse.Namespace, config: Config) -> list[str]:
    found = ["pca"] + ["neighbours"] * bool(arguments.among)
    run = arguments.checkpoint.is_dir() and config.method.kind in ("mae", "mae_plus")
    return found + ["reconstruction"] * run


def _images(paths: Sequence[str], method: Method, config: Config) -> tuple[list[str], Tensor]:
    """Names of the image files, and their views `[n, C, H, W]` uint8."""
    import torch

    from ...data.images import ImageFolder

    names: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            folder = ImageFolder(path, "train", method.encoder.channels)
            names += [folder.name(i) for i in range(min(len(folder), 8))]
        elif os.path.exists(path):
            names.append(path)
        else:
            raise UserError(f"{path} does not exist: give image files, or folders of them.")
    if len(names) > _MOST:
        raise UserError(f"{len(names)} images do not fit one picture: give {_MOST} at most.")
    return names, torch.stack([_view(name, method.encoder.channels, config.model.image_size, config) for name in names])


def _view(name: str, channels: int, size: tuple[int, int], config: Config) -> Tensor:
    from ...data.augment import evaluation_view
    from ...data.decode import UnreadableImage, read_image

    try:
        return evaluation_view(read_image(name, channels), size, config.data.interpolation)
    except UnreadableImage as error:
        raise UserError(f"An image cannot be read ({error}): give another.") from error


def components(tokens: Tensor, count: int = 3) -> Tensor:
    """The first principal components `[n, N, count]` of patch tokens `[n, N, D]`, the same ones for all images.

    Each has the sign in which its largest weight is positive.
    """
    import torch

    flat = tokens.flatten(0, 1).double()
    flat = flat - flat.mean(dim=0)
    _, directions = torch.linalg.eigh(flat.T @ flat)
    directions = directions.flip(1)[:, :count]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    found = (flat @ (directions * largest.sign())).unflatten(0, tokens.shape[:2])
    return torch.cat([found, found.new_zeros(*found.shape[:2], count - found.shape[2])], dim=2).to(tokens.dtype)


def draw_components(method: Method, images: Tensor, side: int = _SIDE) -> Tensor:
    """A row of images `[n, C, H, W]` above their patches' first three components as red, green and blue.

    A component's 1st and 99th percentile over all images are dark and bright; uint8 `[3, rows, columns]`.
    """
    import torch

    from ..pictures import enlarged, side_by_side
    from .features import all_tokens

    with torch.inference_mode():
        tokens = all_tokens(method, images)[:, method.encoder.num_prefix_tokens :].cpu()
    grid = method.encoder.grid_of(*images.shape[-2:])
    found = components(tokens)
    low, high = (torch.quantile(found.flatten(0, 1), share, dim=0) for share in (0.01, 0.99))
    colours = ((found - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) * 255
    maps = colours.transpose(1, 2).unflatten(2, grid)
    shown = enlarged(images.cpu(), side)
    maps = torch.nn.functional.interpolate(maps, size=shown.shape[-2:], mode="nearest")
    return torch.cat([side_by_side(list(shown)), side_by_side(list(maps))], dim=1).to(torch.uint8)


def _neighbours(
    method: Method, config: Config, world: World, names: list[str], views: Tensor, among: str | None
) -> Tensor:
    """A row an image: it, and the nearest ones of the folder `among` by cosine of standardised features."""
    import numpy as np
    import torch

    from ...data.sources import open_source
    from ...data.views import CentreView
    from .features import Reading, extract, pooled_layers
    from .nearest import Nearest
    from .session import loader_workers

    if among is None:
        raise UserError("--what neighbours needs images to look among: add --among FOLDER.")
    channels, size = method.encoder.channels, config.model.image_size
    source = open_source(among, "train", channels, 0.0)
    if len(source) < 2:
        raise UserError(f"--among {among} has one image: give a folder with more.")

    def compute(images: Tensor) -> Tensor:
        return pooled_layers(method, images, 1)[:, 0, 0]

    view = CentreView(size, config.data.interpolation)
    with tempfile.TemporaryDirectory() as folder:
        found, _ = extract(
            compute, source, np.arange(len(source)), view, (channels, *size), world,
            Reading(loader_workers(config, world), on_error="skip"), Path(folder), "among",
        )  # fmt: skip
        known = Nearest(found.values, np.zeros(len(found), np.int64), world.device)
        with torch.inference_mode():
            asked = compute(views.to(world.device)).cpu().numpy()
        cosines, places = known.neighbours(asked, min(_NEAREST + 1, len(found)))
    rows = []
    for name, image, near, where in zip(names, views, cosines.cpu(), found.indices[places.cpu().numpy()], strict=True):
        others = [(float(c), int(i)) for c, i in zip(near, where, strict=True) if not _same(name, source.name(int(i)))]
        nearest = others[:_NEAREST]
        pictures = [image] + [view(source.read(i), i) for _, i in nearest]
        rows.append(_captioned(pictures, ["", *(f"{cosine:.2f}" for cosine, _ in nearest)]))
    width = max(row.shape[2] for row in rows)
    return torch.cat([_padded(row, width) for row in rows], dim=1)


def _same(one: str, other: str) -> bool:
    return os.path.exists(other) and os.path.samefile(one, other)


def _captioned(pictures: list[Tensor], captions: list[str]) -> Tensor:
    """Pictures `[C, H, W]` uint8 side by side, each with a line in its upper left corner."""
    import numpy as np
    import torch
    from PIL import Image, ImageDraw

    from ..pictures import enlarged, side_by_side

    row = side_by_side(list(enlarged(torch.stack(pictures), _SIDE))).to(torch.uint8)
    canvas = Image.fromarray(row.permute(1, 2, 0).numpy())
    draw, step = ImageDraw.Draw(canvas), row.shape[2] // len(pictures)
    for i, caption in enumerate(captions):
        if caption:
            box = draw.textbbox((i * step + 5, 4), caption)
            draw.rectangle((box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2), fill="white")
            draw.text((i * step + 5, 4), caption, fill="black")
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def _reconstruction(checkpoint: Path, names: list[str], what: str) -> Tensor:
    """A row an image: it, the patches that a masked autoencoder sees, and these with what it makes of the others."""
    import numpy as np
    import torch

    from ...models.mae import Mae
    from ..build import build_masks, build_method
    from ..config import Config
    from ..encoder_weights import find_checkpoint
    from ..pictures import draw_reconstructions

    saved = find_checkpoint(checkpoint) if checkpoint.is_dir() else None
    if saved is None:
        raise UserError(f"{checkpoint} holds {what} alone, without a decoder: give a run of MAE or MAE+, or leave "
                        "reconstruction out of --what.")  # fmt: skip
    config = Config.stored(saved.about["config"])
    method = build_method(config)
    if not isinstance(method, Mae):
        raise UserError(f"{checkpoint} is a run of {config.method.kind}, which makes no pixels: leave reconstruction "
                        "out of --what.")  # fmt: skip
    method.load_state_dict({name.removeprefix("method."): one for name, one in saved.tensors("method.").items()})
    attack = {name.removeprefix("adversary."): one for name, one in saved.tensors("adversary.").items()}
    tensors = (
        {name: attack[name] for name in method.attack_tensors()} if config.method.mask_token == "adversary" else None
    )
    images = torch.stack([_view(name, method.encoder.channels, config.model.image_size, config) for name in names])
    masks = build_masks(config, method.encoder.grid)
    assert masks is not None
    drawn = masks(config.seed, 0, 0, np.arange(len(images))).visible
    assert drawn is not None
    visible = torch.from_numpy(drawn[:, 0])
    with torch.inference_mode():
        painted, masked = method.eval().repaint(images, visible, tensors)
    picture = draw_reconstructions(images, masked, 255 * painted, method.encoder.grid, count=len(images))
    rows = picture.chunk(len(images), dim=1)
    columns = [torch.cat(rows[i::_ACROSS], dim=1) for i in range(min(_ACROSS, len(rows)))]
    return torch.cat([_padded(column, column.shape[2] + 12, columns[0].shape[1]) for column in columns], dim=2)


def _padded(picture: Tensor, width: int, height: int | None = None) -> Tensor:
    """A picture with white to its right and below it."""
    import torch

    more = (height or picture.shape[1]) - picture.shape[1]
    return torch.nn.functional.pad(picture, (0, width - picture.shape[2], 0, more), value=255)


def _save(parts: list[Tensor], path: Path) -> None:
    """Write pictures one below the other, whole or not at all."""
    import torch
    from PIL import Image

    width = max(part.shape[2] for part in parts)
    gap = torch.full((3, 12, width), 255, dtype=torch.uint8)
    stacked = [piece for part in parts for piece in (_padded(part, width), gap)][:-1]
    pixels: np.ndarray = torch.cat(stacked, dim=1).permute(1, 2, 0).numpy()
    aside = path.with_name(path.name + ".part")
    Image.fromarray(pixels).save(aside, format="PNG")
    os.replace(aside, path)
