"""The weights of a checkpoint under the names of the method that was trained, by its parts."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Saved
from .encoder_weights import find_checkpoint
from .errors import UserError
from .safetensors_file import check_free, write_tensors
from .tensor_files import Described, TensorFiles
from .zero_files import ZeroFiles, find_zero

PREFIXES = {"teacher": "teacher.", "student": "encoder.", "predictor": "predictor.", "decoder": "decoder."}


@dataclass(frozen=True)
class Weights:
    """A checkpoint's weights: `names` leads from a name in the method to the name in the files."""

    path: Path
    files: TensorFiles | ZeroFiles
    names: dict[str, str]
    step: int | None
    about: dict[str, Any]  # as about.json has it; empty for a checkpoint by deepspeed itself

    def parts(self) -> list[str]:
        """The parts that there are; only `all` for another project's model."""
        if "encoder.patch_embed.proj.weight" not in self.names:
            return ["all"]
        return [part for part in PREFIXES if self.of(part)] + ["all"]

    def of(self, part: str) -> dict[str, str]:
        """Name as that part itself has it, and name in the files."""
        prefix = PREFIXES.get(part, "")
        return {name.removeprefix(prefix): source for name, source in self.names.items() if name.startswith(prefix)}

    def described(self, part: str) -> dict[str, Described]:
        """Shapes and types of a part's tensors."""
        return {name: self.files.described[source] for name, source in self.of(part).items()}


def open_weights(path: Path) -> Weights:
    """The weights in a run (its newest undamaged checkpoint), a checkpoint, or a checkpoint by deepspeed itself.

    Raises UserError that says what is damaged or missing.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; give a run, a checkpoint folder, or a folder by deepspeed.")
    saved = find_checkpoint(path)
    if saved is not None:
        return saved_weights(saved)
    folder = find_zero(path)
    if folder is None:
        raise UserError(f"{path} holds no checkpoint; give a run, a checkpoint folder, or a folder by deepspeed.")
    files = ZeroFiles(folder)
    return Weights(folder, files, _unwrapped({name: name for name in files.described}), files.step, {})


def saved_weights(saved: Saved) -> Weights:
    """The weights of a checkpoint whose files have been checked."""
    files = TensorFiles(saved.path)
    names = {name.removeprefix("method."): name for name in files.described if name.startswith("method.")}
    return Weights(saved.path, files, _unwrapped(names), saved.step, saved.about)


def _unwrapped(names: dict[str, str]) -> dict[str, str]:
    """Without what a wrapper put before all names."""
    for prefix in ("module.", "method."):
        if names and all(name.startswith(prefix) for name in names):
            names = {name.removeprefix(prefix): source for name, source in names.items()}
    return names


def write_part(source: Path, output: Path, part: str | None, dtype: torch.dtype) -> str:
    """Write a part of the checkpoint at `source` to a safetensors file, and say what was written.

    By default the teacher where there is one, else the student; of another project's model all. Floating point numbers
    are written in `dtype`, others as they are.
    Raises UserError if the checkpoint lacks the part or is damaged, or if the file cannot be written.
    """
    check_free(output)
    weights = open_weights(source)
    there = weights.parts()
    part = part or there[0]
    if part not in there:
        if there == ["all"]:
            raise UserError(f"{weights.path} is not of a method of this package, so that its parts are unknown; "
                            "choose --part all.")  # fmt: skip
        raise UserError(f"{weights.path} has no {part}; choose --part {', '.join(there[:-1])} or all.")
    names = weights.of(part)
    described = {
        name: replace(one, dtype=dtype) if one.dtype.is_floating_point else one
        for name, one in weights.described(part).items()
    }
    metadata = {"format": "pt", "elsewhere.part": part}
    if weights.step is not None:
        metadata["elsewhere.step"] = str(weights.step)
    if "config" in weights.about:
        metadata["elsewhere.config"] = json.dumps(weights.about["config"])
    size = write_tensors(
        output, described, lambda name: _as(weights.files.read(names[name]), described[name].dtype, name), metadata
    )
    count = sum(one.count for one in described.values())
    what = "all weights" if part == "all" else f"the {part}"
    return f"{output}: {what} of {weights.path}, {len(names):,} tensors, {count:,} numbers, {size:,} bytes."


def _as(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor in another type; UserError where a number is too large for float16."""
    converted = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and converted.isinf().sum() != tensor.isinf().sum():
        raise UserError(f"{name} holds numbers beyond 65504, the largest of float16; choose --dtype bfloat16.")
    return converted
