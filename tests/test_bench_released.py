"""The released formulation: its gradients are ours, checkpointing computes again, and what the command refuses."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from elsewhere.launch.bench_loops import fixed_batches, fresh_method
from elsewhere.launch.bench_released import RECIPES
from elsewhere.launch.cli import main
from elsewhere.launch.config import load_config
from elsewhere.launch.released_formulation import ReleasedAdpe, ReleasedStop
from elsewhere.launch.world import World
from elsewhere.models.vit import encoder_flops

SIZES = {"width": 24, "depth": 2, "heads": 3}
SMALL = [f"model.{key}={value}" for key, value in SIZES.items()] + ["engine.device=cpu", "engine.precision=float32"]
STOP = [*SMALL, "method.predictor.width=16", "method.predictor.depth=2", "method.predictor.heads=2"]
ADPE = [*SMALL, "method.decoder.width=16", "method.decoder.depth=2", "method.decoder.heads=2"]


def large(method):
    """`method` with weights large enough for each part to show, in float64."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return method.double()


def stop_case():
    config = load_config(RECIPES["stop"], STOP)
    method, batch = large(fresh_method(config, World())), fixed_batches(config, World(), 3, 1)[0]
    noise, _ = method.keyed_noise(batch)
    return method, batch, noise.double()


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-6, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("checkpointed", [False, True])
def test_stop_as_released_has_our_loss_and_gradients(checkpointed):
    method, batch, noise = stop_case()
    released = ReleasedStop(method, checkpointed).double()
    images = method.normalise(batch.images).double()
    predictions, wanted = method.predict(images, batch.context, batch.targets, noise)
    expected = torch.nn.functional.smooth_l1_loss(predictions, wanted)
    found = released(images, batch.context, batch.targets, noise)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    same_gradients(gradients(released), gradients(method))


def test_a_released_step_of_adpe_has_our_loss_and_gradients():
    config = load_config(RECIPES["adpe"], ADPE)
    method, batch = large(fresh_method(config, World())), fixed_batches(config, World(), 1, 1)[0]
    shifts = {name: torch.randn(shift.shape).double() * 0.4 for name, shift in method.attack_tensors().items()}
    released = ReleasedAdpe(method, shifts).double()
    images, visible = method.normalise(batch.images.flatten(0, 1)).double(), batch.visible.flatten(0, 1)
    shifts = {name: shift.requires_grad_() for name, shift in shifts.items()}
    expected = method.loss(images, *method.predict(images, visible, shifts))
    found = released(images, visible)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    attack = {f"shifts.{name}": shift.grad for name, shift in shifts.items()}
    same_gradients(gradients(released), {**gradients(method), **attack})


def test_a_checkpointed_step_computes_all_trained_blocks_again():
    method, batch, noise = stop_case()
    images, counted = method.normalise(batch.images).double(), []
    for checkpointed in (False, True):
        released = ReleasedStop(method, checkpointed).double()
        with FlopCounterMode(display=False) as counter:
            released(images, batch.context, batch.targets, noise).backward()
        counted.append(counter.get_total_flops())
    blocks = encoder_flops(method.encoder.size, batch.context.shape[2])
    blocks += 4 * encoder_flops(method.predictor.size, batch.context.shape[2] + batch.targets.shape[2])
    assert counted[1] - counted[0] == 3 * blocks  # images


def test_the_teacher_as_released_follows_as_ours():
    method, _, _ = stop_case()
    released = ReleasedStop(method, False).double()
    for module in (method, released):
        with torch.no_grad():
            module.encoder.norm.weight.mul_(2.0)
    released.follow(0.9)
    method.after_step(0.9)
    torch.testing.assert_close(released.teacher.state_dict(), method.teacher.state_dict())


def test_the_command_writes_forms_side_by_side(tmp_path, capsys):
    path = tmp_path / "released.json"
    options = ["--batch", "2", "--rounds", "1", "--json", str(path)]
    assert main(["bench", "released", "stop", *STOP, *options]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["form"] for row in rows] == ["ours", "released, checkpointed", "released"]
    assert all(row["losses_differ_by"] <= 1e-5 and row["seconds"] > 0 for row in rows) and rows[0]["ratio"] == 1.0
    assert "checkpointed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["dino"], "dino has no released formulation to compare with; choose among stop, adpe."),
        (["stop", "method.stop.where=both"], "The released StoP has noise on targets"),
        (["adpe", "model.relative.lookup=hard", "method.adversary.mode=none"], "The released AdPE that is compared"),
        (["stop", "engine.precision=bfloat16"], "The released formulation is compared in float32"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, says, capsys):
    assert main(["bench", "released", *arguments, *SMALL[:3]]) == 2
    assert capsys.readouterr().err.startswith(f"elsewhere: {says}")
