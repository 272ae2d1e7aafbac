"""Memory of a training step's activations, from a run of the very method on tensors without memory.

A method of few blocks runs forward and backward on fake tensors for two sizes of the batch; every storage that is alive
after an operation is counted. Blocks of a stack are alike and so are images, so what more of either take follows from
differences, exactly. Attention is that of CUDA: fused, keeping q, k, v, its result and a logarithm for each row.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...data.batch import Batch
from ...kernels import relative_reference
from ...models import relative
from ...models.mae import Mae
from ...models.method import Method
from ...models.relative import RelativeTable
from ...models.windows import WindowBlock
from ..build import build_masks, build_method
from ..config import Checkpoint, Config, Data, Engine, LoaderSection, Optim, Probe, Run, Teacher
from ..engine.activation_checkpointing import checkpoint_activations
from .detector import fullest

_IMAGES = (2, 3)  # of one there are shapes that count as contiguous, which more images are not
_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Line:
    """Bytes as a linear function of the number of images."""

    fixed: float
    per_image: float

    def __call__(self, images: int) -> float:
        return self.fixed + self.per_image * images


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch's forward and backward beside weights and gradients, for one checkpointing policy."""

    kept: Line  # held for the backward when the forward has ended
    moments: tuple[Line, ...]  # what is alive at the fullest moment of every part of forward and backward

    def peak(self, images: int) -> float:
        """The most that is alive at once."""
        return max(line(images) for line in self.moments)

    def fixed(self, images: int) -> float:
        """Of the peak, what does not depend on the images: half-precision copies of weights, mostly."""
        return max(self.moments, key=lambda line: line(images)).fixed

    def most_images(self, bytes_free: float, factor: float = 1.0, beside: float = 0.0) -> int:
        """The most images of which `factor` times the peak, and `beside` bytes of each, fit; 0 if not even one does."""
        rest = [(bytes_free - factor * line.fixed, factor * line.per_image + beside) for line in self.moments]
        if any(free < 0 for free, _ in rest):
            return 0
        return int(min(free / slope for free, slope in rest if slope > 0))


class _Alive(TorchDispatchMode):
    """Adds up the storages that are alive after each operation; `mark` begins a part whose peak counts on its own."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.known = known  # not counted: weights, gradients, the batch
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bound = 0
        self.peaks: dict[tuple, int] = {}
        self._part: tuple = ("forward", "", 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        if self._bound > self.peaks.get(self._part, -1):
            self.now()
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        kept = self._storages.get(key)
        if kept is None or kept[0].expired():
            self._storages[key] = (StorageWeakRef(storage), storage.nbytes())
            self._bound += storage.nbytes()

    def now(self) -> int:
        """Bytes alive now."""
        self._storages = {key: pair for key, pair in self._storages.items() if not pair[0].expired()}
        self._bound = sum(size for _, size in self._storages.values())
        self.peaks[self._part] = max(self.peaks.get(self._part, 0), self._bound)
        return self._bound

    def forget(self, tensor: Tensor) -> None:
        """Leave a tensor out from now on."""
        self.known.add(tensor.untyped_storage()._cdata)
        self._storages.pop(tensor.untyped_storage()._cdata, None)

    def mark(self, *part: Any) -> None:
        self._part = part
        self.now()


@dataclass
class _Trace:
    """One run: bytes when the forward has ended, and by stack after each of its blocks; peaks by part of the step."""

    kept: int
    after: dict[str, list[int]]  # in the forward
    before: dict[str, list[int]]  # in the backward, when the gradient of a block's output is there
    peaks: dict[tuple, int]


@functools.lru_cache(maxsize=32)
def _cached(text: str, policy: str | int, dtype: torch.dtype, cuda: bool, shorten: bool) -> Activations:
    config = Config.model_validate_json(text)
    return _activations(config, policy, dtype, cuda, shorten)


def activations(
    config: Config, policy: str | int, dtype: torch.dtype, cuda: bool = True, shorten: bool = True
) -> Activations:
    """What the recipe's method takes beside its weights and gradients under a checkpointing `policy`.

    `dtype` is that of autocast (float32: none). `cuda=False` counts the CPU's attention instead of CUDA's; without
    `shorten` all blocks are run.
    """
    return _cached(_what_matters(config), policy, dtype, cuda, shorten)


def _what_matters(config: Config) -> str:
    """The configuration with all else at its default, so that a plan of another batch finds what was traced."""
    kept = ("views", "mean", "std", "erase", "mixup", "cutmix")
    data = Data(**{name: getattr(config.data, name) for name in kept})
    teacher = Teacher(layers=config.method.teacher.layers)
    plain = {
        "data": data, "optim": Optim(), "engine": Engine(), "loader": LoaderSection(), "run": Run(), "about": "",
        "checkpoint": Checkpoint(), "probe": Probe(), "method": config.method.model_copy(update={"teacher": teacher}),
    }  # fmt: skip
    return config.model_copy(update=plain).model_dump_json(by_alias=True)


def _activations(config: Config, policy: str | int, dtype: torch.dtype, cuda: bool, shorten: bool) -> Activations:
    method = on_meta(config)
    depths = {name: len(stack) for name, stack in method.stacks().items()}
    if any(isinstance(block, WindowBlock) for stack in method.stacks().values() for block in stack):
        shorten = False  # its blocks are not alike
    every = policy if isinstance(policy, int) else 1
    # Two whole periods of a policy that leaves blocks out, a last block of its own kind, the rest of the true depth.
    least = max(2 * every + 1, config.method.teacher.layers + 1)
    short = {name: min(depth, least + (depth - least) % every) for name, depth in depths.items()}
    traces = [_trace(config, policy, dtype, cuda, images, short if shorten else depths) for images in _IMAGES]
    first, second = (_whole(trace, depths, short if shorten else depths, every) for trace in traces)
    lines = {name: _line(first[name], second[name]) for name in first}
    kept = lines.pop(("kept",))
    return Activations(kept, tuple(lines.values()))


def _line(first: float, second: float) -> Line:
    slope = (second - first) / (_IMAGES[1] - _IMAGES[0])
    return Line(first - slope * _IMAGES[0], slope)


def _whole(trace: _Trace, depths: dict[str, int], short: dict[str, int], every: int) -> dict[tuple, float]:
    """The bytes of a trace's parts at the true depths: what the blocks that were left out keep is added."""
    # One after another as they are run; backwards they let go in the opposite order.
    stacks = [name for name in ("teacher", "encoder", "predictor", "decoder") if name in depths]
    left = {name: (depths[name] - short[name]) / every for name in stacks}
    forward, backward = {}, {}
    for name in stacks:
        marks = trace.after[name]
        trained = bool(left[name] and trace.before[name])  # a teacher keeps nothing
        forward[name] = marks[-2] - marks[-2 - every] if trained else 0
        marks = trace.before[name]  # of the last block first
        backward[name] = marks[1] - marks[1 + every] if trained else 0
    out: dict[tuple, float] = {("kept",): trace.kept + sum(left[n] * backward[n] for n in stacks)}
    for part, peak in trace.peaks.items():
        phase, stack, number = part
        at = stacks.index(stack) if stack else 0 if phase == "forward" else len(stacks)
        slopes, more = (forward, 0.0) if phase == "forward" else (backward, 0.0)
        for i, name in enumerate(stacks):
            # Blocks of an earlier stack are all held; of its own, where the part is of the last blocks.
            if i < at or (i == at and stack and number >= short[name] - every - 1):
                more += left[name] * slopes[name]
        out[part] = peak + more
    return out


def on_meta(config: Config, depths: dict[str, int] | None = None) -> Method:
    """The method of a configuration without memory for its weights; Apex's norms count as torch's.

    `depths` are numbers of blocks by the name of the stack, for others than configured.
    """
    depths = depths or {}
    model, method = config.model.model_copy(update={"norm": "torch"}), config.method
    if "encoder" in depths:
        model.depth = depths["encoder"]
    for name in ("predictor", "decoder"):
        if name in depths:
            section = getattr(method, name).model_copy(update={"depth": depths[name]})
            method = method.model_copy(update={name: section})
    with torch.device("meta"):
        # Fake tensors of a CPU are given to it, on which Triton's kernels do not run.
        return build_method(config.model_copy(update={"model": model, "method": method, "kernels": "auto"}))


def _trace(
    config: Config, policy: str | int, dtype: torch.dtype, cuda: bool, images: int, depths: dict[str, int]
) -> _Trace:
    method = on_meta(config, depths)
    masks = build_masks(config, method.encoder.grid)
    drawn = masks(config.seed, 0, 0, np.arange(images)) if masks else None
    method.compute_dtype = dtype
    with FakeTensorMode(), _as_on_cuda(method) if cuda else contextlib.nullcontext(), own_tables():
        make_fake(method)
        checkpoint_activations(method, policy)
        batch = fake_batch(config, drawn, images)
        inputs: tuple = (batch,)
        if isinstance(method, Mae) and method.attack.mode != "none":
            inputs += ({n: torch.empty(t.shape).requires_grad_() for n, t in method.attack_tensors().items()},)
        held = [*method.parameters(), *method.buffers(), *tree_leaves([vars(batch), inputs[1:]])]
        alive = _Alive({t.untyped_storage()._cdata for t in held if isinstance(t, Tensor)})
        after, before = _watch(method, alive)
        with alive:
            if config.method.kind == "detect":
                loss, scalars = fullest(method, batch), None
            else:
                loss, scalars = method(*inputs)
            alive.mark("backward", "", 0)
            kept = alive.now()
            torch.autograd.backward(loss)
            del loss, scalars
    return _Trace(kept, after, before, alive.peaks)


def make_fake(method: nn.Module) -> None:
    """Give a method on the meta device fake tensors of the CPU; the mode must be on."""
    for module in method.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(torch.empty(weight.shape), weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def fake_batch(config: Config, masks: Any, images: int) -> Batch:
    """A micro-batch of `images` as the method meets it, with empty tensors; `masks` is None for a task."""
    data, kind = config.data, config.method.kind
    views = (data.views,) if data.views > 1 else ()
    ids = torch.zeros(images, dtype=torch.int64)
    drawn = {name: getattr(masks, name, None) for name in ("context", "targets", "visible")}
    parts: dict[str, Any] = {n: torch.empty(p.shape, dtype=torch.int64) for n, p in drawn.items() if p is not None}
    if kind == "segment":
        parts["truth"] = torch.zeros(images, *config.model.image_size, dtype=torch.int64)
    mixed = kind == "classify" and (data.erase or data.mixup or data.cutmix)
    dtype = torch.float32 if mixed else torch.uint8
    return Batch(
        images=torch.empty(images, *views, config.model.channels, *config.model.image_size, dtype=dtype),
        sample_ids=ids, labels=ids, epochs=ids, step=0, **parts,
    )  # fmt: skip


def _watch(method: Method, alive: _Alive) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Note what is alive after each block's forward, and when each block's backward begins; leave gradients out."""
    after: dict[str, list[int]] = {name: [] for name in method.stacks()}
    before: dict[str, list[int]] = {name: [] for name in method.stacks()}

    def begin(name: str, number: int, *_: Any) -> None:
        alive.mark("forward", name, number)

    def end(name: str, number: int, module: nn.Module, inputs: Any, output: Tensor) -> None:
        after[name].append(alive.now())
        alive.mark("forward", name, number + 1)
        if output.requires_grad:
            output.register_hook(functools.partial(arrive, name, number))

    def arrive(name: str, number: int, _: Tensor) -> None:
        before[name].append(alive.now())
        alive.mark("backward", name, number)

    for name, stack in method.stacks().items():
        for number, block in enumerate(stack):
            block.register_forward_pre_hook(functools.partial(begin, name, number))
            block.register_forward_hook(functools.partial(end, name, number))
    for parameter in method.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: alive.forget(p.grad))  # pyright: ignore
    return after, before


@contextlib.contextmanager
def own_tables() -> Iterator[None]:
    """Keep fake tensors out of the tables that relative positions remember, and real ones out of here."""
    remembered = [one for one in vars(relative).values() if hasattr(one, "cache_clear")]
    for one in remembered:
        one.cache_clear()
    try:
        yield
    finally:
        for one in remembered:
            one.cache_clear()


@contextlib.contextmanager
def _as_on_cuda(method: nn.Module) -> Iterator[None]:
    """Let fake tensors of the CPU take the ways of CUDA's: its attention, what its autocast computes in float32.

    A fake CUDA device would do, but has no backward where there is no GPU.
    """
    for module in method.modules():
        if isinstance(module, RelativeTable):
            module.form = "dense"
    softmax, norm = torch.Tensor.softmax, F.layer_norm
    with (
        mock.patch.object(F, "scaled_dot_product_attention", _cuda_attention),
        mock.patch.object(F, "layer_norm", lambda x, *args, **options: norm(_in_float32(x), *args, **options)),
        mock.patch.object(
            torch.Tensor, "softmax", lambda x, *args, **options: softmax(_in_float32(x), *args, **options)
        ),
        mock.patch.object(relative_reference, "_chunk_numbers", lambda _: relative_reference._GPU_CHUNK),
        mock.patch.object(relative_reference, "_fused", lambda *_: True),
    ):
        yield


def _in_float32(x: Tensor) -> Tensor:
    return x.float() if torch.is_autocast_enabled("cpu") else x


def _cuda_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """`scaled_dot_product_attention` as CUDA does it: flash in half precision, with a bias the efficient kernel's."""
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (each.to(torch.get_autocast_dtype("cpu")) for each in (q, k, v))
    scale = options.get("scale")
    if attn_mask is None and q.dtype != torch.float32:
        return _ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[0]
    bias = None
    if attn_mask is not None:
        length = attn_mask.shape[-1]
        if length % 16:  # the kernel reads rows of whole vectors, so that a bias is copied to such rows
            attn_mask = F.pad(attn_mask, (0, 16 - length % 16))[..., :length]
        bias = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    backward = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias))
    return _ATEN._scaled_dot_product_efficient_attention(q, k, v, bias, backward, 0.0, False, scale=scale)[0]
