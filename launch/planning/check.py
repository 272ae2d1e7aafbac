"""The plan against others' counts: FSDP2's memory tracker, DeepSpeed's estimators and, on a GPU, one real step."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..build import build_masks
from ..config import Config
from ..engine.choose import build_engine
from ..engine.parallelise import parallelise
from ..errors import UserError
from ..world import World
from .activations import fake_batch, make_fake, on_meta
from .memory import Division, numel, states, weights_of
from .plan import Case, Place, memory, open_case

# Of the compared micro-batch: as many as make the fullest moment that of activations, not of gradients.
_IMAGES = 32


def check(config: Config, place: Place) -> dict[str, Any]:
    """Compare model states and activations with three other counts; what cannot be run here says why."""
    case = open_case(config, place.gpu, None, "")
    ranks = max(2, place.gpus)
    return {
        "ranks": ranks, "images": _IMAGES, "tracker": _tracker(case, ranks), "deepspeed": _deepspeed(case, ranks),
        "step": _real_step(case),
    }  # fmt: skip


def _tracker(case: Case, ranks: int) -> dict[str, Any]:
    """FSDP2's own count of a forward and backward on fake tensors, in a group of ranks that are not there.

    In float32 and without activation checkpointing, under which its split into parts is wrong. It counts the CPU's
    attention, so that activations are compared with ours for that.
    """
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        return {"not_run": f"this torch has no FSDPMemTracker ({error})"}
    if dist.is_initialized():
        return {"not_run": "this process belongs to a process group already"}
    from ...models.mae import Mae
    from .activations import activations, own_tables

    shallow = {name: min(4, len(stack)) for name, stack in on_meta(case.config).stacks().items()}
    config = _of_depth(case.config, shallow)
    method = on_meta(config)
    masks = build_masks(config, method.encoder.grid)(config.seed, 0, 0, np.arange(_IMAGES))
    weights = weights_of(method)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        with FakeTensorMode(), own_tables():
            make_fake(method)
            parallelise(method, "none", False, lambda module: fully_shard(module, mesh=mesh))
            inputs: tuple = (fake_batch(config, masks, _IMAGES),)
            if isinstance(method, Mae) and method.attack.mode != "none":
                inputs += ({n: torch.empty(t.shape).requires_grad_() for n, t in method.attack_tensors().items()},)
            optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3)
            tracker = FSDPMemTracker(method, optimizer)
            tracker.track_inputs(inputs)
            with tracker:
                for step in range(2):
                    loss, _ = method(*inputs)
                    torch.autograd.backward(loss)
                    del loss
                    optimizer.step()
                    optimizer.zero_grad()
                    if step == 0:
                        tracker.reset_mod_stats()
            peak = next(iter(tracker.get_tracker_snapshot("peak").values()))
    finally:
        dist.destroy_process_group()
    theirs = {str(getattr(kind, "value", kind)): int(size) for kind, size in peak.items()}
    ours = states(weights, Division("fsdp", ranks, stage=3))
    acts = activations(config, "none", torch.float32, cuda=False)
    mine = {
        "sharded weights": ours.gpu["weights"] + ours.gpu["teacher"], "moments": ours.gpu["moments"],
        "activations": acts.peak(_IMAGES),
    }  # fmt: skip
    return {"blocks": shallow, "theirs": theirs, "ours": mine}


def _of_depth(config: Config, depths: dict[str, int]) -> Config:
    """The configuration with as many blocks in each stack, in float32 and without activation checkpointing."""
    engine = config.engine.model_copy(update={"precision": "float32", "activation_checkpointing": "none"})
    model = config.model.model_copy(update={"depth": depths["encoder"]})
    method = config.method
    for name in ("predictor", "decoder"):
        if name in depths:
            part = getattr(method, name).model_copy(update={"depth": depths[name]})
            method = method.model_copy(update={name: part})
    return config.model_copy(update={"engine": engine, "model": model, "method": method})


def _deepspeed(case: Case, ranks: int) -> dict[str, Any]:
    """DeepSpeed's `estimate_zero2/3_model_states_mem_needs` beside ours, and ours by its definitions.

    Of a weight it counts 2 bytes in half precision, whole at stage 2, and of the rank's share 18 bytes: gradients in
    half precision and in float32, float32 masters, moments. We hold weights in float32 alone, gradients once, and a
    teacher. So its figure is ours, less the teacher and 2 bytes of every whole weight, and 2 of the share more.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
            from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
    except ImportError as error:
        return {"not_run": f"deepspeed is not installed ({error})"}
    trained, options = numel(case.weights, True), {"num_gpus_per_node": ranks, "num_nodes": 1, "cpu_offload": False}
    theirs = {
        2: estimate_zero2_model_states_mem_needs(trained, **options)[1],
        3: estimate_zero3_model_states_mem_needs(trained, 0, **options)[1],
    }  # fmt: skip
    out: dict[str, Any] = {}
    for number, estimate in theirs.items():
        ours = states(case.weights, Division("zero", ranks, stage=number)).gpu
        whole = sum(ours.values())
        same = whole - ours["teacher"] * ("teacher" in ours) - 2 * trained * (number == 2) + ours["gradients"] / 2
        out[f"zero{number}"] = {"theirs": estimate, "ours": whole, "ours_by_their_definitions": same}
    return out


def _real_step(case: Case) -> dict[str, Any]:
    """The peak of a step on this machine's GPU, by one process under the recipe's engine."""
    if not torch.cuda.is_available():
        return {"not_run": "no NVIDIA GPU is visible"}
    from ...models.method import Method
    from ..build import build_method
    from ..config import Config as Whole

    config: Whole = case.config.model_copy(
        update={"optim": case.config.optim.model_copy(update={"batch_size": _IMAGES})}
    )
    if config.engine.kind != "ddp":
        return {"not_run": "one process is measured under engine.kind=ddp alone"}
    world = World(device=torch.device("cuda", 0))
    method: Method = build_method(config)
    method.compute_dtype = case.dtype
    masks = build_masks(config, method.encoder.grid)(config.seed, 0, 0, np.arange(_IMAGES))
    engine = build_engine(config, method, world, _IMAGES, 1)
    batch = fake_batch(config, masks, _IMAGES)
    for name in ("context", "targets", "visible"):
        if getattr(masks, name) is not None:
            setattr(batch, name, torch.from_numpy(getattr(masks, name)))
    batch.images.random_(0, 256)
    batch = batch.to(world.device)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        engine.forward_backward(batch, 0)
        if not engine.step():
            raise UserError("The step that was to be measured was skipped: set engine.precision=bfloat16 or float32.")
        engine.after_step(0.99)
    planned = memory(case, Division("ddp", 1), _IMAGES, config.engine.activation_checkpointing)
    beside = sum(size for name, size in planned.items() if name.startswith(("total", "CUDA", "allocator", "batches")))
    return {
        "measured": torch.cuda.max_memory_allocated(), "ours": planned["total"] * 2 - beside,
        "gpu": torch.cuda.get_device_name(),
    }  # fmt: skip


def print_check(found: dict[str, Any]) -> None:
    """Print what `check` returned."""
    print(f"\nChecked at {found['ranks']} ranks, {found['images']} images")
    tracker = found["tracker"]
    if "not_run" in tracker:
        print(f"  FSDP2's memory tracker: not run, {tracker['not_run']}")
    else:
        print(f"  FSDP2's memory tracker (float32, blocks {tracker['blocks']}), MB: theirs at the peak, ours")
        print("    theirs: " + ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in tracker["theirs"].items()))
        print("    ours:   " + ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in tracker["ours"].items()))
    zero = found["deepspeed"]
    if "not_run" in zero:
        print(f"  DeepSpeed's estimators: not run, {zero['not_run']}")
    else:
        for name, row in zero.items():
            print(
                f"  DeepSpeed's estimate of {name}, MB: {row['theirs'] / 1e6:,.1f}; ours by its definitions "
                f"{row['ours_by_their_definitions'] / 1e6:,.1f}, ours with float32 throughout and the teacher "
                f"{row['ours'] / 1e6:,.1f}"
            )
    step = found["step"]
    if "not_run" in step:
        print(f"  A real step on a GPU: not run, {step['not_run']}")
    else:
        print(f"  A real step on {step['gpu']}, MB: {step['measured'] / 1e6:,.1f}; ours {step['ours'] / 1e6:,.1f}")
