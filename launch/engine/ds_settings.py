"""DeepSpeed settings: a JSON file, checked against the recipe and completed from it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError

PACKAGED = Path(__file__).resolve().parents[2] / "ds_configs"

# What only says what is printed, logged or measured, or has no effect on the result.
_SERVED = {
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "timers", "comms_logger", "flops_profiler",
    "tensorboard", "wandb", "csv_monitor", "comet", "disable_python_gc", "disable_allgather", "checkpoint",
}  # fmt: skip
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_HALF = ("fp16", "bf16", "bfloat16", "amp", "torch_autocast")
_OURS = {
    "optimizer": "optim.kind and the rest of optim describe the optimiser",
    "scheduler": "optim.schedule and the rest of optim describe the schedules",
    "activation_checkpointing": "engine.activation_checkpointing chooses it",
    "compile": "engine.compile chooses it",
    "dataloader_drop_last": "data.remainder says what becomes of the last images",
    "managed_gradient_accumulation": "loader.micro_batch divides a step",
}
_CHANGES = {
    "communication_data_type": "fp32",
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "gradient_allreduce_op": "mean",
}
_FOREIGN = {
    "pipeline", "data_efficiency", "curriculum_learning", "compression_training", "tensor_parallel", "expert_parallel",
    "sequence_parallel_size", "seq_parallel_communication_data_type", "use_data_before_expert_parallelism",
    "hybrid_engine", "autotuning", "aio", "data_types", "weight_quantization", "quantize_training", "eigenvalue",
    "progressive_layer_drop", "sparse_attention", "sparse_gradients", "elasticity", "nebula", "datastates_ckpt",
    "graph_harvesting",
}  # fmt: skip
_ZERO = {
    "stage", "overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce", "allgather_partitions", "allgather_bucket_size", "load_from_fp32_weights",
    "offload_optimizer", "offload_param", "sub_group_size", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "ignore_unused_parameters",
    "parameter_alignment", "override_module_apply",
    "log_trace_cache_warnings", "enable_sanity_checks",
}  # fmt: skip
# The only value at which a ZeRO option leaves the result alone, or at which it was tried, and why.
_ZERO_AT = {
    "zero_quantized_weights": (False, "sends rounded weights, which changes the result"),
    "zero_quantized_nontrainable_weights": (False, "stores the teacher rounded, which then stands still"),
    "zero_quantized_gradients": (False, "sends rounded gradients, which changes the result"),
    "zero_hpz_partition_size": (1, "was not tried with a teacher"),
    # It adds the bias in place to a product that `selective` has kept, and again to the kept one in the backward.
    "memory_efficient_linear": (False, "gives wrong gradients under engine.activation_checkpointing=selective"),
    "compute_grad_norm": (True, "leaves no norm to clip by or to check"),
    "round_robin_gradients": (False, "misplaces which rank holds which weight in deepspeed 0.19.8"),
    "elastic_checkpoint": (False, "is for DeepSpeed's own checkpoints, in whose place ours are written"),
    "legacy_stage1": (False, "was not tried"),
    "zenflow": (None, "steps some weights later than others, which changes the result"),
    "pipeline_loading_checkpoint": (False, "is for DeepSpeed's own checkpoints, in whose place ours are written"),
}
_OFFLOAD_AT = {"ratio": (1.0, "leaves a part of the optimiser on the GPU"), "super_offload": (False, "was not tried")}
_OFFLOAD = {"device", "pin_memory", "pipeline_read", "pipeline_write", "fast_init", "buffer_count", "buffer_size",
            "max_in_cpu", "cpuadam_cores_perc", "nvme_path"}  # fmt: skip


def names() -> list[str]:
    """The packaged settings, e.g. `zero2`."""
    return sorted(path.stem for path in PACKAGED.glob("*.json"))


def load_settings(
    name_or_path: str,
    *,
    batch_size: int,
    micro_batch: int,
    accumulation: int,
    clip_grad: float,
    world: int,
    device_type: str = "cpu",
) -> dict[str, Any]:
    """A packaged setting, or the JSON file at a path, with all that `deepspeed.initialize` needs filled in.

    Batch sizes and clipping are the recipe's where they are missing or "auto". Raises UserError for a file that cannot
    be read, for what contradicts the recipe, and for what would change the result or was never tried.
    """
    path = find_settings(name_or_path)
    where = f"engine.deepspeed={name_or_path}"
    settings = _read(path)
    _check_names(settings, where)
    wanted = {
        "train_batch_size": (batch_size, f"optim.batch_size={batch_size}"),
        "train_micro_batch_size_per_gpu": (micro_batch, f"loader.micro_batch={micro_batch}"),
        "gradient_accumulation_steps": (
            accumulation, f"{accumulation} micro-batches a step (optim.batch_size={batch_size} over {world} processes)"
        ),
        "gradient_clipping": (clip_grad, f"optim.clip_grad={clip_grad:g}"),
    }  # fmt: skip
    for key, (value, recipe) in wanted.items():
        given = settings.get(key, "auto")
        if given != "auto" and (isinstance(given, bool) or given != value):
            raise UserError(f'{where} says {key}={_said(given)} and the recipe {recipe}: write "auto" in the file.')
        settings[key] = value
    settings["zero_optimization"] = _zero(settings.get("zero_optimization", {}), where, device_type)
    if settings.get("zero_allow_untested_optimizer", True) is not True:
        raise UserError(f"{where} says zero_allow_untested_optimizer=false, and the optimiser is ours: leave it out.")
    settings["zero_allow_untested_optimizer"] = True
    settings.setdefault("steps_per_print", 1_000_000_000)
    return settings | {"fp16": {"enabled": False}, "bf16": {"enabled": False}}


def stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage of loaded settings."""
    return settings["zero_optimization"]["stage"]


def offloads_optimizer(settings: dict[str, Any]) -> bool:
    """Whether loaded settings keep and step the optimiser's state in host memory."""
    return "offload_optimizer" in settings["zero_optimization"]


def check_recipe(
    settings: dict[str, Any], *, optimizer_kind: str, clip_grad: float, clip_scope: str, precision: str, compile: bool
) -> None:
    """Raise UserError where loaded settings cannot serve a recipe."""
    if stage(settings) == 0 and precision == "float16":
        raise UserError(
            "engine.deepspeed at ZeRO stage 0 has no place for the loss scale of engine.precision=float16: set "
            "engine.kind=ddp, which does the same, or engine.deepspeed=zero1."
        )
    if offloads_optimizer(settings) and optimizer_kind == "apex_adamw":
        raise UserError(
            "engine.deepspeed offloads the optimiser, which DeepSpeed's AdamW steps on the CPU: set optim.kind=adamw, "
            "or engine.deepspeed to a setting without offload."
        )
    if stage(settings) == 3 and compile:
        raise UserError(
            "engine.deepspeed at ZeRO stage 3 gathers every layer's weights on its own, which cuts a compiled block to "
            "pieces: set engine.compile=false, engine.deepspeed=zero2, or engine.kind=fsdp."
        )
    if stage(settings) > 0 and clip_grad > 0 and clip_scope == "encoder":
        raise UserError(
            "DeepSpeed clips all gradients together at ZeRO stages 1 to 3: set optim.clip_scope=all, or "
            "engine.kind=ddp or fsdp."
        )


def find_settings(name: str) -> Path:
    """The file of a packaged setting or at a path that ends in .json; raises UserError where there is none."""
    if not name.endswith(".json"):
        if name in names():
            return PACKAGED / f"{name}.json"
        near = difflib.get_close_matches(name, names(), 1, 0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"There is no DeepSpeed setting engine.deepspeed={name}; {hint}There are {', '.join(names())}, or name a "
            "file that ends in .json."
        )  # fmt: skip
    path = Path(name)
    if not path.is_file():
        known = f"; leave .json out for the packaged {path.stem}" if path.stem in names() else "; check the path"
        raise UserError(f"There is no file engine.deepspeed={name}{known}.")
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        settings = json.loads(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check engine.deepspeed.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, is not JSON: {error.msg}; correct it.") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}, is not text in UTF-8; save it as that.") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}, line 1, is not a JSON object; DeepSpeed's settings stand between {{ and }}.")
    _check_duplicates(path, text)
    return settings


def _check_duplicates(path: Path, text: str) -> None:
    """Of two values for a name JSON would take the last, silently; `text` is JSON."""
    open_objects: list[set[str]] = []
    for token in re.finditer(r'("(?:\\.|[^"\\])*")(\s*:)?|[{}]', text):
        if token[0] == "{":
            open_objects.append(set())
        elif token[0] == "}":
            open_objects.pop()
        elif token[2]:
            name = json.loads(token[1])
            if name in open_objects[-1]:
                line = text.count("\n", 0, token.start()) + 1
                raise UserError(f"{path}, line {line}, sets {name} a second time; take one of the two out.")
            open_objects[-1].add(name)


def _check_names(settings: dict[str, Any], where: str) -> None:
    """Refuse what is unknown, someone else's, or in our way; sections that are switched off leave `settings`."""
    for key, value in list(settings.items()):
        off = value is None or (isinstance(value, dict) and value.get("enabled") in (False, "auto"))
        if key in _HALF:
            if isinstance(value, dict) and value.get("enabled", False) in (False, "auto"):
                del settings[key]
                continue
            raise UserError(
                f"{where} switches {key} on; engine.precision chooses it, with float32 parameters under autocast: take "
                f"{key} out of the file."
            )
        if key in _OURS or key in _FOREIGN:
            if off:
                del settings[key]
                continue
            why = _OURS.get(key, "nothing here was made for it")
            raise UserError(f"{where} has {key}, and {why}: take it out of the file.")
        if key in _CHANGES:
            if value not in (_CHANGES[key], "auto", None) or isinstance(value, bool) != isinstance(_CHANGES[key], bool):
                raise UserError(
                    f"{where} says {key}={_said(value)}, which changes how gradients are summed: take it out."
                )
            del settings[key]
        elif key in _SERVED and value == "auto":
            del settings[key]
        elif key not in _SERVED and key not in _BATCH:
            known = (*_SERVED, *_BATCH, *_HALF, *_OURS, *_FOREIGN, *_CHANGES)
            raise UserError(f"{where} has {key}, which DeepSpeed does not know; {_meant(key, known)}")
    checkpoint = settings.get("checkpoint", {})
    extra = [name for name in _section(checkpoint, "checkpoint", where) if name != "tag_validation"]
    if any(checkpoint[name] for name in extra):
        raise UserError(
            f"{where} has checkpoint.{extra[0]}, and checkpoints are our own, which resume at any number of processes: "
            "take it out of the file."
        )


def _zero(section: Any, where: str, device_type: str) -> dict[str, Any]:
    """The checked section `zero_optimization`."""
    section = _section(section, "zero_optimization", where)
    number = section.get("stage", 0)
    if isinstance(number, bool) or number not in (0, 1, 2, 3):
        raise UserError(f"{where} says zero_optimization.stage={_said(number)}; choose 0, 1, 2 or 3.")
    zero = _at(section, _ZERO, _ZERO_AT, "zero_optimization", where) | {"stage": number}
    if number == 3:
        zero["memory_efficient_linear"] = False  # DeepSpeed's default is True; see above
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        offload = zero.pop(name, None)
        if offload is None:
            continue
        path = f"zero_optimization.{name}"
        offload = _at(_section(offload, path, where), _OFFLOAD, _OFFLOAD_AT, path, where)
        device = offload.get("device", "none")
        if device == "none":
            continue
        if device != "cpu":
            raise UserError(f"{where} offloads to {_said(device)}, which was never tried: set {path}.device to cpu.")
        if number < least:
            raise UserError(
                f"{where} has {path} at stage {number}, which needs stage {least}: raise it, or leave it out."
            )
        if offload.get("pin_memory") is True and device_type != "cuda":
            raise UserError(f"{where} pins host memory, which needs a GPU: take {path}.pin_memory out of the file.")
        zero[name] = {"pin_memory": device_type == "cuda"} | offload
    return zero


def _section(section: Any, path: str, where: str) -> dict[str, Any]:
    if not isinstance(section, dict):
        raise UserError(
            f"{where} says {path}={_said(section)}, which is a group of settings: write {{…}} in its place."
        )
    return section


def _at(
    section: dict[str, Any], known: set[str], only: dict[str, tuple[Any, str]], path: str, where: str
) -> dict[str, Any]:
    """What `section` sets of `known`; refuses other names, and those of `only` at other values than theirs."""
    for key, value in section.items():
        if key in only:
            if value not in (only[key][0], "auto", None):
                raise UserError(f"{where} has {path}.{key}, which {only[key][1]}: take it out of the file.")
        elif key not in known:
            raise UserError(f"{where} has {path}.{key}, which is not known here; {_meant(key, (*known, *only))}")
    return {key: value for key, value in section.items() if key in known and value != "auto"}


def _meant(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"did you mean {near[0]}?" if near else "take it out of the file."


def _said(value: Any) -> str:
    """A value as JSON writes it, cut short."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"
