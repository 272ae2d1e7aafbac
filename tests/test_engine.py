"""Steps: gradient accumulation, clipping, float16 scaling, and ranks that agree."""

import itertools
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

from elsewhere.launch import portable
from elsewhere.launch.build import build_method
from elsewhere.launch.checkpoint import Checkpoints, inspect
from elsewhere.launch.config import load_config
from elsewhere.launch.engine.ddp import DdpEngine
from elsewhere.launch.engine.precision import LossScaler, choose_precision
from elsewhere.launch.monitor import NonFiniteLoss
from elsewhere.launch.optim import clip_gradients, make_optimizer
from elsewhere.launch.pretrain import pretrain
from elsewhere.launch.world import World, join
from elsewhere.models.adversary import Adversary
from elsewhere.tests.host_waits import HostWaits


def run(settings):
    return pretrain(load_config("demo", settings))


def furthest(one, other):
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_micro_batches_give_the_losses_of_the_whole_batch(tiny, losses, tmp_path):
    run({**tiny, "run.dir": str(tmp_path / "whole")})
    run({**tiny, "run.dir": str(tmp_path / "parts"), "loader.micro_batch": 8})
    assert furthest(losses(tmp_path / "whole"), losses(tmp_path / "parts")) <= 1e-5


@pytest.mark.long
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


@pytest.mark.long
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
        torch.float16, "as configured; on a CPU it is slow, engine.precision=float32 is not"
    )  # fmt: skip


@pytest.mark.parametrize("scope", ["all", "encoder"])
def test_clipping_scales_the_gradients_of_its_scope_to_the_norm(scope, engine):
    method = engine().method
    give_gradients(method, 1.0)
    clip_gradients(dict(method.named_parameters()), 0.25, scope)
    clipped = method.encoder if scope == "encoder" else method
    norm = torch.cat([p.grad.flatten() for p in clipped.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(0.25, rel=1e-4)
    assert torch.all(method.predictor.proj.weight.grad == 1.0) == (scope == "encoder")


def test_a_loss_that_is_not_finite_names_rank_and_step_and_saves_nothing(tiny, tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"rank 0 at step \d+ is not finite"):
        run({**tiny, "optim.lr": 1e30, "optim.warmup_epochs": 0, "checkpoint.every_steps": 1})
    for path in (tmp_path / "run").glob("checkpoints/step-*"):
        state = inspect(path).tensors("method.")
        assert state and all(tensor.isfinite().all() for tensor in state.values())


class Toy(torch.nn.Module):
    """A method that one adversarial tensor moves and another scales, without normalisation over the batch."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, batch, adversary):
        moved = (batch + adversary["shift"].sum(0)) * (1 + adversary["factor"][0])
        return self.linear(moved).square().mean(), {}


class Watched(Adversary):
    """An adversary that remembers the gradients of its last step."""

    def step(self, lr):
        self.seen = [gradient.clone() for gradient in self.gradients()]
        super().step(lr)


def toy_engine(world=None, scaler=None, spread=0.0, **options):
    """An engine with an adversary whose first values `spread` makes differ from rank to rank."""
    world, method = world or World(), Toy()
    optimizer = make_optimizer(method)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    start = {"shift": torch.full((2, 3), 0.1 + spread * world.rank), "factor": torch.full((1, 3), 0.2)}
    adversary = Watched(start, norm="l2", epsilon=1.0)
    return DdpEngine(method, optimizer, world, scaler or LossScaler(False), adversary=adversary, **options)


def toy_batch(size=8):
    return torch.randn(size, 3, generator=torch.Generator().manual_seed(2))


def take_step(engine, micro_batches, adversary_lr=0.1):
    for micro, batch in enumerate(micro_batches):
        engine.forward_backward(batch, micro)
    return engine.step(adversary_lr)


def everything(engine):
    """Copies of all tensors that a step may move."""
    adversary = engine.adversary
    state = [engine.method.state_dict(), engine.optimizer.state_dict(), adversary.tensors]
    leaves = tree_leaves([*state, adversary.optimizer.state_dict()])
    return [leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def overflowing_step(world, where, rank):
    """A good float16 step, then one where one gradient of `rank` overflows; whether all stayed, and what is named."""
    engine = toy_engine(world, LossScaler(True, scale=1024.0))
    share = toy_batch().tensor_split(world.size)[world.rank]
    assert take_step(engine, [share])
    before = everything(engine)
    engine.forward_backward(share, 0)
    if world.rank == rank:
        leaf = engine.adversary.tensors["shift"] if where == "adversary" else engine.method.linear.weight
        leaf.grad[0, 1] = float("inf")
    applied = engine.step(0.1)
    stayed = all(torch.equal(a, b) for a, b in zip(before, everything(engine), strict=True))
    scaler = {"scale": engine.scaler.value, "skipped": engine.scaler.skipped}
    return {"applied": applied, "stayed": stayed, **scaler}, engine.overflow_in


def rank_main(path):
    """What each of several processes does for the tests below; the first saves what all found."""
    world = join("cpu")
    share = toy_batch().tensor_split(world.size)[world.rank]
    engine = toy_engine(world, spread=1.0)
    found = {"start": engine.adversary.tensors["shift"].detach().clone()}
    for accumulation in (1, 2):
        engine = toy_engine(world, accumulation=accumulation)
        with mock.patch("torch.distributed.all_reduce", wraps=torch.distributed.all_reduce) as exchange:
            take_step(engine, share.tensor_split(accumulation))
        found[f"gradients of {accumulation}"] = engine.adversary.seen
        found[f"tensors after {accumulation}"] = [t.detach() for t in engine.adversary.tensors.values()]
        found[f"exchanges of {accumulation}"] = exchange.call_count
    for where, rank in (("adversary", 1), ("method", 0)):
        found[f"overflow in {where}"] = overflowing_step(world, where, rank)
    found["pieces"] = [(name, list(piece.values.shape)) for name, piece in engine.pieces().items()]
    everyone = world.gather_host(found)
    if world.first:
        torch.save(everyone, path)
    world.close()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two processes found in `rank_main`, a dictionary each."""
    path = tmp_path_factory.mktemp("ranks") / "found.pt"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, __file__, str(path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=True)


@pytest.mark.long
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_average_the_adversarys_gradients_to_those_of_one(accumulation, two_ranks):
    whole = toy_engine()
    take_step(whole, [toy_batch()])
    for found in two_ranks:
        torch.testing.assert_close(found[f"gradients of {accumulation}"], whole.adversary.seen, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_adversary_stays_the_same_on_all_ranks(two_ranks):
    one, two = (found["tensors after 2"] for found in two_ranks)
    assert_same(one, two)


@pytest.mark.slow
def test_the_adversary_starts_from_the_first_ranks_values(two_ranks):
    for found in two_ranks:
        assert_same(found["start"], torch.full((2, 3), 0.1))


@pytest.mark.slow
def test_a_step_exchanges_the_adversarys_gradients_once(two_ranks):
    """However many tensors and micro-batches there are."""
    assert [found[f"exchanges of {a}"] for found in two_ranks for a in (1, 2)] == [1, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["adversary", "method"])
def test_an_overflow_on_one_rank_skips_method_and_adversary_on_both(where, two_ranks):
    expected = {"applied": False, "stayed": True, "scale": 512.0, "skipped": 1}
    assert [found[f"overflow in {where}"][0] for found in two_ranks] == [expected, expected]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["adversary", "method"])
def test_both_ranks_name_what_overflowed_on_one(where, two_ranks):
    assert [found[f"overflow in {where}"][1] for found in two_ranks] == [where, where]


@pytest.mark.slow
def test_each_tensor_is_written_whole_by_one_of_two_ranks(two_ranks):
    weights, adversary = {"linear.weight": [2, 3], "linear.bias": [2]}, {"shift": [2, 3], "factor": [1, 3]}
    expected = [(kind + name, shape) for kind in ("method.", "exp_avg.", "exp_avg_sq.")
                for name, shape in weights.items()]  # fmt: skip
    expected += [(f"adversary.{kind}{name}", shape) for kind in ("", "exp_avg.", "exp_avg_sq.")
                 for name, shape in adversary.items()]  # fmt: skip
    assert sorted(piece for found in two_ranks for piece in found["pieces"]) == sorted(expected)


@pytest.mark.slow
def test_both_of_two_ranks_write(two_ranks):
    assert all(found["pieces"] for found in two_ranks)


@pytest.mark.parametrize("where", ["adversary", "method"])
def test_an_overflow_anywhere_skips_method_and_adversary(where):
    expected = {"applied": False, "stayed": True, "scale": 512.0, "skipped": 1}
    assert overflowing_step(World(), where, 0)[0] == expected


@pytest.mark.parametrize("where", ["adversary", "method"])
def test_a_skipped_step_names_what_overflowed(where):
    assert overflowing_step(World(), where, 0)[1] == where


def test_micro_batches_give_the_adversary_the_gradient_of_the_whole_batch():
    whole, parts = toy_engine(), toy_engine(accumulation=2)
    take_step(whole, [toy_batch()])
    take_step(parts, toy_batch().tensor_split(2))
    torch.testing.assert_close(parts.adversary.seen, whole.adversary.seen, rtol=1e-5, atol=1e-6)


def test_the_adversarys_gradients_are_unscaled():
    plain, scaled = toy_engine(), toy_engine(scaler=LossScaler(True, scale=1024.0))
    for engine in (plain, scaled):
        take_step(engine, [toy_batch()])
    torch.testing.assert_close(scaled.adversary.seen, plain.adversary.seen, rtol=1e-5, atol=1e-6)


def test_the_adversarys_gradients_are_forgotten_after_a_step():
    engine = toy_engine()
    take_step(engine, [toy_batch()])
    assert not any(gradient.any() for gradient in engine.adversary.gradients())


def test_the_adversary_ascends_at_its_own_rate():
    engine = toy_engine()
    before = {name: tensor.detach().clone() for name, tensor in engine.adversary.tensors.items()}
    take_step(engine, [toy_batch()], adversary_lr=0.03)
    for name, tensor in engine.adversary.tensors.items():
        torch.testing.assert_close(tensor.detach() - before[name], 0.03 * engine.adversary.seen.pop(0).sign())


def test_clipping_leaves_the_adversary_alone():
    free, clipped = toy_engine(), toy_engine(clip_grad=1e-3)
    for engine in (free, clipped):
        take_step(engine, [toy_batch()])
    assert_same(clipped.adversary.seen, free.adversary.seen)


@pytest.mark.parametrize("float16", [False, True])
def test_the_host_waits_for_the_overflow_flag_of_float16_alone(float16):
    engine = toy_engine(scaler=LossScaler(float16), clip_grad=1.0)
    engine.forward_backward(toy_batch(), 0)
    with HostWaits() as waits:
        engine.step(0.1)
    assert waits.found == ["aten._local_scalar_dense.default"] * float16


@pytest.fixture
def hand_over(tmp_path):
    """Give one engine the state of another, through a checkpoint."""
    count = itertools.count(1)

    def hand(giver, taker):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(giver.pieces(), {"step": next(count), "engine": giver.facts()})
        checkpoints.finish()
        checkpoints.close()
        saved, _ = checkpoints.newest()
        taker.load(saved.fill, saved.about["engine"], portable.names(saved.path))

    return hand


def test_an_engine_with_an_adversary_continues_bitwise_from_its_state(hand_over):
    one, other = toy_engine(), toy_engine()
    take_step(one, [toy_batch()])
    hand_over(one, other)
    for engine in (one, other):
        take_step(engine, [toy_batch()])
    assert_same(everything(one), everything(other))


def test_an_engine_takes_up_scale_and_counts(hand_over):
    one, other = (toy_engine(scaler=LossScaler(True, scale=scale)) for scale in (1024.0, 64.0))
    take_step(one, [toy_batch()])
    give_gradients(one.method, float("inf"))
    one.step()
    hand_over(one, other)
    assert (other.scaler.value, other.scaler.skipped, other.applied) == (512.0, 1, 1)


def test_a_state_with_and_a_run_without_an_adversary_do_not_fit(hand_over):
    attacked, alone = toy_engine(), toy_engine()
    alone.adversary = None
    with pytest.raises(ValueError, match=r"holds an adversary and this run trains none: set method.adversary"):
        hand_over(attacked, alone)
    with pytest.raises(ValueError, match=r"holds no adversary and this run trains one: set method.adversary"):
        hand_over(alone, attacked)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"shift": (4, 3), "factor": (1, 3)}, r"adversary\.shift is \(2, 3\) there and \(4, 3\) here"),
        ({"shift": (2, 3), "factor": (1, 3), "more": (1, 2)}, r"it has no adversary\.more"),
        ({"shift": (2, 3)}, r"it holds adversary\.(exp_avg\.|exp_avg_sq\.)?factor, which this recipe has not"),
    ],
    ids=["another shape", "a tensor more", "a tensor less"],
)
def test_another_adversarys_state_is_refused_by_name_and_shape(tensors, message, hand_over):
    here = toy_engine()
    here.adversary = Adversary({name: torch.zeros(shape) for name, shape in tensors.items()}, norm="none", epsilon=None)
    with pytest.raises(ValueError, match=message):
        hand_over(toy_engine(), here)


if __name__ == "__main__":
    rank_main(sys.argv[1])
