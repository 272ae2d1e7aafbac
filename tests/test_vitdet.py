"""The detector as a method: against torchvision's own Mask R-CNN around the same parts, and what a run asks of it."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from elsewhere.launch.engine.activation_checkpointing import checkpoint_activations
from elsewhere.models.relative import Relative
from elsewhere.models.vit import Encoder, Size
from elsewhere.models.vitdet import Detector, Heads, SimplePyramid

SMALL = {"width": 16, "hidden": 32, "anchors": 32, "regions": 32}


def detector(relative=None, drop_path=0.0, **heads):
    torch.manual_seed(0)
    encoder = Encoder((64, 64), 8, 3, Size(24, 4, 2), "learned", relative=relative, drop_path=drop_path)
    return Detector(encoder, 3, Heads(**SMALL | heads), window=3, spread=2)


def target(*boxes):
    masks = torch.zeros(len(boxes), 64, 64, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return {
        "boxes": torch.tensor(boxes).float().reshape(-1, 4),
        "labels": torch.arange(1, len(boxes) + 1),
        "masks": masks,
    }


def batch(*targets, step=7):
    count = len(targets)
    generator = torch.Generator().manual_seed(3)
    return SimpleNamespace(
        images=torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator), truth=list(targets),
        sample_ids=torch.arange(count), epochs=torch.zeros(count, dtype=torch.int64), step=step,
    )  # fmt: skip


SOME = (target((5, 6, 30, 40), (20, 20, 60, 50)), target((8, 30, 24, 44)))


def around(method):
    """torchvision's own model around the parts of a detector."""

    class Backbone(torch.nn.Module):
        out_channels = 16

        def forward(self, images):
            return method.features(images)

    model = MaskRCNN(Backbone(), num_classes=4)
    model.rpn, model.roi_heads = method.proposals, method.regions
    model.transform = GeneralizedRCNNTransform(64, 64, [0.0] * 3, [1.0] * 3, _skip_resize=True)
    return model


def test_losses_are_those_of_torchvision_around_the_same_parts():
    method, given = detector(), batch(*SOME)
    model = around(method).train()
    with method._drawn_for(given):
        expected = model(list(method.normalise(given.images)), [dict(one) for one in SOME])
    loss, scalars = method(given)
    assert set(scalars) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(scalars[name], value)
    torch.testing.assert_close(loss, sum(expected.values()))


def test_detections_are_those_of_torchvision_around_the_same_parts():
    method, given = detector(score=0.0), batch(*SOME)
    whole = torch.tensor([[64, 64], [64, 64]])
    with torch.no_grad():
        expected = around(method).eval()(list(method.normalise(given.images)))
        found = method(given.images, whole, whole, ask="predict")
    for one, other in zip(found, expected, strict=True):
        assert len(one["boxes"])
        torch.testing.assert_close(one["boxes"], other["boxes"])
        torch.testing.assert_close(one["scores"], other["scores"])
        assert torch.equal(one["masks"], other["masks"][:, 0] > 0.5)


def test_detections_are_in_pixels_of_the_image_itself():
    method, images, filled = detector(score=0.0), batch(SOME[0]).images, torch.tensor([[48, 64]])
    (placed,) = method.predict(images, filled, filled)
    (own,) = method.predict(images, filled, torch.tensor([[96, 192]]))
    torch.testing.assert_close(own["boxes"], placed["boxes"] * torch.tensor([3.0, 2, 3, 2]))
    assert own["masks"].shape[1:] == (96, 192)
    assert placed["boxes"][:, 3].max() <= 48  # nothing is found beside the image


@pytest.mark.parametrize("shapes", [[(64, 64)], [(16, 64)]], ids=["whole", "a quarter"])
def test_regions_are_pooled_alike_however_much_of_the_canvas_is_filled(shapes):
    method = detector()
    features = method.features(torch.randn(1, 3, 64, 64))
    boxes = [torch.tensor([[2.0, 2, 12, 14], [0, 0, 60, 16]])]
    found = detector().regions.box_roi_pool(features, boxes, shapes)
    # Levels by hand: both are smaller than the finest level's canonical size, and so are pooled from stride 2.
    from torchvision.ops import roi_align

    torch.testing.assert_close(found, roi_align(features["0"], boxes, (7, 7), 1 / 2, 2))


@pytest.mark.parametrize("cascade", [False, True], ids=["mask_rcnn", "cascade"])
@pytest.mark.parametrize("relative", [None, Relative()], ids=["absolute", "relative"])
def test_images_without_boxes_leave_no_weight_without_gradient(cascade, relative):
    method = detector(relative, cascade=cascade)
    method(batch(target(), target()))[0].backward()
    trained = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
    assert [name for name, gradient in trained.items() if gradient is None or not gradient.isfinite().all()] == []


def test_what_is_sampled_is_a_function_of_seed_step_and_samples():
    method = detector(regions=8, anchors=8)
    first = method(batch(*SOME))[0]
    torch.manual_seed(99)
    assert torch.equal(method(batch(*SOME))[0], first)
    assert not torch.equal(method(batch(*SOME, step=8))[0], first)


def test_the_generator_of_torch_is_left_as_it_was():
    method = detector()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    method(batch(*SOME))
    assert torch.equal(torch.rand(3), expected)


def test_drop_path_is_drawn_by_sample():
    method = detector(drop_path=0.5)
    first = method(batch(*SOME))[0]
    assert torch.equal(method(batch(*SOME))[0], first)
    assert not torch.equal(detector()(batch(*SOME))[0], first)


def test_in_bfloat16_boxes_stay_as_exact_as_pixels():
    exact, half = detector(score=0.0), detector(score=0.0)
    half.compute_dtype = torch.bfloat16
    images, whole = batch(SOME[0]).images, torch.tensor([[64, 64]])
    with torch.no_grad():
        features = half.features(half.normalise(images))
        assert all(one.dtype == torch.float32 for one in features.values())
        (found,), (expected,) = (one.predict(images, whole, whole) for one in (half, exact))
    assert found["boxes"].dtype == torch.float32
    # Predictors are close to zero at first, so that boxes are anchors, whose corners bfloat16 would round.
    nearest = torch.cdist(found["boxes"], expected["boxes"]).min(dim=1).values
    assert nearest.median() < 0.05


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_blocks_that_are_computed_again_give_the_same_gradients(policy):
    gradients = []
    for how in ("none", policy):
        method = detector(Relative(), drop_path=0.4)
        checkpoint_activations(method, how)
        method(batch(*SOME))[0].backward()
        gradients.append({name: p.grad for name, p in method.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


def test_a_level_of_the_pyramid_halves_the_one_before():
    maps = SimplePyramid(24, 16)(torch.randn(1, 24, 8, 8))
    assert [tuple(one.shape[1:]) for one in maps] == [(16, side, side) for side in (32, 16, 8, 4, 2)]


@pytest.mark.parametrize("cascade", [False, True])
def test_operations_are_counted_about_right(cascade):
    method, given = detector(cascade=cascade, proposals=(200, 200)), batch(SOME[0])
    with FlopCounterMode(display=False) as counter:
        method(given)[0].backward()
    # Regions are sampled: there may be fewer objects than there is room for.
    assert counter.get_total_flops() == pytest.approx(method.flops_per_image(), rel=0.25)


def test_an_encoder_with_a_class_token_is_refused():
    encoder = Encoder((64, 64), 8, 3, Size(24, 2, 2), class_token=True)
    with pytest.raises(ValueError, match=r"set model\.class_token=false"):
        Detector(encoder, 3, Heads(**SMALL))


def test_patches_that_give_no_stride_of_a_pyramid_are_refused():
    with pytest.raises(ValueError, match=r"not model\.patch_size=14"):
        Detector(Encoder((56, 56), 14, 3, Size(24, 2, 2)), 3, Heads(**SMALL))
