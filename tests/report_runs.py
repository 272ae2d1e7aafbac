"""Runs that tests of reports read: two real ones, of seconds, and folders written by hand."""

import json
from pathlib import Path

import elsewhere

_SMALL = {
    "model.width": 24, "model.depth": 1, "model.heads": 2, "optim.batch_size": 16, "optim.steps": 12,
    "optim.warmup_epochs": 0, "data.path": "digits", "loader.workers": 0, "engine.device": "cpu",
    "monitor.log_every": 3, "monitor.pictures_every": 4, "monitor.collapse_every": 4, "probe.train_images": 60,
    "probe.val_images": 30, "probe.labels_per_class": 3, "probe.draws": 2,
}  # fmt: skip


def train_both(folder: Path) -> list[Path]:
    """StoP in float32 and AdPE in float16, clipped, of a few steps each."""
    stop = {"method.predictor.width": 16, "method.predictor.depth": 1, "method.predictor.heads": 2}
    adpe = {
        "method.decoder.width": 16, "method.decoder.depth": 1, "method.decoder.heads": 2, "engine.precision": "float16",
        "optim.clip_grad": 1.0, "monitor.adversary_every": 3,
    }  # fmt: skip
    runs = []
    for name, recipe, more in (("stop", "demo", stop), ("adpe", "demo_adpe", adpe)):
        elsewhere.pretrain(recipe, **{**_SMALL, **more, "run.dir": str(folder / name)})
        runs.append(folder / name)
    return runs


def write_run(folder: Path, rows: list[dict], end: str = "") -> Path:
    """A run of `rows` only, with `end` as a last line that is cut short."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + end, encoding="utf-8")
    return folder


def steps(first: int, last: int, **values) -> list[dict]:
    """Rows of steps `first` to `last - 1`; a value may be a function of the step."""
    return [
        {"step": step, "epoch": step / 10, **{k: v(step) if callable(v) else v for k, v in values.items()}}
        for step in range(first, last)
    ]
