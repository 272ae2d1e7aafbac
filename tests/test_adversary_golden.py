"""The adversary and the groups beside it against the released AdPE optimiser's recorded steps (cases B5)."""

import pytest
import torch

from elsewhere.launch.optim import decays_in_adpe, make_optimizer, set_step
from elsewhere.models.adversary import Adversary

NORMS = {0: "none", 1: "l2", 2: "linf"}
ADVERSARIAL = ("adv_token", "rpe.adv_shift")


def schedules_and_rates(golden, mae_schedules_of):
    """The schedules of the method and, by recorded step, the rates of the adversary."""
    config = golden.config
    schedules = mae_schedules_of(config["args"], config["loader_len"])
    adversary = schedules.with_lr(config["args"]["adv_lr"], constant=config.get("fix_lr") == 1)
    return schedules, [adversary.lr_at(step) for step in range(config["steps"])]


def build_adversary(golden):
    """Each released tensor is bounded as a whole: one row of ours."""
    args = golden.config["args"]
    norm = NORMS[args["norm"]]
    return Adversary(
        {name: golden.tensors[f"state.{name}"].flatten()[None] for name in ADVERSARIAL},
        norm=norm, epsilon=None if norm == "none" else args["eps"], weight_decay=args["adv_wd"],
    )  # fmt: skip


@pytest.mark.golden("B5_opt_*")
def test_the_adversary_after_every_step(golden, close, mae_schedules_of):
    """Positive rates with `maximize` are the released negative rates and decays, from the first step, at rate 0, on."""
    adversary = build_adversary(golden)
    _, rates = schedules_and_rates(golden, mae_schedules_of)
    for step, rate in enumerate(rates):
        for name in ADVERSARIAL:
            adversary.tensors[name].grad = golden.tensors[f"in.grad{step}.{name}"].flatten()[None].clone()
        adversary.step(rate)
        for name in ADVERSARIAL:
            expected = golden.tensors[f"after{step}.{name}"].flatten()[None]
            close(adversary.tensors[name], expected, f"{name} after step {step}")


@pytest.mark.golden("B5_opt_*")
def test_the_other_groups_after_every_step(golden, close, mae_schedules_of):
    module = torch.nn.Module()
    frozen = {"pos_embed", "rpe.no_shift", *ADVERSARIAL}
    for name, value in golden.part("state").items():
        if name in frozen:
            continue
        owner = module
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(leaf, torch.nn.Parameter(value.clone()))
    optimizer = make_optimizer(module, betas=(0.9, 0.95), rule=decays_in_adpe)
    schedules, rates = schedules_and_rates(golden, mae_schedules_of)
    for step in range(len(rates)):
        set_step(optimizer, schedules, step)
        for name, parameter in module.named_parameters():
            parameter.grad = golden.tensors[f"in.grad{step}.{name}"].clone()
        optimizer.step()
        for name, parameter in module.named_parameters():
            close(parameter, golden.tensors[f"after{step}.{name}"], f"{name} after step {step}")
