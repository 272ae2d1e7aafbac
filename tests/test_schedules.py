"""Schedules against the released code's recorded values (case A6)."""

import numpy as np
import pytest

from elsewhere.launch.optim import Freeze, Schedules


def freeze(run, which):
    epoch = run.get(f"fix_{which}_thres", -1)
    return Freeze(epoch, run.get(f"fix_{which}_strategy", "const")) if epoch >= 0 else None


@pytest.mark.golden("A6_*")
def test_every_step_of_every_run(golden):
    for name, run in golden.config["runs"].items():
        schedules = Schedules(
            steps_per_epoch=run["ipe"], epochs=run["epochs"], warmup_epochs=run["warmup"], lr=run["lr"],
            start_lr=run["start_lr"], final_lr=run["final_lr"], weight_decay=run["wd"],
            final_weight_decay=run["final_wd"], stretch=run["ipe_scale"],
            freeze_lr=freeze(run, "lr"), freeze_weight_decay=freeze(run, "wd"),
        )  # fmt: skip
        for key, value in (
            ("lr", schedules.lr_at),
            ("wd", schedules.weight_decay_at),
            ("momentum", schedules.momentum_at),
        ):
            expected = golden.tensors[f"out.{name}.{key}"].numpy()
            found = np.array([value(step) for step in range(len(expected))])
            assert np.abs(found - expected).max() <= 1e-12, f"{name}: {key} at step {np.abs(found - expected).argmax()}"
