"""Weights, gradients and moments divided over ranks by FSDP2, or over groups of ranks that each hold all (HSDP)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ...models.method import Method
from ..errors import UserError
from ..portable import Piece
from ..world import World
from .ddp import TorchEngine


def check_replicas(world: World, replicas: int) -> None:
    """Raise UserError where the ranks cannot be cut into `replicas` groups of one size."""
    if world.size % replicas:
        raise UserError(
            f"engine.replicas={replicas} does not divide the {world.size} processes of this run; choose one that does, "
            "or engine.replicas=1."
        )


def make_mesh(world: World, replicas: int) -> DeviceMesh:
    """The ranks in a row, or in `replicas` rows that each hold the whole model."""
    check_replicas(world, replicas)
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shards",))
    return init_device_mesh(
        world.device.type, (replicas, world.size // replicas), mesh_dim_names=("replicas", "shards")
    )


def sharder(world: World, replicas: int, offload: bool) -> Callable[[nn.Module], Any]:
    """The function that divides a module's weights over the ranks, as FSDP2 does."""
    mesh = make_mesh(world, replicas)
    # Pinned memory is CUDA's.
    policy = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload else OffloadPolicy()
    # No mixed-precision policy: it would cast the inputs, the adversary's tensors among them.
    return lambda module: fully_shard(module, mesh=mesh, offload_policy=policy)


class FsdpEngine(TorchEngine):
    """Steps a method that `sharder` has divided block by block; `make_optimizer` gets it so.

    Float32 shards, gathered in float32; half precision is the method's autocast.
    """

    kind = "fsdp"

    def __init__(self, method: Method, make_optimizer, world, scaler, *args, **kwargs):
        super().__init__(method, world, scaler, *args, **kwargs)
        assert isinstance(method, FSDPModule), "the method comes divided"
        self._divided: FSDPModule = method
        self._begin(make_optimizer(method))

    def _exchange(self, last: bool) -> contextlib.AbstractContextManager:
        self._divided.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def _forward(self, *inputs: Any, ask: str) -> Any:
        found = super()._forward(*inputs, ask=ask)
        self._divided.reshard()  # the root stays gathered for a backward, which does not come
        return found

    @staticmethod
    def _numbers(tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def _stored(self, parameter: nn.Parameter) -> Tensor:
        return self._numbers(parameter).detach()  # in this order: a DTensor's detach costs six times as much

    def _piece(self, tensor: Tensor) -> Piece | None:
        tensor = tensor.detach()
        if not isinstance(tensor, DTensor):
            return Piece.whole(tensor)
        local = tensor.to_local()
        if not local.numel():  # fewer rows than ranks
            return None
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        return Piece(local, tuple(tensor.shape), offset[0] * math.prod(tensor.shape[1:]))

    def pieces(self) -> dict[str, Piece]:
        """As for any engine; of several replicas the first writes."""
        found = super().pieces()
        mesh = next(p.device_mesh for p in self._parameters.values() if isinstance(p, DTensor))
        if mesh.ndim == 2 and mesh.get_local_rank("replicas"):
            return {}
        return found
