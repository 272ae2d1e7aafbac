"""The adversary: ascent against a second implementation, its bounds row by row, its state, and its refusals."""

import copy
import math

import pytest
import torch

from elsewhere.models.adversary import Adversary, project_


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ascend(adversary, target, steps, lr=0.1):
    """Climb a hill with its top at `target`: −½ ‖p − target‖²."""
    for _ in range(steps):
        adversary.zero_grad()
        sum((-0.5 * (p - target).square()).sum() for p in adversary.tensors.values()).backward()
        adversary.step(lr)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_projection_leaves_zero_at_zero(norm):
    tensor = torch.zeros(3, 4)
    project_(tensor, norm, 0.5)
    assert torch.equal(tensor, torch.zeros(3, 4))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e15])
def test_projection_keeps_what_is_inside_and_shortens_what_is_outside(scale):
    before = scale * noise(5, 2, 3).double()
    tensor = before.float()
    project_(tensor, "l2", 0.5)
    lengths = before.flatten(1).norm(dim=1)
    expected = before * torch.minimum(torch.ones(5), 0.5 / lengths)[:, None, None]
    torch.testing.assert_close(tensor.double(), expected.float().double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("linf", math.inf)])
def test_bounds_hold_after_many_steps(norm, order):
    adversary = Adversary({"shift": noise(4, 3)}, norm=norm, epsilon=0.3)
    ascend(adversary, torch.full((4, 3), 5.0), 100)
    lengths = torch.linalg.vector_norm(adversary.tensors["shift"], order, dim=1)
    assert (lengths <= 0.3 * (1 + 1e-6)).all()


def test_an_unbounded_adversary_reaches_the_top_of_a_hill():
    target = noise(4, 3, seed=1)
    adversary = Adversary({"shift": torch.zeros(4, 3)}, norm="none", epsilon=None)
    ascend(adversary, target, 300, lr=0.05)
    assert (adversary.tensors["shift"] - target).abs().max() < 0.02


def test_a_clamped_adversary_finds_the_highest_point_of_its_box():
    """In a ball it would not: AdamW's steps are as long along every axis, which the projection does not undo."""
    target = torch.tensor([[3.0, -4.0, 0.2]])
    adversary = Adversary({"shift": torch.zeros(1, 3)}, norm="linf", epsilon=0.5)
    ascend(adversary, target, 300, lr=0.01)
    torch.testing.assert_close(adversary.tensors["shift"].detach(), torch.tensor([[0.5, -0.5, 0.2]]), rtol=0, atol=5e-3)


def adamw_ascent(value, gradients, rates, betas, eps, decay):
    """AdamW up the gradient in float64, as Loshchilov and Hutter write it with the sign turned."""
    value, first, second = value.double(), 0.0, 0.0
    for count, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        gradient = gradient.double()
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        up = (first / (1 - betas[0] ** count)) / ((second / (1 - betas[1] ** count)).sqrt() + eps)
        value = value - rate * decay * value + rate * up
    return value


def test_steps_are_adamw_up_the_gradient():
    start, gradients = noise(3, 4), [noise(3, 4, seed=s) for s in range(1, 9)]
    rates = [0.0, 0.1, 0.2, 0.3, 0.3, 0.2, 0.1, 0.05]
    adversary = Adversary({"δ": start}, norm="none", epsilon=None, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    for gradient, rate in zip(gradients, rates, strict=True):
        adversary.tensors["δ"].grad = gradient.clone()
        adversary.step(rate)
    expected = adamw_ascent(start, gradients, rates, (0.8, 0.9), 1e-3, 0.2)
    assert (adversary.tensors["δ"].detach().double() - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_at_rate_zero_nothing_moves_and_nothing_is_projected(norm):
    start = 10.0 * noise(3, 4)
    adversary = Adversary({"shift": start}, norm=norm, epsilon=0.1, weight_decay=0.5)
    ascend(adversary, 0.0, 1, lr=0.0)
    assert torch.equal(adversary.tensors["shift"], start)


def test_a_missing_gradient_counts_as_zero():
    """Absent and zero gradients leave the same tensors, moments in motion and weight decay included."""
    one, other = (Adversary({"δ": noise(2, 3)}, norm="l2", epsilon=2.0, weight_decay=0.1) for _ in range(2))
    for adversary in (one, other):
        ascend(adversary, 3.0, 2)
        adversary.zero_grad()
    other.tensors["δ"].grad = torch.zeros(2, 3)
    before = one.tensors["δ"].detach().clone()
    one.step(0.1)
    other.step(0.1)
    assert torch.equal(one.tensors["δ"], other.tensors["δ"])
    assert not torch.equal(one.tensors["δ"], before)


def test_missing_gradients_are_given_as_zeros():
    adversary = Adversary({"a": noise(2, 3), "b": noise(1, 4)}, norm="none", epsilon=None)
    adversary.tensors["b"].grad = torch.ones(1, 4)
    found = adversary.gradients()
    assert torch.equal(found[0], torch.zeros(2, 3)) and torch.equal(found[1], torch.ones(1, 4))


def test_rows_are_projected_independently():
    """A row far outside changes nothing of another row, in its tensor or beside it."""
    inside = torch.tensor([0.1, 0.2])
    tensors = {"a": torch.stack([inside, torch.tensor([30.0, 40.0])]), "b": torch.tensor([[50.0, 0.0]])}
    adversary = Adversary(tensors, norm="l2", epsilon=0.5)
    adversary.step(1.0)  # no gradient and no decay: the projection alone
    assert torch.equal(adversary.tensors["a"][0], inside)
    torch.testing.assert_close(adversary.tensors["a"][1].detach(), torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(adversary.tensors["b"].detach(), torch.tensor([[0.5, 0.0]]))


def test_tensors_are_float32_leaves_of_their_own():
    given = noise(2, 3).double()
    tensor = Adversary({"δ": given}, norm="none", epsilon=None).tensors["δ"]
    given.zero_()
    assert tensor.is_leaf and tensor.requires_grad and tensor.dtype == torch.float32 and tensor.any()


def test_a_saved_state_continues_bitwise():
    """Also where the tensors are named in another order."""
    tensors = {"encoder": noise(2, 3), "decoder": noise(2, 3, seed=1)}
    first = Adversary(tensors, norm="l2", epsilon=1.0, weight_decay=0.05)
    ascend(first, 2.0, 3)
    saved = copy.deepcopy(first.named_state())
    ascend(first, 2.0, 3)
    taken = Adversary(dict(reversed(tensors.items())), norm="l2", epsilon=1.0, weight_decay=0.05)
    taken.load_named_state(saved, 3)
    ascend(taken, 2.0, 3)
    for name in tensors:
        assert torch.equal(first.tensors[name], taken.tensors[name]), name


def test_moving_keeps_leaves_and_moments():
    """To the same device, where the continued ascent can be compared bit by bit."""
    moved, stayed = (Adversary({"δ": noise(2, 3)}, norm="l2", epsilon=1.0) for _ in range(2))
    for adversary in (moved, stayed):
        ascend(adversary, 2.0, 2)
    assert moved.to("cpu").tensors["δ"].is_leaf
    for adversary in (moved, stayed):
        ascend(adversary, 2.0, 2)
    assert torch.equal(moved.tensors["δ"], stayed.tensors["δ"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_on_a_gpu_do_not_wait_for_it():
    adversary = Adversary({"δ": noise(2, 3)}, norm="l2", epsilon=1.0).to("cuda")
    target = torch.full((), 2.0, device="cuda")
    ascend(adversary, target, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ascend(adversary, target, 2)
        adversary.norms()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert adversary.tensors["δ"].is_leaf and adversary.tensors["δ"].is_cuda


@pytest.mark.parametrize(("norm", "expected"), [("l2", (7.5, 10.0)), ("linf", (6.0, 8.0))])
def test_norms_are_the_mean_and_the_largest_over_rows(norm, expected):
    adversary = Adversary({"encoder": torch.tensor([[3.0, -4.0], [6.0, 8.0]])}, norm=norm, epsilon=1.0)
    norms = {name: value.item() for name, value in adversary.norms().items()}
    assert norms == {"encoder_norm": expected[0], "encoder_norm_max": expected[1]}


def test_moments_are_named_and_zero_before_the_first_step():
    state = Adversary({"δ": noise(2, 3)}, norm="none", epsilon=None).named_state()
    assert set(state) == {"δ", "exp_avg.δ", "exp_avg_sq.δ"}
    assert not state["exp_avg.δ"].any() and not state["exp_avg_sq.δ"].any()


@pytest.mark.parametrize(
    ("norm", "epsilon", "message"),
    [
        ("none", 0.5, r"epsilon=0.5 bounds nothing.*method.adversary.norm=l2 or linf"),
        ("l2", None, r"norm=l2 needs a bound; set method.adversary.epsilon"),
        ("linf", 0.0, r"epsilon=0 leaves the adversary no room; set it above 0"),
        ("l2", -1.0, r"epsilon=-1 leaves the adversary no room; set it above 0"),
        ("l2", math.nan, r"epsilon=nan leaves the adversary no room; set it above 0"),
        ("l1", 1.0, r"method.adversary.norm=l1 is not known; choose one of none, l2, linf"),
    ],
)
def test_norms_and_bounds_that_do_not_fit_are_refused(norm, epsilon, message):
    with pytest.raises(ValueError, match=message):
        Adversary({"δ": noise(2, 3)}, norm=norm, epsilon=epsilon)
