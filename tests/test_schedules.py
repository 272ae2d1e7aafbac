"""Schedules against the released code's recorded values (case A6)."""

import numpy as np
import pytest


@pytest.mark.golden("A6_*")
def test_every_step_of_every_run(golden, schedules_of):
    for name, run in golden.config["runs"].items():
        schedules = schedules_of(run)
        for key, value in (
            ("lr", schedules.lr_at),
            ("wd", schedules.weight_decay_at),
            ("momentum", schedules.momentum_at),
        ):
            expected = golden.tensors[f"out.{name}.{key}"].numpy()
            found = np.array([value(step) for step in range(len(expected))])
            assert np.abs(found - expected).max() <= 1e-12, f"{name}: {key} at step {np.abs(found - expected).argmax()}"
