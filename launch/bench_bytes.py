"""Bytes of a model's states that each rank holds, counted from the memory behind the engine's own tensors."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .bench_batches import fixed_batches
from .bench_clock import resident
from .bench_loops import fresh_method
from .config import Config
from .engine.base import Engine
from .engine.choose import build_engine
from .world import World

_GRADIENTS = ("averaged_gradients", "grad_partitions_flat_buffer")  # of DeepSpeed's optimisers
STATES = ("weights", "masters", "teacher", "moments", "gradients")


def _storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of the memory behind tensors, by its address: what two tensors share counts once."""
    out = {}
    for tensor in tensors:
        tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor, what lies on this rank
        storage = tensor.untyped_storage()
        if storage.nbytes():
            out[storage.data_ptr()] = storage.nbytes()
    return out


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(one)


def held(engine: Engine) -> dict[str, dict[int, int]]:
    """The memory of this rank behind the engine's own tensors, by what it is for: bytes by address, each once.

    `weights` are those that the model computes with, `masters` float32 weights of the optimiser that lie elsewhere,
    `gradients` what is kept of them now: ask between a backward and its step. `gathered` and `buckets` are no states of
    the model: whole copies of parameters that ZeRO 3 has divided, and what it and ZeRO 2 collect gradients in.
    """
    optimizer: Any = engine.optimizer
    parameters = list(engine.method.parameters())
    stored = list(zip(parameters, engine.stored(), strict=True))
    parts: dict[str, Iterable[Any]] = {
        "weights": [tensor for p, tensor in stored if p.requires_grad],
        "teacher": [tensor for p, tensor in stored if not p.requires_grad],
        # DeepSpeed's optimiser of stages 1 to 3 is around ours.
        "moments": _tensors_in(dict(getattr(optimizer, "optimizer", optimizer).state)),
        "masters": [piece.values for name, piece in engine.pieces().items() if name.startswith("method.")],
        "gradients": [
            *(p.grad for p in parameters if p.grad is not None),
            *_tensors_in([getattr(optimizer, name, None) for name in _GRADIENTS]),
        ],
        "gathered": [p.data for p in parameters if hasattr(p, "ds_tensor")],
        "buckets": _tensors_in([vars(bucket) for bucket in getattr(optimizer, "ipg_buckets", {}).values()]),
    }  # fmt: skip
    known: dict[int, int] = {}
    out = {}
    for part, tensors in parts.items():
        out[part] = {address: size for address, size in _storages(tensors).items() if address not in known}
        known |= out[part]
    return out


def whole_bytes(method: nn.Module) -> dict[str, int]:
    """Bytes of a method's states in float32 where nothing is divided: ask before an engine divides it."""
    trained = 4 * sum(p.numel() for p in method.parameters() if p.requires_grad)
    frozen = 4 * sum(p.numel() for p in method.parameters() if not p.requires_grad)
    return {"weights": trained, "teacher": frozen, "moments": 2 * trained, "gradients": trained}


def _alive() -> dict[int, int]:
    """The memory behind all tensors that Python knows of."""
    out = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old names in torch that answer to isinstance
        for item in gc.get_objects():
            with contextlib.suppress(Exception):  # by raising, or without memory of their own
                if isinstance(item, Tensor) and item.device.type != "meta":
                    out |= _storages([item])
    return out


def _anonymous() -> int:
    """Bytes of this process that no file backs, after the allocator has given back what it keeps for later."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident("RssAnon")


def bytes_held(config: Config, world: World, batch: int) -> dict[str, Any]:
    """What this rank holds between a backward and its step, and what the process grew by when the engine was built."""
    batches = fixed_batches(config, world, batch, 1)
    gc.collect()
    before, process = _alive(), _anonymous()
    method = fresh_method(config, world)
    whole = whole_bytes(method)
    engine = build_engine(config, method, world, batch, 1)
    del method
    grown = _anonymous() - process
    engine.forward_backward(batches[0], 0)
    parts = held(engine)
    gc.collect()
    known = {address for part in parts.values() for address in part}
    rest = {address: size for address, size in _alive().items() if address not in known | before.keys()}
    sizes = {part: sum(found.values()) for part, found in parts.items()}
    states = sum(sizes[part] for part in STATES)
    everything = torch.tensor([states, sum(rest.values()), grown, *sizes.values()], dtype=torch.float64)
    most = world.gather(everything).amax(dim=0).tolist()  # of all ranks
    share = sum(whole.values()) / world.size
    return {
        "whole": whole, "share": share, "states": most[0], "ratio": most[0] / share, "rest": most[1],
        "grown_before_gradients": most[2], **dict(zip(sizes, most[3:], strict=True)),
    }  # fmt: skip
