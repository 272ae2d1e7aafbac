"""Our training steps against those of the released formulation, written plainly: same weights, masks and noise."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

from .errors import UserError
from .run_command import positive

RECIPES = {"stop": "published/stop_vit_b16", "adpe": "published/adpe_rpe_coord_vit_b16"}
_AGREE = 1e-5
_RATE, _MOMENTUM = 1e-4, 0.996  # of every step


def add_released_command(parts: Any) -> None:
    """Add `elsewhere bench released`."""
    text = "Our steps of StoP and AdPE against the released formulation written plainly, interleaved in one run."
    more = "Weights, masks and noise are the same, and the first losses must agree. Settings change the size of both."
    command = parts.add_parser("released", help=text, description=f"{text} {more}")
    command.add_argument(
        "cases",
        nargs="*",
        metavar="stop|adpe|key=value",
        help="what to compare (both), and settings, e.g. model.size=small",
    )
    command.add_argument("--batch", type=positive, default=8, help="images per step (8)")
    command.add_argument("--steps", type=positive, default=1, help="steps of one turn (1)")
    command.add_argument("--rounds", type=positive, default=5, help="turns of each (5)")


def run_released(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return what `bench_released` does."""
    names = [item for item in arguments.cases if "=" not in item] or list(RECIPES)
    overrides = [item for item in arguments.cases if "=" in item]
    result = bench_released(names, overrides, arguments.batch, arguments.steps, arguments.rounds)
    print_released_table(result)
    return result


def bench_released(
    names: Sequence[str] = tuple(RECIPES),
    overrides: Sequence[str] = (),
    batch: int = 8,
    steps: int = 1,
    rounds: int = 5,
) -> dict[str, Any]:
    """Time whole steps in float32 on `batch` source images, `steps` in a turn, ours and the released forms in turns.

    Returns machine, versions, date, load and `rows`: for each case and form the seconds of a step (medians, wall and
    processor), and how many times ours' they are (median of neighbouring turns). Raises UserError for a case or a
    setting that cannot be compared.
    """
    import torch

    from .monitor import hardware
    from .world import join

    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise UserError(f"{unknown[0]} has no released formulation to compare with; choose among {', '.join(RECIPES)}.")
    world = join("auto", group=False)
    rows = []
    load = os.getloadavg()[0]
    for name in names:
        rows += _compare(name, list(overrides), world, batch, steps, rounds)
    return {
        "hardware": hardware(world), "torch": torch.__version__, "python": platform.python_version(),
        "date": date.today().isoformat(), "load": load, "batch": batch, "steps": steps, "rounds": rounds,
        "overrides": list(overrides), "rows": rows,
    }  # fmt: skip


def _compare(name: str, overrides: list[str], world: Any, batch: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    import torch

    build = {"stop": _stop, "adpe": _adpe}[name]
    forms: dict[str, Callable[[], Any]] = build(overrides, world, batch)
    first = {form: float(step()) for form, step in forms.items()}  # which also pays for caches and states
    furthest = max(abs(loss - first["ours"]) for loss in first.values())
    assert furthest <= _AGREE, f"the losses of the first step differ: {first}"
    wall: dict[str, list[float]] = {form: [] for form in forms}
    worked: dict[str, list[float]] = {form: [] for form in forms}
    for number in range(rounds):
        for form in list(forms) if number % 2 else reversed(list(forms)):
            began, working = time.perf_counter(), time.process_time()
            for _ in range(steps):
                forms[form]()
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            wall[form].append((time.perf_counter() - began) / steps)
            worked[form].append((time.process_time() - working) / steps)
    return [
        {
            "case": name, "form": form, "seconds": statistics.median(wall[form]),
            "cpu_seconds": statistics.median(worked[form]), "ratio": _ratio(wall, form),
            "cpu_ratio": _ratio(worked, form), "ratio_least": _ratio(wall, form, min),
            "ratio_most": _ratio(wall, form, max), "losses_differ_by": furthest,
        }
        for form in forms
    ]  # fmt: skip


def _ratio(times: dict[str, list[float]], form: str, of: Callable[[list[float]], float] = statistics.median) -> float:
    return of([theirs / ours for theirs, ours in zip(times[form], times["ours"], strict=True)])


def _build(name: str, overrides: list[str], world: Any, batch: int):
    """Our engine, method and a batch for it, with `overrides` of the published recipe."""
    from .bench_loops import fixed_batches, fresh_method
    from .config import load_config
    from .engine.choose import build_engine

    config = load_config(RECIPES[name], ["engine.precision=float32", *overrides])
    if config.engine.kind != "ddp" or config.engine.precision != "float32":
        raise UserError("The released formulation is compared in float32 with engine.kind=ddp; leave both out.")
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"batch_size": batch})})
    method = fresh_method(config, world)
    engine = build_engine(config, method, world, batch, 1)
    _set_rate(engine.optimizer)
    return config, engine, method, fixed_batches(config, world, batch, 1)[0]


def _set_rate(optimizer: Any) -> Any:
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = _RATE, 0.05 if group.get("decayed", True) else 0.0
    return optimizer


def _ours(engine: Any, batch: Any) -> Callable[[], Any]:
    def step():
        loss, _ = engine.forward_backward(batch, 0)
        if engine.step(_RATE):
            engine.after_step(_MOMENTUM)
        return loss

    return step


def _stop(overrides: list[str], world: Any, batch: int) -> dict[str, Callable[[], Any]]:
    import torch

    from ..models.jepa import Jepa
    from .released_formulation import ReleasedStop

    config, engine, method, data = _build("stop", overrides, world, batch)
    plain = config.method.mask_token == "projection_bias" and config.mask.context_blocks == 1
    if not isinstance(method, Jepa) or not plain or config.method.stop.where != "targets":
        raise UserError("The released StoP has noise on targets, its projection's bias as mask token, and one context.")
    images, (noise, _) = method.normalise(data.images), method.keyed_noise(data)

    def released(checkpointed: bool) -> Callable[[], Any]:
        module = ReleasedStop(method, checkpointed).to(world.device)
        optimizer = _released_optimizer([p for p in module.parameters() if p.requires_grad])
        given = [noise]

        def step():
            loss = module(images, data.context, data.targets, given.pop() if given else None)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            module.follow(_MOMENTUM)
            return loss.detach()

        return step

    forms = {"released, checkpointed": released(True), "released": released(False)}
    torch.manual_seed(config.seed)
    return {"ours": _ours(engine, data), **forms}


def _released_optimizer(parameters: list[Any]) -> Any:
    """AdamW as torch chooses it: a loop over parameters on a CPU, multi-tensor on a GPU."""
    import torch

    decayed = [[p for p in parameters if (p.ndim > 1) == matrix] for matrix in (True, False)]
    groups = [{"params": those, "decayed": flag} for those, flag in zip(decayed, (True, False), strict=True)]
    return _set_rate(torch.optim.AdamW(groups))


def _adpe(overrides: list[str], world: Any, batch: int) -> dict[str, Callable[[], Any]]:
    import torch

    from ..models.mae import Mae
    from .released_formulation import ReleasedAdpe

    config, engine, method, data = _build("adpe", overrides, world, batch)
    relative, attack = config.model.relative, config.method.adversary.mode
    plain = (relative.terms, relative.lookup, relative.ratio, relative.shared) == ("k", "published", 1.9, True)
    if not isinstance(method, Mae) or not plain or attack != "coordinate":
        raise UserError("The released AdPE that is compared has the coordinate attack on one shared table of keys.")
    assert engine.adversary is not None and data.visible is not None
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():  # tables are zero at first, where no attack would act
        for name, parameter in method.named_parameters():
            if name.endswith("relative_k.table"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        for shift in engine.adversary.tensors.values():
            shift.copy_(0.3 * torch.randn(shift.shape, generator=generator))
    images, visible = method.normalise(data.images.flatten(0, 1)), data.visible.flatten(0, 1)
    module = ReleasedAdpe(method, engine.adversary.tensors).to(world.device)
    shifts = list(module.shifts.parameters())
    optimizer = _released_optimizer([p for p in module.parameters() if all(p is not shift for shift in shifts)])
    optimizer.add_param_group({"params": shifts, "lr": -_RATE, "weight_decay": 0.0})  # ascent, as released

    def step():
        loss = module(images, visible)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return {"ours": _ours(engine, data), "released": step}


def print_released_table(result: dict[str, Any]) -> None:
    """Print what `bench_released` returned, a line for each case and form."""
    print(f"{result['hardware']}, torch {result['torch']}, Python {result['python']}, {result['date']}, "
          f"load {result['load']:.1f}, batch {result['batch']} {' '.join(result['overrides'])}")  # fmt: skip
    print(f"{'case':5} {'form':23} {'s/step':>7} {'CPU s':>7} {'ratio':>6} {'least–most':>11} {'CPU ratio':>9}")
    for row in result["rows"]:
        spread = f"{row['ratio_least']:.2f}–{row['ratio_most']:.2f}"
        print(
            f"{row['case']:5} {row['form']:23} {row['seconds']:>7.3f} {row['cpu_seconds']:>7.3f} {row['ratio']:>6.2f} "
            f"{spread:>11} {row['cpu_ratio']:>9.2f}"
        )
