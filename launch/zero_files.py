"""The weights in a checkpoint by deepspeed's own `save_checkpoint`, ZeRO stages 0 to 3, read without deepspeed."""

from __future__ import annotations

import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2

from .errors import UserError
from .tensor_files import DTYPES, Described
from .unpickle import Inert, load_file, restricted


def _rebuild_typed(function: Any, _kind: Any, arguments: tuple[Any, ...], _state: Any) -> Any:
    """A tensor that carried attributes when it was saved, without them."""
    return function(*arguments)


_ALLOWED = {
    **DTYPES,
    "collections.OrderedDict": OrderedDict,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.Tensor": Inert,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.nn.parameter.Parameter": torch.nn.Parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_typed,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    # What a user's own state may hold: random states and arguments.
    "_codecs.encode": Inert,
    "argparse.Namespace": Inert,
    "numpy.dtype": Inert,
    "numpy.ndarray": Inert,
    **{
        f"numpy.{core}.multiarray.{name}": Inert
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    },
}  # fmt: skip
_PICKLE = restricted(_ALLOWED, inert=("deepspeed",))
_RANK_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(optim|model)_states\.pt")
_WAY_OUT = "take another checkpoint, or convert it with deepspeed's own tools"


def find_zero(path: Path) -> Path | None:
    """The folder of a deepspeed checkpoint's files: `path`, or the one that its `latest` names; None if it is neither.

    Raises UserError where `latest` names a folder that is not there.
    """
    latest = path / "latest"
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if not (path / tag).is_dir():
            raise UserError(f"{latest} names {tag!r}, which is not in {path}; give the folder of another checkpoint.")
        path = path / tag
    return path if any(path.glob("*_states.pt")) else None


def _load(path: Path) -> dict[str, Any]:
    """A file by deepspeed, its tensors mapped; raises UserError that says what is wrong with it."""
    try:
        content = load_file(path, _PICKLE)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {_WAY_OUT}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {_WAY_OUT}.") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} cannot be used: {error}; {_WAY_OUT}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a file by deepspeed's save_checkpoint; {_WAY_OUT}.")
    return content


def _cut(tensors: Sequence[Tensor], start: int, count: int) -> list[Tensor]:
    """`count` numbers from `start` on, of flat tensors that follow one another; views."""
    found = []
    for tensor in tensors:
        if start < tensor.numel() and count > 0:
            found.append(tensor[start : start + count])
            count -= found[-1].numel()
            start = 0
        else:
            start -= min(start, tensor.numel())
    return found


class ZeroFiles:
    """The weights of a deepspeed checkpoint: what there is, and each by its name, in float32 where it was trained.

    `stage` is ZeRO's, `ranks` how many processes wrote it, `step` where it tells, `groups` the number of parameters of
    each parameter group. Raises UserError that names what is missing, damaged or of another kind.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = sorted(folder.glob("*_states.pt"))
        optim, model = self._ranks("optim"), self._ranks("model")
        if any(path.name.startswith("layer_") for path in self.files):
            raise UserError(f"{folder} was written by pipeline or expert parallelism, which is not read; {_WAY_OUT}.")
        if not optim and not model:
            self.stage = 0
            states, self._states = [], [_load(folder / "mp_rank_00_model_states.pt")]
            self.ranks = self._states[0].get("dp_world_size", 1)
        else:
            states = self._optimizer_states(optim)
            one = folder / "mp_rank_00_model_states.pt"
            self._states = [_load(one)] if self.stage < 3 else [_load(path) for path in self._all(model, "model")]
        first = self._states[0]
        self.version, self.step = first.get("ds_version"), first.get("global_steps")
        if not isinstance(first.get("module"), dict) or first.get("mp_world_size", 1) != 1:
            raise UserError(f"{folder} was written by tensor or pipeline parallelism, which is not read; {_WAY_OUT}.")
        if self.stage == 0 and first.get("param_shapes"):
            raise UserError(f"{folder} lacks zero_pp_rank_0_mp_rank_00_optim_states.pt, where its weights are; "
                            f"{_WAY_OUT}.")  # fmt: skip
        world = first.get("dp_world_size", self.ranks)
        if self.stage and world != self.ranks:
            raise UserError(f"{folder} holds optimizer files of {self.ranks} ranks and model files of {world}: they "
                            f"are of two checkpoints; {_WAY_OUT}.")  # fmt: skip
        shapes = first.get("param_shapes") or []
        self.groups = [sum(math.prod(shape) for shape in group.values()) for group in shapes]
        self._pieces: dict[str, list[Tensor]] = {}
        self.described: dict[str, Described] = {}
        try:
            self._add_frozen()
            (self._add_sharded if self.stage == 3 else self._add_flat)(shapes, states)
            self._add_module()
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder} does not hold what deepspeed writes ({type(error).__name__}: {error}); "
                            f"{_WAY_OUT}.") from error  # fmt: skip

    def _ranks(self, kind: str) -> dict[int, Path]:
        """The ranks' files of a kind, by rank."""
        found: dict[int, Path] = {}
        for path in self.files:
            match = _RANK_FILE.fullmatch(path.name)
            if match is None or match[3] != kind:
                continue
            if int(match[2]):
                raise UserError(f"{self.folder} was written by tensor parallelism, which is not read; {_WAY_OUT}.")
            if int(match[1]) in found:
                raise UserError(f"{self.folder} holds {found[int(match[1])].name} and {path.name}, of two checkpoints "
                                f"in one folder; {_WAY_OUT}.")  # fmt: skip
            found[int(match[1])] = path
        return found

    def _all(self, found: Mapping[int, Path], kind: str) -> list[Path]:
        """The files of every rank in order; UserError if one is missing or left over."""
        missing = sorted(set(range(self.ranks)) - set(found))
        if missing:
            prefix = next(iter(found.values())).name.split("zero_pp_rank_")[0] if found else ""
            name = f"{prefix}zero_pp_rank_{missing[0]}_mp_rank_00_{kind}_states.pt"
            raise UserError(f"{self.folder} lacks {name}, one of the {self.ranks} that its ranks wrote; {_WAY_OUT}.")
        if len(found) > self.ranks:
            raise UserError(f"{self.folder} holds {len(found)} {kind} files and was written by {self.ranks} ranks: "
                            f"some are of another checkpoint; {_WAY_OUT}.")  # fmt: skip
        return [found[rank] for rank in range(self.ranks)]

    def _optimizer_states(self, found: Mapping[int, Path]) -> list[dict[str, Any]]:
        """The optimiser's state of every rank, of one stage and number of ranks."""
        told = []
        states = {}
        for rank, path in sorted(found.items()):
            states[rank] = _load(path).get("optimizer_state_dict")
            try:
                counts = states[rank]["partition_count"]
                counts = set(counts) if isinstance(counts, list | tuple) else {counts}
                told.append((int(states[rank]["zero_stage"]), *sorted(counts)))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path} does not say its ZeRO stage and number of ranks; {_WAY_OUT}.") from error
        if not told:
            raise UserError(f"{self.folder} lacks zero_pp_rank_0_mp_rank_00_optim_states.pt; {_WAY_OUT}.")
        if len(set(told)) > 1:
            raise UserError(f"The files in {self.folder} are of checkpoints with other stages or numbers of ranks; "
                            f"{_WAY_OUT}.")  # fmt: skip
        self.stage, *counts = told[0]
        if len(counts) != 1 or self.stage not in (1, 2, 3):
            raise UserError(f"{self.folder} was written with experts, which are not read; {_WAY_OUT}.")
        self.ranks = counts[0]
        self._all(found, "optim")
        return [states[rank] for rank in range(self.ranks)]

    def _put(self, name: str, shape: Sequence[int], pieces: list[Tensor]) -> None:
        count = math.prod(shape)
        pieces = _cut(pieces, 0, count)  # without the padding at its end
        if sum(piece.numel() for piece in pieces) != count:
            raise UserError(f"The files in {self.folder} end before {name} does; {_WAY_OUT}.")
        dtype = pieces[0].dtype if pieces else torch.float32
        self._pieces[name], self.described[name] = pieces, Described(tuple(shape), dtype)

    def _add_flat(self, groups: Sequence[Mapping[str, Sequence[int]]], states: Sequence[Mapping[str, Any]]) -> None:
        """Stages 1 and 2: the ranks' parts of a group one after another are its parameters one after another."""
        for index, group in enumerate(groups):
            parts = [state["single_partition_of_fp32_groups"][index] for state in states]
            have, start = sum(part.numel() for part in parts), 0
            # Since 0.19, where the optimiser wants each parameter to begin at a round address.
            padding = states[0].get("param_alignment_paddings")
            for place, (name, shape) in enumerate(group.items()):
                count = math.prod(shape)
                self._put(name, shape, _cut(parts, start, count))
                start += count + (padding[index][place] if padding else 0)
            if have - start >= 2 * self.ranks:  # beyond the padding of a group
                raise UserError(f"The files in {self.folder} hold {have - start:,} numbers that belong to no parameter "
                                f"of group {index}; {_WAY_OUT}.")  # fmt: skip

    def _add_sharded(self, groups: Sequence[Mapping[str, Sequence[int]]], states: Sequence[Mapping[str, Any]]) -> None:
        """Stage 3: every parameter is divided among the ranks; a rank's parts follow one another through its groups."""
        start = 0
        for name, shape in [item for group in groups for item in group.items()]:
            count = math.ceil(math.prod(shape) / self.ranks)
            self._put(name, shape, [piece for s in states for piece in _cut(s["fp32_flat_groups"], start, count)])
            start += count
        have = [sum(part.numel() for part in state["fp32_flat_groups"]) for state in states]
        if have != [start] * self.ranks:
            raise UserError(f"The files in {self.folder} hold other numbers of parameters ({have}) than they should "
                            f"({start} a rank); {_WAY_OUT}.")  # fmt: skip

    def _add_frozen(self) -> None:
        """Parameters that no optimiser holds: whole in stage 2, divided in stage 3, in the module alone in stage 1."""
        for name, shape in (self._states[0].get("frozen_param_shapes") or {}).items():
            ranks = self._states if self.stage == 3 else self._states[:1]
            self._put(name, shape, [state["frozen_param_fragments"][name].reshape(-1) for state in ranks])

    def _add_module(self) -> None:
        """The rest in the order of the module: buffers, shared parameters, and what only the module holds."""
        first = self._states[0]
        module, shared = first["module"], first.get("shared_params") or {}
        buffers = set(first.get("buffer_names") or ())
        for name, tensor in module.items():
            if not isinstance(tensor, Tensor):
                continue
            source = shared.get(name)
            if source in self.described and name not in self.described:
                self._pieces[name], self.described[name] = self._pieces[source], self.described[source]
            elif name in buffers or (name not in self.described and self.stage < 3):
                self._pieces[name] = [tensor.reshape(-1)]
                self.described[name] = Described(tuple(tensor.shape), tensor.dtype)
            elif name not in self.described:
                raise UserError(f"{self.folder} names {name} and holds no values of it; {_WAY_OUT}.")
        order = {name: place for place, name in enumerate(module)}
        self.described = dict(sorted(self.described.items(), key=lambda item: order.get(item[0], len(order))))

    def read(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU; mapped from its file where it lies there in one piece."""
        pieces, whole = self._pieces[name], self.described[name]
        if len(pieces) == 1:
            return pieces[0].view(whole.shape)
        return torch.cat(pieces).view(whole.shape) if pieces else torch.empty(whole.shape, dtype=whole.dtype)
