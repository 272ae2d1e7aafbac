"""The method: what each option of StoP does, pairing, keyed noise, teacher, precision, and its count of operations."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from elsewhere.data.batch import Batch
from elsewhere.kernels.stochastic_positions import position_noise
from elsewhere.launch.optim import make_optimizer
from elsewhere.models.jepa import Jepa, Predictor, Stop
from elsewhere.models.vit import Encoder, Size

GRID, CHANNELS = (4, 4), 3
ENCODER, PREDICTOR = Size(24, 2, 2), Size(16, 2, 2)


def make_predictor(stop=None, mask_token="learned", positions="sincos"):
    torch.manual_seed(1)
    built = Predictor(ENCODER.width, GRID, PREDICTOR, stop or Stop("none"), mask_token, positions)
    with torch.no_grad():  # large enough for each part to show in the output
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return built


def make_method(stop=None, mask_token="learned", positions="sincos", **options):
    torch.manual_seed(0)
    encoder = Encoder((8, 8), 2, CHANNELS, ENCODER)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return Jepa(encoder, make_predictor(stop, mask_token, positions), seed=3, **options)


def make_batch(images=4, contexts=1, blocks=3, epoch=2):
    rng = np.random.default_rng(0)
    patches = GRID[0] * GRID[1]

    def choose(count, size):
        return torch.from_numpy(
            np.stack([np.stack([rng.permutation(patches)[:size] for _ in range(images)]) for _ in range(count)])
        )

    return Batch(
        images=torch.from_numpy(rng.integers(0, 256, (images, CHANNELS, 8, 8), dtype=np.uint8)),
        sample_ids=torch.arange(images) * 1000 + 7, labels=torch.full((images,), -1),
        epochs=torch.full((images,), epoch), step=0,
        context=choose(contexts, 5), targets=choose(blocks, 3),
    )  # fmt: skip


def part_of(batch, rows):
    return Batch(
        batch.images[rows], batch.sample_ids[rows], batch.labels[rows], batch.epochs[rows], batch.step,
        batch.context[:, rows], batch.targets[:, rows],
    )  # fmt: skip


def gradients(method):
    return {name: p.grad for name, p in method.named_parameters() if p.requires_grad}


OPTIONS = list(
    itertools.product(("none", "targets", "context", "both"), ("tied", "fixed"), ("learned", "projection_bias", "none"))
)


@pytest.mark.parametrize("positions", ["sincos", "learned", "low_resolution"])
@pytest.mark.parametrize(("where", "covariance", "token"), OPTIONS)
def test_every_parameter_is_trained(where, covariance, token, positions):
    """DistributedDataParallel waits for ever for a gradient that never comes."""
    method = make_method(Stop(where, 0.25, covariance), token, positions)
    loss, _ = method(make_batch())
    loss.backward()
    assert [n for n, g in gradients(method).items() if g is None or not g.abs().sum() > 0] == []


@torch.no_grad()
def tokens_of(predictor, context, targets, noise=None, context_noise=None):
    """What enters the predictor's first block, where context tokens are zero: context `[R, Nc, D]`, targets."""
    seen = []
    hook = predictor.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens = torch.zeros(context.shape[0] * context.shape[1], context.shape[2], ENCODER.width)
    predictor(tokens, context, targets, noise, context_noise)
    hook.remove()
    return seen[0][:, : context.shape[2]], seen[0][:, context.shape[2] :]


def drawn_tokens(stop, images=4000):
    """The tokens of the same patches in many images, with the noise that `Jepa` draws for them."""
    method = make_method(stop)
    batch = Batch(
        torch.empty(images), torch.arange(images), torch.empty(images), torch.zeros(images, dtype=torch.int64), 0,
        torch.tensor([0, 5]).expand(1, images, 2), torch.tensor([3, 9]).expand(1, images, 2),
    )  # fmt: skip
    return method.predictor, tokens_of(method.predictor, batch.context, batch.targets, *method.keyed_noise(batch))


@pytest.mark.parametrize("where", ["none", "targets", "context", "both"])
def test_noise_is_where_it_is_asked_for(where):
    _, (context, targets) = drawn_tokens(Stop(where), images=2)
    moves = [not torch.equal(*tokens) for tokens in (context, targets)]
    assert moves == [where in ("context", "both"), where in ("targets", "both")]


@pytest.mark.parametrize("where", ["targets", "context"])
@pytest.mark.parametrize("covariance", ["tied", "fixed"])
def test_covariance_of_a_noised_position(covariance, where):
    """std² W Wᵀ, or std² I: an element of the covariance of n draws is known to sqrt(C_ii C_jj + C_ij²) / sqrt(n)."""
    predictor, tokens = drawn_tokens(Stop(where, 0.3, covariance))
    weight = predictor.embed.weight.detach().double()
    expected = 0.09 * (weight @ weight.T if covariance == "tied" else torch.eye(PREDICTOR.width).double())
    variance = expected.diagonal()
    for place in range(2):
        found = torch.cov(tokens[where == "targets"][:, place].double().T)
        error = ((variance[:, None] * variance + expected**2) / 4000).sqrt()
        assert ((found - expected).abs() < 5 * error).all(), f"patch {place}"


def test_mean_of_a_noised_position_is_its_place_in_the_table():
    predictor, (_, targets) = drawn_tokens(Stop("targets", 0.3))
    expected = (predictor.positions()[torch.tensor([3, 9])] + predictor.mask_token).detach()
    error = targets.std(dim=0) / 4000**0.5
    assert ((targets.mean(dim=0) - expected).abs() < 5 * error).all()


def test_patches_of_an_image_move_apart():
    _, (_, targets) = drawn_tokens(Stop("targets", 0.3))
    moved = targets - targets.mean(dim=0)
    assert (moved[:, 0] * moved[:, 1]).mean(dim=0).abs().max() < 5 * moved.var() / 4000**0.5


@pytest.mark.parametrize("token", ["learned", "projection_bias", "none"])
def test_a_target_token_holds_position_and_mask_token(token):
    predictor, batch = make_predictor(mask_token=token), make_batch()
    _, targets = tokens_of(predictor, batch.context, batch.targets)
    held = {"learned": predictor.mask_token, "projection_bias": predictor.embed.bias, "none": torch.zeros(16)}[token]
    expected = predictor.positions()[batch.targets.flatten(0, 1)] + held
    torch.testing.assert_close(targets, expected.detach())


def test_a_learned_token_alone_is_a_parameter():
    assert [make_predictor(mask_token=t).mask_token is None for t in ("learned", "projection_bias", "none")] == [
        False, True, True,
    ]  # fmt: skip


def test_low_resolution_shares_a_position_within_a_cell():
    predictor = make_predictor(positions="low_resolution")
    table = predictor.positions().reshape(2, 2, 2, 2, -1)  # row cell, row, column cell, column
    cells = table[:, 0, :, 0]
    assert (table == cells[:, None, :, None]).all(), "the patches of a 2×2 cell share a position"
    assert len(cells.flatten(0, 1).unique(dim=0)) == 4, "those of two cells do not"


def test_learned_positions_belong_to_the_predictor_alone():
    method = make_method(positions="learned")
    names = [name for name, _ in method.named_parameters() if "positions" in name]
    assert names == ["predictor.positions.table"]


@torch.no_grad()
def predictions(predictor, batch, noise=None):
    tokens = torch.randn(len(batch), 5, ENCODER.width, generator=torch.Generator().manual_seed(4))
    return predictor(tokens, batch.context, batch.targets, noise)


@pytest.mark.parametrize("covariance", ["tied", "fixed"])
def test_std_zero_is_no_noise(covariance):
    batch, predictor = make_batch(), make_predictor(Stop("targets", 0.0, covariance))
    noise, _ = make_method(predictor.stop).keyed_noise(batch)
    torch.testing.assert_close(predictions(predictor, batch, noise), predictions(make_predictor(), batch))


@torch.no_grad()
def test_without_noise_the_projection_bias_is_a_mask_token():
    """What links the released StoP to I-JEPA."""
    batch, released, learned = make_batch(), make_predictor(Stop(), "projection_bias"), make_predictor()
    learned.load_state_dict({**released.state_dict(), "mask_token": released.embed.bias})
    noise = torch.zeros(3, 4, 3, ENCODER.width)
    torch.testing.assert_close(predictions(released, batch, noise), predictions(learned, batch))


def slow_loss(method, batch):
    """Mean smooth L1 over (target, context, image), each image alone through encoder, predictor and teacher."""
    images, losses = method.normalise(batch.images), []
    for t, e, i in itertools.product(range(len(batch.targets)), range(len(batch.context)), range(len(batch))):
        image, context, target = images[i : i + 1], batch.context[e, i][None], batch.targets[t, i][None]
        features = method.teacher(image)[0, target[0]]
        wanted = (features - features.mean(1, keepdim=True)) / (features.var(1, False, keepdim=True) + 1e-5).sqrt()
        found = method.predictor(method.encoder(image, context), context[None], target[None])[0]
        losses.append(F.smooth_l1_loss(found, wanted))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("contexts", [1, 2, 3])
@torch.no_grad()
def test_paired_loss_equals_a_slow_loop(contexts):
    method, batch = make_method(), make_batch(contexts=contexts)
    torch.testing.assert_close(method(batch)[0], slow_loss(method, batch))


@pytest.mark.parametrize(("contexts", "images", "equal"), [(1, 4, True), (2, 1, True), (2, 4, False)], ids=str)
@torch.no_grad()
def test_published_pairing_differs_with_two_contexts_of_two_images(contexts, images, equal):
    batch = make_batch(images, contexts)
    paired, published = (make_method(pairing=pairing)(batch)[0] for pairing in ("paired", "published"))
    assert torch.allclose(paired, published, rtol=1e-4) is equal


def test_keyed_noise_of_a_row_is_that_of_its_sample_block_and_patches():
    method, batch = make_method(Stop("both"), kernels="reference"), make_batch(contexts=2)
    noise, context_noise = method.keyed_noise(batch)
    for t, e, i in itertools.product(range(3), range(2), range(4)):
        key = method.seed, batch.epochs[i : i + 1], batch.sample_ids[i : i + 1]
        alone = 0.25 * position_noise(*key, torch.tensor([t + 3 * e]), batch.targets[t, i][None], ENCODER.width)
        assert torch.equal(noise[t, 4 * e + i], alone[0]), f"target {t}, context {e}, image {i}"
        alone = 0.25 * position_noise(*key, torch.tensor([2**15 + e]), batch.context[e, i][None], ENCODER.width)
        assert torch.equal(context_noise[4 * e + i], alone[0]), f"context {e}, image {i}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("covariance", ["tied", "fixed"])
def test_noise_has_the_type_of_what_it_enters(covariance, dtype):
    """A projection's under autocast; a fixed covariance is added to the float32 table."""
    noise, context_noise = make_method(Stop("both", 0.25, covariance), compute_dtype=dtype).keyed_noise(make_batch())
    expected = dtype if covariance == "tied" else torch.float32
    assert (noise.dtype, context_noise.dtype) == (expected, expected)


def test_noise_is_another_in_another_epoch():
    method = make_method(Stop("targets"))
    first, second = (method.keyed_noise(make_batch(epoch=epoch))[0] for epoch in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize("where", ["none", "both"])
def test_micro_batches_make_no_difference(where, contexts):
    """Mean loss and gradients of the halves are those of the whole: each sample keeps its noise."""
    batch, whole, halves = make_batch(contexts=contexts), make_method(Stop(where)), make_method(Stop(where))
    loss, _ = whole(batch)
    loss.backward()
    losses = [halves(part_of(batch, rows))[0] / 2 for rows in (slice(0, 2), slice(2, 4))]
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(sum(losses), loss)
    torch.testing.assert_close(gradients(halves), gradients(whole))


def test_recomputed_activations_see_the_same_noise():
    """Bitwise, although the global generator moves on between the two forwards and is not kept."""
    batch, plain, recomputed = make_batch(), make_method(Stop("both")), make_method(Stop("both"))
    plain(batch)[0].backward()

    def forward(weight):
        torch.rand(1)
        return recomputed(batch)[0] + 0 * weight

    loss = checkpoint(forward, torch.zeros(1, requires_grad=True), use_reentrant=False, preserve_rng_state=False)
    torch.manual_seed(99)
    loss.backward()
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradient, gradients(recomputed)[name]), name


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.9999, 1.0])
def test_teacher_moves_by_the_formula(momentum):
    """One rounding of float32, 6e-8 of the larger term."""
    method = make_method()
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = [p.double() for p in method.teacher.parameters()]
    method.after_step(momentum)
    for old, new, student in zip(before, method.teacher.parameters(), method.encoder.parameters(), strict=True):
        expected = momentum * old + (1 - momentum) * student.double()
        torch.testing.assert_close(new.double(), expected, atol=3e-7, rtol=3e-7)


def test_teacher_starts_as_the_student():
    method = make_method()
    assert all(torch.equal(*pair) for pair in zip(method.teacher.parameters(), method.encoder.parameters()))  # noqa: B905


def test_teacher_is_not_trained():
    method = make_method()
    optimizer = make_optimizer(method)
    before = [p.clone() for p in method.teacher.parameters()]
    method(make_batch())[0].backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, method.teacher.parameters(), strict=True))
    assert not any(torch.equal(*pair) for pair in zip(before, method.encoder.parameters(), strict=True))


def test_a_small_move_of_the_teacher_is_not_rounded_away_in_half_precision():
    method = make_method(compute_dtype=torch.bfloat16)
    method(make_batch())[0].backward()
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in method.teacher.parameters()]
    method.after_step(0.9999)
    for old, new in zip(before, method.teacher.parameters(), strict=True):
        assert new.dtype == torch.float32
        torch.testing.assert_close(new - old, torch.full_like(old, 1e-4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_near_float32(dtype):
    """bfloat16 rounds to 2^-9, float16 to 2^-11: a few roundings of a loss, many of a gradient."""
    half, full = make_method(Stop("both"), compute_dtype=dtype), make_method(Stop("both"))
    losses = [method(make_batch())[0] for method in (half, full)]
    for loss in losses:
        loss.backward()
    assert losses[0].dtype == torch.float32
    assert abs(losses[0] / losses[1] - 1) < 0.02
    one, other = (torch.cat([g.flatten() for g in gradients(method).values()]) for method in (half, full))
    assert all(g.dtype == torch.float32 for g in gradients(half).values())
    assert F.cosine_similarity(one, other, dim=0) > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_computes_in_half(dtype):
    """Not merely accepted: the blocks of student, predictor and teacher work in it."""
    method, seen = make_method(compute_dtype=dtype), []
    for part in (method.encoder, method.predictor, method.teacher):
        part.blocks[0].mlp.fc1.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    method(make_batch())
    assert set(seen) == {dtype} and len(seen) == 3


def test_normalise():
    method = make_method(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    images = make_batch().images
    expected = (images.numpy() / 255.0 - np.array([0.1, 0.2, 0.3])[:, None, None]) / np.array([0.5, 0.6, 0.7])[
        :, None, None
    ]
    found = method.normalise(images)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_method_state_holds_no_constants():
    """Tables and pixel statistics follow from the configuration, and would hinder loading another one's weights."""
    names = make_method().state_dict()
    assert [name for name in names if "table" in name or name in ("mean", "std")] == []


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_teacher_features_are_those_of_its_last_layers(layers):
    method, batch = make_method(teacher_layers=layers), make_batch()
    images = method.normalise(batch.images)
    features = F.layer_norm(method.teacher(images, last=layers), (ENCODER.width,))
    expected = torch.stack([torch.stack([features[i, batch.targets[t, i]] for i in range(4)]) for t in range(3)])
    torch.testing.assert_close(method.predict(images, batch.context, batch.targets)[1], expected.flatten(0, 1))


@torch.no_grad()
def test_logged_target_std_is_that_of_the_features():
    method, batch = make_method(), make_batch()
    features = method.predict(method.normalise(batch.images), batch.context, batch.targets)[1].double()
    torch.testing.assert_close(method(batch)[1]["target_std"].double(), features.flatten(0, 1).std(dim=0).mean())


@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize("where", ["none", "targets", "both"])
def test_operations_are_counted(where, contexts):
    """4 %: torch skips the gradients of pixels and noise, which are counted as if they were taken."""
    torch.manual_seed(0)
    encoder = Encoder((32, 32), 4, CHANNELS, Size(48, 3, 3))
    method = Jepa(encoder, Predictor(48, encoder.grid, Size(24, 2, 3), Stop(where)))
    batch, rng = make_batch(2, contexts), np.random.default_rng(0)
    batch.images = torch.zeros(2, CHANNELS, 32, 32, dtype=torch.uint8)
    batch.context = torch.from_numpy(rng.integers(0, 64, (contexts, 2, 18)))
    batch.targets = torch.from_numpy(rng.integers(0, 64, (4, 2, 12)))
    for module in method.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # the fused backward recomputes, which is no work of the method's
    with FlopCounterMode(display=False) as counter:
        method(batch)[0].backward()
    counted = counter.get_total_flops() / 2
    assert abs(method.flops_per_image(contexts, 18, 4, 12) / counted - 1) < 0.04


def test_the_teacher_leaves_nothing_for_a_backward():
    method, batch, inside, kept = make_method(Stop()), make_batch(), [False], {True: 0, False: 0}
    method.teacher.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
    method.teacher.register_forward_hook(lambda *_: inside.__setitem__(0, False))

    def keep(tensor):
        kept[inside[0]] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        method(batch)
    assert kept[True] == 0 < kept[False]


@pytest.mark.parametrize("contexts", [1, 2])
def test_all_target_blocks_are_predicted_in_one_pass(contexts):
    method, calls = make_method(Stop()), []
    for block in (*method.predictor.blocks, *method.teacher.blocks, *method.encoder.blocks):
        block.register_forward_hook(lambda module, inputs, output: calls.append(module))
    method(make_batch(contexts=contexts))
    assert len(calls) == len(set(calls)) == 3 * 2


def test_the_context_is_copied_once_for_all_target_blocks():
    """Of the tensors as long as the predictor's input there is that input alone, and what comes after it."""

    class Made(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.repeat, torch.ops.aten.cat, torch.ops.aten.gather):
                self.names.append(func.overloadpacket)
            return out

    method, batch = make_method(Stop("none")), make_batch()
    with Made() as made:
        method.predict(torch.randn(4, CHANNELS, 8, 8), batch.context, batch.targets)
    assert made.names == [torch.ops.aten.cat]
