"""Looks made for a whole batch by torch, against those that Pillow makes image by image from the same numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from elsewhere.data import device_augment
from elsewhere.data.augment import Augment
from elsewhere.data.device_augment import finish

PHOTOS = load_sample_images().images
PLAIN = {"flip": 0.0, "blur": 0.0, "grayscale": 0.0, "colour_jitter_probability": 1.0}
EACH = {
    "flip": {"flip": 1.0},
    "grayscale": {"grayscale": 1.0},
    "blur": {"blur": 1.0},
    "wide blur": {"blur": 1.0, "blur_radius": (2.0, 8.0)},
    "colour jitter": {"colour_jitter": 0.5},
    "strong colour jitter": {"colour_jitter": 2.5},
}
ALL = {"flip": 0.5, "blur": 0.5, "grayscale": 0.3, "colour_jitter": 0.5, "colour_jitter_probability": 0.8}


@pytest.fixture(params=["chosen samples", "all samples"])
def way(request, monkeypatch):
    """Both ways of doing it: a CPU's, and a GPU's on the CPU."""
    if request.param == "all samples":
        monkeypatch.setattr(device_augment, "_can_choose", lambda tensor: False)


def pieces(count, channels=3, height=72, width=100):
    """Cut from photos; more than three channels are those of another place."""
    images = []
    for i in range(count):
        photo = PHOTOS[i % 2]
        stacked = np.concatenate([photo, np.roll(photo, 99, axis=1)], axis=2)
        top, left = 31 * i % (427 - height), 97 * i % (640 - width)
        images.append(np.ascontiguousarray(stacked[top : top + height, left : left + width, :channels]))
    return images


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def both(images, seed=0, **options):
    """What Pillow makes of whole images, what torch makes of them, and the images `[B, (V,) C, H, W]` themselves."""
    height, width, _ = images[0].shape
    aspect = (width / height, width / height)
    augment = Augment(size=(height, width), crop_scale=(1.0, 1.0), crop_aspect=aspect, **options)
    left = replace(augment, on_device=True)
    numbers = np.random.default_rng(seed).random((len(images), augment.views, 35))
    untouched = torch.stack([left(image, u) for image, u in zip(images, numbers, strict=True)])
    look = left.left_for_device(numbers)
    assert look is not None
    pillows = torch.stack([augment(image, u) for image, u in zip(images, numbers, strict=True)])
    return pillows, finish(untouched, look, augment), untouched


def assert_same(ours, pillows):
    assert ours.shape == pillows.shape and ours.dtype == torch.uint8
    difference = (ours.int() - pillows.int()).abs()
    # None on this machine; another compiler's Pillow, or a GPU's fused multiply-add, rounds a few halves the other way.
    assert difference.max() <= 2
    assert (difference > 0).double().mean() < 1e-3


@pytest.mark.parametrize("name", EACH)
def test_each_operation_gives_pillows_pixels(way, name):
    pillows, ours, untouched = both(pieces(12), **{**PLAIN, **EACH[name]})
    assert not torch.equal(pillows, untouched)
    assert_same(ours, pillows)


@pytest.mark.parametrize("name", ["flip", "grayscale"])
def test_flip_and_grayscale_are_exact(way, name):
    pillows, ours, _ = both([noise(200, 300)], **{**PLAIN, **EACH[name]})
    assert torch.equal(ours, pillows)


def test_every_colour_is_turned_as_pillow_turns_it(way):
    for seed in range(4):
        pillows, ours, _ = both([noise(200, 300), *pieces(1, height=200, width=300)], seed, **PLAIN, colour_jitter=0.5)
        assert_same(ours, pillows)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_all_together_give_pillows_pixels_of_any_channels(way, channels):
    pillows, ours, _ = both(pieces(24, channels), **ALL)
    assert_same(ours, pillows)


def test_views_have_their_own_numbers(way):
    pillows, ours, _ = both(pieces(4), views=3, **ALL)
    assert ours.shape == (4, 3, 3, 72, 100)
    assert_same(ours, pillows)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 3)])
def test_edges_are_replicated_in_images_smaller_than_the_blur(way, shape):
    pillows, ours, _ = both([noise(*shape)] * 8, flip=0.0, grayscale=0.0, blur=1.0, blur_radius=(1.0, 9.0))
    assert_same(ours, pillows)


def test_decisions_are_those_of_the_cpu(way):
    pillows, ours, untouched = both([noise(6, 6)] * 1000, flip=0.3, blur=0.0, grayscale=0.2)
    assert torch.equal(ours, pillows)
    share = (ours == untouched).flatten(1).all(dim=1).double().mean()
    assert abs(share - 0.7 * 0.8) < 4 * (0.56 * 0.44 / 1000) ** 0.5


@pytest.mark.parametrize("name", ["_AT_ONCE", "_AT_ONCE_CPU"])
def test_chunks_change_nothing(way, name, monkeypatch):
    _, whole, _ = both(pieces(7), **ALL)
    monkeypatch.setattr(device_augment, name, 2 * 3 * 72 * 100)
    assert torch.equal(both(pieces(7), **ALL)[1], whole)


def test_images_are_left_alone(way):
    images = torch.from_numpy(np.stack(pieces(6)).transpose(0, 3, 1, 2).copy())
    before = images.clone()
    finish(images, torch.rand(6, 1, 13, dtype=torch.float64), Augment(size=(72, 100), **ALL)).zero_()
    assert torch.equal(images, before)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_gpu_is_never_waited_for(channels, monkeypatch):
    """Fake tensors have no values: whatever would read one back, or make a shape of it, raises."""
    device_augment._hue_tables.cache_clear()
    try:
        with FakeTensorMode():
            images = torch.zeros(4, 2, channels, 20, 24, dtype=torch.uint8, device="cuda")
            look = torch.zeros(4, 2, 13, dtype=torch.float64, device="cuda")
            done = finish(images, look, Augment(size=(20, 24), **ALL))
            assert (done.shape, done.dtype, done.device) == (images.shape, torch.uint8, images.device)
            monkeypatch.setattr(device_augment, "_can_choose", lambda tensor: True)
            with pytest.raises(DynamicOutputShapeException):
                finish(images, look, Augment(size=(20, 24), **ALL))
    finally:
        device_augment._hue_tables.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_pillows_pixels_without_being_waited_for():
    images = torch.from_numpy(np.stack(pieces(24)).transpose(0, 3, 1, 2).copy())
    look = torch.rand(24, 1, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    augment = Augment(size=(72, 100), **ALL)
    on_gpu = images.cuda(), look.cuda()
    finish(*on_gpu, augment)  # copies the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = finish(*on_gpu, augment)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(done.cpu(), finish(images, look, augment))
