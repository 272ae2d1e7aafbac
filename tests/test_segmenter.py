"""UperNet on our encoder: its head is transformers', its loss does not depend on how a batch is divided."""

import copy

import pytest
import torch
from torch.nn import functional as F

from elsewhere.data.batch import Batch
from elsewhere.launch.optim import Schedules
from elsewhere.models.batch_norm import SyncedBatchNorm
from elsewhere.models.relative import Relative
from elsewhere.models.segmenter import IGNORED, Segmenter, quarters
from elsewhere.models.upernet import Pyramid, UperHead, resized
from elsewhere.models.vit import Encoder, Size

TINY = Size(24, 4, 2)


def encoder(side=32, patch=4, relative=None, drop_path=0.0, class_token=True):
    torch.manual_seed(0)
    return Encoder((side, side), patch, 3, TINY, positions="learned", class_token=class_token, relative=relative,
                   drop_path=drop_path)  # fmt: skip


def batch(count=4, side=32, classes=5, ignored=0.2):
    torch.manual_seed(1)
    truth = torch.randint(0, classes, (count, side, side))
    truth[torch.rand(truth.shape) < ignored] = IGNORED
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    ids = torch.arange(count) + 7
    return Batch(images=images, sample_ids=ids, labels=-torch.ones_like(ids), epochs=torch.ones_like(ids), step=0,
                 truth=truth)  # fmt: skip


def part_of(whole, rows):
    return Batch(images=whole.images[rows], sample_ids=whole.sample_ids[rows], labels=whole.labels[rows],
                 epochs=whole.epochs[rows], step=0, truth=whole.truth[rows])  # fmt: skip


def theirs_of(head, width, channels):
    """transformers' UperNet head with the weights of ours."""
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetHead

    other = UperNetHead(UperNetConfig(hidden_size=channels, num_labels=3), [width] * 4).double().eval()
    pairs = [(head.pooled, other.bottleneck), (head.fused, other.fpn_bottleneck)]
    pairs += [(ours, block.layers[1]) for ours, block in zip(head.pools, other.psp_modules.blocks, strict=True)]
    pairs += zip(head.laterals, other.lateral_convs, strict=True)
    pairs += zip(head.smooths, other.fpn_convs, strict=True)
    for ours, conv in pairs:
        conv.conv.load_state_dict(ours[0].state_dict())
        conv.batch_norm.load_state_dict(ours[1].state_dict(), strict=False)
    return other


def test_the_head_is_that_of_transformers():
    torch.manual_seed(0)
    head = UperHead(24, 16, "batch").double().eval()
    for part in head.modules():
        if isinstance(part, SyncedBatchNorm):
            torch.nn.init.normal_(part.running_mean, std=0.1)
            torch.nn.init.uniform_(part.running_var, 0.5, 1.5)
            torch.nn.init.normal_(part.weight)
    maps = [torch.randn(2, 24, *size, dtype=torch.float64) for size in ((20, 28), (10, 14), (5, 7), (3, 4))]
    other = theirs_of(head, 24, 16)
    torch.testing.assert_close(F.conv2d(head(maps), other.classifier.weight, other.classifier.bias), other(maps))


def test_the_pyramid_has_four_scales_of_what_stands_where_it_stood():
    """An impulse in the grid stays in its own cell at every scale; of an odd grid nothing is lost."""
    pyramid = Pyramid(4, "group").double().eval()
    for layer in pyramid.modules():
        if isinstance(layer, torch.nn.ConvTranspose2d):
            torch.nn.init.constant_(layer.weight, 1.0)
            torch.nn.init.zeros_(layer.bias)
    pyramid.quadrupled[1] = torch.nn.Identity()
    grid = torch.zeros(1, 4, 5, 7, dtype=torch.float64)
    grid[:, :, 4, 6] = 1.0
    found = pyramid([grid] * 4)
    assert [tuple(one.shape[-2:]) for one in found] == [(20, 28), (10, 14), (5, 7), (3, 4)]
    for one, cells in zip(found, (4, 2, 1, 1), strict=True):
        there = one[0, 0].nonzero()
        assert len(there) == cells**2 and there.max(dim=0).values.tolist() == [one.shape[2] - 1, one.shape[3] - 1]


def test_depths_are_those_published():
    assert quarters(12) == [3, 5, 7, 11] and quarters(24) == [7, 11, 15, 23]
    assert quarters(32) == [7, 15, 23, 31] and quarters(4) == [0, 1, 2, 3] and quarters(2)[3] == 1


def test_the_pyramid_takes_the_outputs_of_its_blocks_without_the_prefix():
    ours = encoder()
    plain = copy.deepcopy(ours).double()
    model = Segmenter(ours, 5).double().eval()
    images = batch().images
    tokens = plain.with_prefix(plain.embed(model.normalise(images).double()))
    wanted = []
    for block in plain.blocks:
        tokens = block(tokens)
        wanted.append(tokens[:, 1:].transpose(1, 2).reshape(4, 24, 8, 8))
    model.normalise = lambda images: ((images.double() / 255) - model.mean) / model.std
    torch.testing.assert_close(model.maps(images), model.pyramid(wanted), rtol=1e-6, atol=1e-6)
    second = resized(model.auxiliary_classifier(model.auxiliary_head(wanted[2])).float(), (32, 32))
    torch.testing.assert_close(model.logits(images, batch())[1], second)


def test_the_loss_is_the_published_one():
    """mmsegmentation's: per pixel, zero where ignored, the mean over all pixels; the auxiliary head's counts 0.4."""
    model = Segmenter(encoder(), 5, dropout=0.0).eval()
    given = batch()
    main, second = model.logits(given.images, given)
    per_pixel = [F.cross_entropy(one, given.truth, ignore_index=IGNORED, reduction="none").mean()
                 for one in (main, second)]  # fmt: skip
    torch.testing.assert_close(model.objective(given)[0], per_pixel[0] + 0.4 * per_pixel[1])


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(drop_path):
    """Drawn paths and maps are keyed by sample, and ignored pixels do not change what the others weigh."""
    model = Segmenter(encoder(drop_path=drop_path), 5, norm="group").train()
    given = batch()
    given.truth[0] = IGNORED
    whole = model.objective(given)[0].double()
    halves = [model.objective(part_of(given, rows))[0].double() for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(whole, 0.25 * halves[0] + 0.75 * halves[1], rtol=1e-6, atol=1e-6)
    again = part_of(given, [2, 0, 3, 1])
    torch.testing.assert_close(whole, model.objective(again)[0].double(), rtol=1e-6, atol=1e-6)


def test_maps_are_dropped_in_training_alone():
    model, given = Segmenter(encoder(), 5, dropout=0.5), batch()
    assert model.train().objective(given)[0] != model.eval().objective(given)[0]
    assert torch.equal(model.train().predict(given.images), model.eval().predict(given.images))
    assert model.train().training


def test_images_without_a_labelled_pixel_are_a_loss_of_zero():
    model, given = Segmenter(encoder(), 5), batch()
    given.truth[:] = IGNORED
    loss, scalars = model.objective(given)
    loss.backward()
    assert loss == 0 and scalars["pixel_accuracy"] == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_every_parameter_that_trains_has_a_gradient():
    """Or ranks would wait for it: the encoder's last norm and blocks beyond the pyramid's last are left out."""
    model = Segmenter(encoder(), 5, blocks=[0, 1, 1, 2])
    model.objective(batch())[0].backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not any(p.requires_grad for p in model.encoder.blocks[3].parameters())


@pytest.mark.parametrize("lookup", ["hard", "interpolated"])
def test_relative_positions_work_on_32_by_32_patches(lookup):
    """Their tables, filled, change what is found; the shape is that of the image."""
    model = Segmenter(encoder(512, 16, Relative(lookup=lookup)), 3, channels=8, auxiliary=0).eval()
    image = torch.randint(0, 256, (1, 3, 512, 512), dtype=torch.uint8)
    before = model.predict(image)
    for block in model.encoder.blocks:
        torch.nn.init.normal_(block.attn.relative_k.table)
    after = model.predict(image)
    assert after.shape == (1, 3, 512, 512) and not torch.allclose(before, after)


@pytest.mark.parametrize("relative", [None, Relative(), Relative(lookup="interpolated")])
def test_a_window_as_large_as_the_grid_is_global_attention(relative):
    """And a smaller one is not; absolute and relative positions alike."""
    images = batch().images
    spec = {"relative": relative, "class_token": False}
    plain, whole, small = (Segmenter(encoder(**spec), 5, window=window, global_blocks=1) for window in (0, 8, 3))
    torch.nn.init.normal_(plain.classifier.weight)
    for block in plain.encoder.blocks:  # at first, attention is even and adds little
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)
        torch.nn.init.normal_(block.attn.proj.weight, std=0.5)
        if relative is not None:
            torch.nn.init.normal_(block.attn.relative_k.table)
    for other in (whole, small):
        other.load_state_dict(plain.state_dict())
    expected = plain.eval().logits(images)[0]
    torch.testing.assert_close(whole.eval().logits(images)[0], expected, rtol=0, atol=1e-4)
    assert not torch.allclose(small.eval().logits(images)[0], expected, atol=1e-2)


def test_windows_have_no_place_for_a_class_token():
    with pytest.raises(ValueError, match=r"set model\.class_token=false"):
        Segmenter(encoder(), 5, window=4)


def test_an_image_that_is_not_square_keeps_its_sides():
    ours = Encoder((32, 48), 4, 3, TINY, positions="learned")
    assert Segmenter(ours, 5).predict(torch.zeros(1, 3, 32, 48, dtype=torch.uint8)).shape == (1, 5, 32, 48)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"blocks": [0, 1, 2]}, "name four"), ({"blocks": [0, 1, 2, 4]}, "0 … 3"), ({"norm": "layer"}, "norm='layer'")],
)
def test_what_does_not_fit_is_said(given, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(encoder(), 5, **given)


def test_batch_norm_is_torch_s_with_gradients_and_running_statistics():
    torch.manual_seed(0)
    ours, theirs = SyncedBatchNorm(6).double(), torch.nn.BatchNorm2d(6).double()
    for one in (ours, theirs):
        torch.manual_seed(2)
        torch.nn.init.normal_(one.weight)
        torch.nn.init.normal_(one.bias)
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64) * 2 + 1
    weights = torch.randn_like(x)
    results = []
    for one in (ours, theirs):
        own = x.clone().requires_grad_()
        out = [one(own), one(own * 1.5)]
        ((out[0] + out[1]) * weights).sum().backward()
        results.append((*out, own.grad, one.weight.grad, one.bias.grad, one.running_mean, one.running_var,
                        one.eval()(x)))  # fmt: skip
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine.detach(), other.detach())


def test_resizing_keeps_what_has_the_size():
    maps = torch.randn(1, 2, 3, 4)
    assert resized(maps, (3, 4)) is maps


def test_poly_is_mmsegmentation_s_schedule():
    """Warm-up is a factor on the falling rate, from its first step on; without one it falls from the peak."""
    schedule = Schedules(
        steps_per_epoch=10, epochs=16, lr=2e-4, start_lr=2e-10, final_lr=0, warmup_epochs=1.5, weight_decay=0.05,
        final_weight_decay=0.05, first_counter=0, whole_steps=False, power=1.0,
    )  # fmt: skip
    for step in (0, 1, 7, 14, 15, 16, 80, 159):
        regular = (1 - step / 160) ** 1.0 * 2e-4
        wanted = regular * (1 - (1 - step / 15) * (1 - 1e-6)) if step < 15 else regular
        assert schedule.lr_at(step) == pytest.approx(wanted, rel=1e-12)
    assert schedule.weight_decay_at(80) == pytest.approx(0.05)
