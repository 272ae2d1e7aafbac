"""An encoder's weights from wherever they are: runs, checkpoints, files by `consolidate`, other projects' weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..models.vit import Encoder
from ..models.zoo_in import ForeignEncoder
from ..models.zoo_names import grouped
from ..models.zoo_published import Published
from .checkpoint import Checkpoints, Saved, inspect
from .config import Config
from .errors import UserError
from .foreign import as_published, completed, described, from_timm, published, read_content, read_encoder, weights_in
from .tensor_files import TensorFiles


@dataclass(frozen=True)
class EncoderWeights:
    """An encoder's state under the names of `Encoder`, what it is, and its configuration where that is known.

    `foreign` is there where another project wrote it, `origin` where it is a published checkpoint by name.
    """

    state: dict[str, Tensor]
    what: str
    config: Config | None
    foreign: ForeignEncoder | None = None
    origin: Published | None = None

    @property
    def pooled(self) -> bool:
        """Whether its last norm stands after pooling: it was fine-tuned so."""
        return "fc_norm.weight" in self.state and "norm.weight" not in self.state

    def for_encoder(self, encoder: Encoder) -> Config | None:
        """Its configuration, with what is unknown taken from `encoder`; None for a bare state of ours."""
        if self.config is None and self.foreign is not None:
            return described(completed(self.foreign, encoder))
        return self.config

    def check_read(self, allow: Sequence[str]) -> None:
        """Raises UserError for tensors that an encoder has no place for, unless a pattern of `allow` matches them."""
        unread = [name for name in self.foreign.unread if not allowed(name, allow)] if self.foreign else []
        if unread:
            raise UserError(
                f"{self.what[0].upper()}{self.what[1:]} has what an encoder here has no place for: {grouped(unread)}; "
                "choose another model, or allow these names to leave them out (its features will be others)."
            )


def allowed(name: str, allow: Sequence[str]) -> bool:
    """Whether a pattern of `allow` matches a tensor's name."""
    return any(fnmatchcase(name, pattern) for pattern in allow)


def find_checkpoint(path: Path) -> Saved | None:
    """The checkpoint at `path`: a run (its newest), or a checkpoint folder; None if it is neither.

    Raises UserError where there are only damaged ones.
    """
    if (path / "checkpoints").is_dir():
        saved, complaints = Checkpoints(path).newest()
        if saved is None:
            raise UserError(complaints[0] if complaints else f"{path} has no checkpoint yet.")
        return saved
    if (path / "about.json").is_file():
        try:
            return inspect(path)
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}; take another checkpoint of the run.") from error
    return None


def encoder_weights(path: str | Path, which: str = "teacher") -> EncoderWeights:
    """The encoder in a run, a checkpoint folder, a file by `elsewhere consolidate`, or weights of another project.

    Those are released StoP, I-JEPA, MAE and AdPE files, files and folders of timm and Hugging Face, `timm:NAME`, and
    `zoo:NAME=PATH` for a published checkpoint by its name (see `elsewhere zoo`). `which` is teacher or student, where
    there are two. Raises UserError if there is nothing that can be read.
    """
    scheme, _, rest = str(path).partition(":")
    if scheme == "timm" and rest:
        found, what = from_timm(rest)
        return EncoderWeights(found.state, what, described(found), found)
    if scheme == "zoo":
        name, _, file = rest.partition("=")
        published(name)
        if not file:
            raise UserError(f"{path} names no file; write zoo:{name}=PATH, with the downloaded checkpoint.")
        return _foreign_weights(Path(file), which, name)
    path = Path(path)
    if path.is_dir():
        saved = find_checkpoint(path)
        if saved is not None:
            return _saved_weights(saved, which)
        if weights_in(path):
            return _foreign_weights(path, which)
        raise UserError(f"{path} holds neither a run nor a checkpoint.")
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a run, a checkpoint folder, or a file of weights.")
    if path.suffix == ".safetensors":
        own = _consolidated_weights(path, which)
        if own is not None:
            return own
    return _foreign_weights(path, which)


def _saved_weights(saved: Saved, which: str) -> EncoderWeights:
    files = TensorFiles(saved.path)
    prefix, what = _encoder_prefix({name.removeprefix("method.") for name in files.described}, which)
    state = _part(dict(files.items(lambda name: name.startswith(f"method.{prefix}"))), f"method.{prefix}")
    pooled = dict(files.items(lambda name: name.startswith("method.fc_norm.")))
    state |= {name.removeprefix("method."): tensor for name, tensor in pooled.items()}
    return EncoderWeights(state, f"the {what} of {saved.path}", Config.stored(saved.about["config"]))


def _foreign_weights(path: Path, which: str, name: str | None = None) -> EncoderWeights:
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run, a checkpoint folder, or a file of weights.")
    content = read_content(path)
    found, what = read_encoder(content, path, which)
    if not isinstance(found, ForeignEncoder):
        if name is not None:
            raise UserError(f"{path} is not {name}: it has the names of an encoder of this package.")
        return EncoderWeights(found, what, content.ours)
    origin = None
    if name is not None:
        found, origin = as_published(found, name, path)
        what += f" ({name})"
    return EncoderWeights(found.state, what, content.ours or described(found), found, origin)


def _encoder_prefix(names: Iterable[str], which: str) -> tuple[str, str]:
    """The prefix of the wanted encoder's tensors in a method's, and what it is: there may be no teacher."""
    taught = any(name.startswith("teacher.") for name in names)
    return ("teacher.", "teacher") if taught and which == "teacher" else ("encoder.", "encoder")


def _consolidated_weights(path: Path, which: str) -> EncoderWeights | None:
    """The encoder of a file by `elsewhere consolidate`; None for a file without its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            part, config = metadata.get("elsewhere.part"), metadata.get("elsewhere.config")
            if part is None and config is None:
                return None
            names = list(file.keys())
            prefix, what = _encoder_prefix(names, which) if part == "all" else ("", part or "encoder")
            if part not in (None, "all", "teacher", "student"):
                raise UserError(f"{path} holds the {part}, which is no encoder; consolidate its run with --part "
                                "teacher or student.")  # fmt: skip
            if part == "teacher" and which == "student":
                raise UserError(f"{path} holds the teacher alone; consolidate its run with --part student, or leave "
                                "out which.")  # fmt: skip
            state = _part({name: file.get_tensor(name) for name in names if name.startswith(prefix)}, prefix)
            if part == "all":
                state |= {name: file.get_tensor(name) for name in names if name.startswith("fc_norm.")}
        known = Config.stored(json.loads(config)) if config else None
    except (OSError, SafetensorError, ValueError) as error:  # a ValidationError of pydantic is a ValueError
        raise UserError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from error
    return EncoderWeights(state, f"the {what} of {path}", known)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
