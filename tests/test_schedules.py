"""Schedules against the released code's recorded values (cases A6 and B5)."""

import math

import numpy as np
import pytest
import torch

from elsewhere.launch.optim import decays_in_adpe, make_optimizer, scaled_lr


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


def assert_rates(found, expected, name):
    worst = np.abs(np.array(found) - expected.numpy()).max()
    assert worst <= 1e-12, f"{name}: off by {worst:.1e}"


@pytest.mark.golden("B5_lr_*")
def test_every_rate_of_mae(golden, mae_schedules_of):
    for name, run in golden.config["runs"].items():
        schedules = mae_schedules_of(run["args"], run["len"])
        expected = golden.tensors[f"out.finetune.{name}"]
        rates = [schedules.lr_at(step) for step in range(len(expected))]
        assert_rates(rates, expected[:, 0], name)
        assert_rates([0.25 * rate for rate in rates], expected[:, 1], f"{name} with the layer's scale")


@pytest.mark.golden("B5_lr_*")
@pytest.mark.parametrize("constant", [False, True])
def test_every_rate_of_the_adversary(constant, golden, mae_schedules_of):
    """The recorded rates are negative: the released code ascends by descending backwards."""
    for name, run in golden.config["runs"].items():
        schedules = mae_schedules_of(run["args"], run["len"]).with_lr(run["args"]["adv_lr"], constant)
        for scale in (None, 0.5):
            expected = golden.tensors[f"out.adv.{name}.fix{int(constant)}.scale{scale}"]
            rates = [-(scale or 1.0) * schedules.lr_at(step) for step in range(len(expected))]
            assert_rates(rates, expected[:, 1], f"{name}, scale {scale}")


@pytest.mark.golden("B5_lr_*")
def test_a_step_of_several_micro_batches_takes_the_rate_of_the_last(golden, mae_schedules_of):
    run = golden.config["runs"]["ft"]
    for accumulation in (2, 4):
        schedules = mae_schedules_of(run["args"], run["len"] // accumulation, accumulation)
        expected = golden.tensors["out.adv.ft.fix0.scaleNone"][accumulation - 1 :: accumulation, 0]
        assert_rates(
            [schedules.lr_at(step) for step in range(len(expected))], expected, f"{accumulation} micro-batches"
        )


def test_maes_warm_up_may_end_within_a_step(mae_schedules_of):
    args = {"lr": 1.0, "min_lr": 0.0, "warmup_epochs": 1.25, "epochs": 4}
    schedules = mae_schedules_of(args, 2)
    expected = [0.0, 0.4, 0.8, *[0.5 + 0.5 * math.cos(math.pi * (s / 2 - 1.25) / 2.75) for s in range(3, 8)]]
    assert_rates([schedules.lr_at(step) for step in range(8)], torch.tensor(expected, dtype=torch.float64), "fraction")


def test_equal_weight_decays_stay_constant(mae_schedules_of):
    schedules = mae_schedules_of({"lr": 1.0, "min_lr": 0.0, "warmup_epochs": 1, "epochs": 4, "weight_decay": 0.05}, 5)
    assert {schedules.weight_decay_at(step) for step in range(20)} == {0.05}


def test_the_learning_rate_scales_with_the_batch():
    assert scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3, rel=1e-12)


class Named(torch.nn.Module):
    """One parameter of every kind that the rules of weight decay tell apart."""

    def __init__(self):
        super().__init__()
        shapes = {"weight": (4, 3), "bias": (4,), "mask_token": (1, 1, 3), "scale": (3,), "table": (9, 3),
                  "rows_table": (2, 3, 7), "columns_table": (2, 3, 7)}  # fmt: skip
        self.part = torch.nn.ParameterDict({n: torch.nn.Parameter(torch.zeros(s)) for n, s in shapes.items()})


def decayed_names(optimizer, module):
    names = {id(parameter): name.removeprefix("part.") for name, parameter in module.named_parameters()}
    return {names[id(p)] for group in optimizer.param_groups if group["decayed"] for p in group["params"]}


def test_tokens_and_tables_do_not_decay_as_recommended():
    module = Named()
    assert decayed_names(make_optimizer(module), module) == {"weight"}


def test_tokens_and_tables_decay_as_released():
    module = Named()
    expected = {"weight", "mask_token", "table", "rows_table", "columns_table"}
    assert decayed_names(make_optimizer(module, rule=decays_in_adpe), module) == expected
