"""One fine-tuning for each value of a setting, and which was best."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config import Config
from ..engine.precision import LossScaleTooSmall
from ..errors import UserError
from ..monitor import NonFiniteLoss, say
from ..run import Result
from ..world import join
from .finetune import finetune


def sweep(given: str, configure: Callable[..., Config], flags: dict[str, Any]) -> Result:
    """Fine-tune for every value of `key=a,b,c`, each in a folder of its own below the run's, and compare.

    Values that are finished are not trained again, one that diverges counts as such; `sweep.json` in the run's folder
    has all figures. The result is the best one's, or the first's where nothing is measured. Raises UserError for what
    is no sweep.
    """
    key, _, values = given.partition("=")
    values = [value for value in values.split(",") if value]
    if len(values) < 2 or len(set(values)) < len(values):
        raise UserError(f"--sweep {given}: give two values or more, each once, e.g. optim.blr=1e-4,5e-4,1e-3.")
    folder = Path(str(configure().run.dir))
    configs = {value: configure(f"{key}={value}", f"run.dir={folder / f'{key}={value}'}") for value in values}
    section = configs[values[0]].engine
    world = join(section.device, section.kind != "ddp", 60 * section.wait_minutes, section.silence_seconds)
    console, found, results = Console(), {}, {}
    try:
        for value, config in configs.items():
            if world.first:
                say(console, f"--- {key}={value}")
            try:
                result = finetune(config, world=world, console=console, **flags)
            except (NonFiniteLoss, LossScaleTooSmall) as error:  # on all ranks
                found[value] = {"diverged": str(error)}
                if world.first:
                    say(console, str(error))
                continue
            if result.signal:
                return result
            results[value], found[value] = result, result.after or {}
        if not results:
            raise UserError(f"Every value of {key} diverged; try smaller ones.")
        measured = [value for value in results if "top1" in found[value]]
        best = max(measured, key=lambda value: found[value]["top1"]) if measured else None
        if world.first:
            _report(console, folder, key, found, best)
        return results[best or next(iter(results))]
    except BaseException as error:
        world.guard.failed(error)
        raise
    finally:
        world.close()


def _report(console: Console, folder: Path, key: str, found: dict[str, dict[str, Any]], best: str | None) -> None:
    say(console, f"{key:16} top-1 %   95 % interval")
    for value, figures in found.items():
        if "top1" in figures:
            low, high = figures["top1_interval"]
            text = f"{100 * figures['top1']:7.2f}   {100 * low:.2f} to {100 * high:.2f}"
        else:
            text = "diverged" if "diverged" in figures else "not measured"
        say(console, f"{value:16} {text}{'   best' if value == best and 'top1' in figures else ''}")
    aside = folder / "sweep.json.part"
    aside.write_text(json.dumps({"key": key, "best": best, "runs": found}, indent=1), encoding="utf-8")
    os.replace(aside, folder / "sweep.json")
    all_in = f"all figures are in {folder / 'sweep.json'}."
    if best is None:
        say(console, f"Nothing was measured, for no labelled images are held out; {all_in}")
    else:
        say(console, f"The best is {key}={best}, in {folder / f'{key}={best}'}; {all_in}")
