"""What makes the host wait for its device, seen in the operations that a step calls."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATEN = torch.ops.aten
# Operations that ask for a value, or whose result has a size that depends on values.
_READS = {
    _ATEN._local_scalar_dense, _ATEN.is_nonzero, _ATEN.equal, _ATEN.nonzero, _ATEN.masked_select, _ATEN._unique2,
    _ATEN.unique_consecutive, _ATEN.bincount,
}  # fmt: skip


class HostWaits(TorchDispatchMode):
    """Collects what waits: reads of values, and copies between devices.

    A CPU's `tolist` passes by it, and so do copies within a CPU: on the meta device the one fails, the others show.
    """

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, Tensor)]
        masks = func.overloadpacket in (_ATEN.index, _ATEN.index_put, _ATEN.index_put_) and any(
            one.dtype == torch.bool for one in tree_leaves(args[1]) if isinstance(one, Tensor)
        )
        copies = len({one.device for one in tensors}) > 1
        if func.overloadpacket in _READS or masks or copies:
            self.found.append(str(func))
        return out
