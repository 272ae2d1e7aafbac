"""Steps: gradient accumulation, clipping, float16 scaling, and ranks that agree."""

import pytest
import torch

from elsewhere.launch.build import build_method
from elsewhere.launch.config import load_config
from elsewhere.launch.engine.ddp import DdpEngine
from elsewhere.launch.engine.precision import LossScaler, choose_precision
from elsewhere.launch.monitor import NonFiniteLoss
from elsewhere.launch.optim import clip_gradients, make_optimizer
from elsewhere.launch.pretrain import pretrain
from elsewhere.launch.world import World


def run(settings):
    return pretrain(load_config("demo", settings))


def furthest(one, other):
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_micro_batches_give_the_losses_of_the_whole_batch(tiny, losses, tmp_path):
    run({**tiny, "run.dir": str(tmp_path / "whole")})
    run({**tiny, "run.dir": str(tmp_path / "parts"), "loader.micro_batch": 8})
    assert furthest(losses(tmp_path / "whole"), losses(tmp_path / "parts")) <= 1e-5


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(tiny, losses, start, tmp_path):
    """The first 50 steps at the same global batch, in float32."""
    settings = {**tiny, "optim.epochs": 2}
    run({**settings, "run.dir": str(tmp_path / "one")})
    process = start({**settings, "run.dir": str(tmp_path / "two")}, ranks=2)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    one, two = losses(tmp_path / "one")[:50], losses(tmp_path / "two")[:50]
    assert len(one) == 50
    assert furthest(one, two) <= 1e-5


@pytest.fixture
def engine(tiny):
    def build(scaler=None, **options):
        method = build_method(load_config("demo", tiny))
        optimizer = make_optimizer(method)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        return DdpEngine(method, optimizer, World(), scaler or LossScaler(False), **options)

    return build


def give_gradients(method, value):
    for parameter in method.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, value)


def weights(method):
    return torch.cat([p.detach().flatten() for p in method.parameters()])


def test_an_overflow_skips_the_step_and_halves_the_scale(engine):
    engine = engine(LossScaler(True, scale=1024.0))
    before = weights(engine.method)
    give_gradients(engine.method, 1.0)
    engine.method.encoder.norm.weight.grad[3] = float("inf")
    assert engine.step() is False
    assert torch.equal(weights(engine.method), before)
    assert (engine.scaler.value, engine.scaler.skipped) == (512.0, 1)


def test_scaled_gradients_step_like_unscaled_ones(engine):
    plain, scaled = engine(), engine(LossScaler(True, scale=1024.0))
    give_gradients(plain.method, 0.5)
    give_gradients(scaled.method, 512.0)
    assert plain.step() and scaled.step()
    assert torch.equal(weights(plain.method), weights(scaled.method))


def test_the_scale_doubles_after_enough_good_steps():
    scaler = LossScaler(True, scale=4.0, patience=3)
    for _ in range(2):
        scaler.update(False)
    scaler.update(True)
    assert scaler.value == 2.0
    for _ in range(3):
        scaler.update(False)
    assert scaler.value == 4.0


def test_the_smallest_scale_stops_the_run_with_advice():
    scaler = LossScaler(True, scale=2.0**-14)
    with pytest.raises(FloatingPointError, match=r"engine.precision=bfloat16"):
        scaler.update(True)


def test_a_scaler_is_taken_up_from_a_checkpoint():
    saved = LossScaler(True, scale=64.0)
    saved.update(True)
    taken = LossScaler(True)
    taken.load_state_dict(saved.state_dict())
    assert (taken.value, taken.skipped) == (32.0, 1)


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 5e-3), ("float16", 1e-3)])
def test_half_precision_trains_near_float32(precision, bound, tiny, losses, tmp_path):
    """The bounds are about three times what was seen over the first 20 steps: 1.4e-3 and 2.5e-4."""
    run({**tiny, "run.dir": str(tmp_path / "full")})
    run({**tiny, "run.dir": str(tmp_path / "half"), "engine.precision": precision})
    full, half = losses(tmp_path / "full")[:20], losses(tmp_path / "half")[:20]
    assert full != half, "half precision was not used"
    assert furthest(full, half) <= bound


def test_float16_on_a_cpu_says_that_it_is_slow():
    assert choose_precision("float16", torch.device("cpu")) == (
        torch.float16, "as configured; float16 on a CPU works but is slow"
    )  # fmt: skip


@pytest.mark.parametrize("scope", ["all", "encoder"])
def test_clipping_scales_the_gradients_of_its_scope_to_the_norm(scope, engine):
    method = engine().method
    give_gradients(method, 1.0)
    clip_gradients(method, 0.25, scope)
    clipped = method.encoder if scope == "encoder" else method
    norm = torch.cat([p.grad.flatten() for p in clipped.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(0.25, rel=1e-4)
    assert torch.all(method.predictor.proj.weight.grad == 1.0) == (scope == "encoder")


def test_a_loss_that_is_not_finite_names_rank_and_step_and_saves_nothing(tiny, tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"rank 0 at step \d+ is not finite"):
        run({**tiny, "optim.lr": 1e30, "optim.warmup_epochs": 0, "checkpoint.every_steps": 1})
    for path in (tmp_path / "run").glob("checkpoints/step-*/state.pt"):
        state = torch.load(path, weights_only=True)["engine"]["method"]
        assert all(tensor.isfinite().all() for tensor in state.values())
