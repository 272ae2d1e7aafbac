import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from elsewhere.data.augment import (
    Augment,
    blur,
    colour_jitter,
    crop_box,
    evaluation_view,
    grayscale,
    resize,
)

PLAIN = {"flip": 0.0, "blur": 0.0, "grayscale": 0.0}


def photo(height=60, width=80, channels=3, seed=0):
    """Smooth with an edge: noise alone would hide a missing antialias behind its mean."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, channels), dtype=np.uint8)
    planes = [Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)]
    image = np.stack([np.asarray(plane) for plane in planes], axis=2).copy()
    image[height // 3 :: 5, width // 4 :: 3] = 255 - image[height // 3 :: 5, width // 4 :: 3]
    return image


def numbers(seed, views=1):
    """Random numbers of one image's views, `[V, 35]`."""
    return np.random.default_rng(seed).random((views, 35))


def planes(image):
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def difference(tensor, image):
    return int(np.abs(tensor.numpy().transpose(1, 2, 0).astype(int) - np.asarray(image).astype(int)).max())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(23, 31), (96, 70), (60, 80)])
def test_resize_gives_pillows_pixels(interpolation, size):
    image = photo()
    expected = Image.fromarray(image).resize(size[::-1], getattr(Image.Resampling, interpolation.upper()))
    assert difference(resize(image, size, interpolation), expected) <= 2


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_resize_treats_channels_alone(channels):
    image = photo(channels=channels)
    together = resize(image, (24, 20), "bicubic")
    for c in range(channels):
        alone = Image.fromarray(image[..., c]).resize((20, 24), Image.Resampling.BICUBIC)
        assert difference(together[c : c + 1], np.asarray(alone)[..., None]) <= 2


@pytest.mark.parametrize("radius", [0.1, 0.7, 2.0])
def test_blur_is_pillows_to_the_bit(radius):
    image = photo()
    assert difference(blur(planes(image), radius), Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius))) == 0


def test_grayscale_is_torchvisions_to_the_bit():
    transforms = pytest.importorskip("torchvision.transforms.functional")
    image = photo()
    expected = transforms.rgb_to_grayscale(Image.fromarray(image), num_output_channels=1)
    assert difference(grayscale(planes(image)), np.asarray(expected)[..., None]) == 0


def test_grayscale_of_five_channels_is_their_mean():
    image = photo(channels=5)
    assert difference(grayscale(planes(image)), np.rint(image.mean(axis=2, keepdims=True))) == 0


def test_colour_jitter_is_torchvisions_to_the_bit():
    transforms = pytest.importorskip("torchvision.transforms.functional")
    image = photo()
    change = {
        0: transforms.adjust_brightness,
        1: transforms.adjust_contrast,
        2: transforms.adjust_saturation,
        3: transforms.adjust_hue,
    }
    for factors, order in [((1.3, 0.6, 1.7, -0.11), (3, 0, 2, 1)), ((0.5, 1.4, 0.2, 0.19), (1, 3, 0, 2))]:
        expected = Image.fromarray(image)
        for what in order:
            expected = change[what](expected, factors[what])
        ours = colour_jitter(image, np.array(factors), np.array(order))
        assert np.array_equal(ours, np.asarray(expected))


@pytest.mark.parametrize("channels", [1, 5])
def test_neutral_jitter_changes_nothing_without_colours(channels):
    image = photo(channels=channels)
    assert np.array_equal(colour_jitter(image, np.array([1, 1, 1, 0]), np.arange(4)), image)


@pytest.mark.parametrize(("height", "width", "scale"), [(60, 80, (0.3, 1.0)), (50, 200, (0.5, 1.0))])
def test_crops_are_distributed_as_torchvisions(height, width, scale):
    transforms = pytest.importorskip("torchvision.transforms")
    count = 6000
    rng = np.random.default_rng(1)
    ours = np.array([crop_box(height, width, scale, (3 / 4, 4 / 3), rng.random(22)) for _ in range(count)], dtype=float)
    torch.manual_seed(1)
    blank = Image.new("L", (width, height))
    get = transforms.RandomResizedCrop.get_params
    theirs = np.array([get(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(count)], dtype=float)

    def moments(boxes):
        top, left, h, w = boxes.T
        return np.stack([top, left, h, w, h * w, (h * w) ** 2, np.log(w / h), np.log(w / h) ** 2, top * h, left * w])

    a, b = moments(ours), moments(theirs)
    error = np.sqrt((a.var(axis=1) + b.var(axis=1)) / count) + 1e-12
    assert np.all(np.abs(a.mean(axis=1) - b.mean(axis=1)) / error < 4.5)


def test_a_crop_that_never_fits_falls_back_to_the_centre():
    assert crop_box(10, 300, (1.0, 1.0), (3 / 4, 4 / 3), np.full(22, 0.5)) == (0, 143, 10, 13)
    assert crop_box(300, 9, (1.0, 1.0), (3 / 4, 4 / 3), np.full(22, 0.5)) == (144, 0, 12, 9)


def test_the_view_is_torchvisions_pipeline_on_the_same_crop():
    transforms = pytest.importorskip("torchvision.transforms.functional")
    image = photo()
    u = numbers(5)[0]
    top, left, h, w = crop_box(60, 80, (0.3, 1.0), (3 / 4, 4 / 3), u[:22])
    expected = transforms.resized_crop(Image.fromarray(image), top, left, h, w, [32, 48])
    expected = transforms.hflip(expected)
    expected = transforms.rgb_to_grayscale(expected, num_output_channels=3)
    expected = expected.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * float(u[34])))
    view = Augment(size=(32, 48), flip=1.0, grayscale=1.0, blur=1.0)(image, numbers(5))
    assert view.shape == (3, 32, 48)
    assert view.is_contiguous()
    assert difference(view, expected) <= 2


@pytest.mark.parametrize("switched", [{"flip": 1.0}, {"grayscale": 1.0}, {"blur": 1.0}, {"colour_jitter": 0.5}])
def test_switching_one_augmentation_leaves_the_others_alone(switched):
    image = photo()
    view = Augment(size=32, **PLAIN)(image, numbers(2))
    changed = Augment(size=32, colour_jitter_probability=1.0, **{**PLAIN, **switched})(image, numbers(2))
    assert not torch.equal(view, changed)
    if "flip" in switched:
        assert torch.equal(view.flip(2), changed)


def test_probabilities_are_kept():
    image = photo(16, 16)
    augment = Augment(size=16, crop_scale=(1.0, 1.0), crop_aspect=(1.0, 1.0), flip=0.3, blur=0.0, grayscale=0.2)
    views = [augment(image, u[None]) for u in numbers(3, 1500)]
    grey = np.mean([torch.equal(view[0], view[1]) and torch.equal(view[1], view[2]) for view in views])
    plain = planes(image)
    untouched = np.mean([torch.equal(view, plain) for view in views])
    assert abs(grey - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 1500)
    assert abs(untouched - 0.7 * 0.8) < 4 * math.sqrt(0.56 * 0.44 / 1500)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels_and_non_square(channels):
    augment = Augment(size=(8, 24), flip=1.0, blur=1.0, grayscale=1.0, colour_jitter=1.0)
    view = augment(photo(channels=channels), numbers(0))
    assert view.shape == (channels, 8, 24)
    assert view.dtype == torch.uint8
    assert all(torch.equal(view[0], plane) for plane in view)


def test_read_only_images_are_left_alone():
    image = photo()
    before = image.copy()
    image.setflags(write=False)
    Augment(size=image.shape[:2], crop_scale=(1.0, 1.0))(image, numbers(0)).zero_()
    assert np.array_equal(image, before)


ALL = {"size": 32, "flip": 0.5, "blur": 0.5, "grayscale": 0.5, "colour_jitter": 0.5}


def test_views_are_those_of_single_calls_on_their_numbers():
    image = photo()
    singles = [Augment(**ALL)(image, u[None]) for u in numbers(7, 4)]
    views = Augment(**ALL, views=4)(image, numbers(7, 4))
    assert torch.equal(views, torch.stack(singles))


def test_views_of_an_image_differ():
    views = Augment(**ALL, views=4)(photo(), Augment(**ALL, views=4).numbers(0, np.array([0]), np.array([5]))[0])
    assert views.flatten(1).unique(dim=0).shape[0] == 4


def test_a_single_view_has_no_dimension_of_views():
    assert Augment(**ALL, views=1)(photo(), numbers(7)).shape == (3, 32, 32)


def test_numbers_are_those_of_seed_epoch_and_sample_whatever_the_batch():
    augment, epochs, ids = Augment(**ALL, views=2), np.array([0, 0, 1, 3]), np.array([4, 9, 4, 2**40])
    drawn = augment.numbers(1, epochs, ids)
    assert drawn.shape == (4, 2, 35) and drawn.dtype == np.float64
    assert drawn.min() >= 0 and drawn.max() < 1
    back = augment.numbers(1, epochs[::-1], ids[::-1])[::-1]
    alone = np.concatenate([augment.numbers(1, epochs[i : i + 1], ids[i : i + 1]) for i in range(4)])
    assert np.array_equal(drawn, back) and np.array_equal(drawn, alone)


def test_numbers_differ_between_seeds_epochs_samples_views_and_places():
    augment = Augment(**ALL, views=2)
    drawn = [augment.numbers(seed, np.array([0, 0, 1]), np.array([4, 5, 4])) for seed in (1, 2)]
    assert len(np.unique(drawn)) == 2 * 3 * 2 * 35


def test_more_views_leave_the_numbers_of_the_first_ones():
    few, more = (Augment(**ALL, views=v).numbers(1, np.array([2, 3]), np.array([7, 8])) for v in (2, 5))
    assert np.array_equal(more[:, :2], few)


@pytest.mark.parametrize("views", [1, 3])
def test_on_device_leaves_everything_after_the_crop(views):
    image, u = photo(), numbers(7, views)
    crops = Augment(size=32, views=views, on_device=True)(image, u)
    assert torch.equal(crops, Augment(size=32, views=views, **PLAIN)(image, u))


def test_what_is_left_for_the_device_are_the_numbers_after_the_crops():
    drawn = np.random.default_rng(0).random((5, 2, 35))
    left = Augment(size=32, views=2, on_device=True).left_for_device(drawn)
    assert left is not None and left.dtype == torch.float64
    assert np.array_equal(left.numpy(), drawn[..., 22:])


@pytest.mark.parametrize(
    "options",
    [
        {"on_device": False},
        {"on_device": True, **PLAIN},
        {"on_device": True, **PLAIN, "colour_jitter": 0.5, "colour_jitter_probability": 0.0},
    ],
)
def test_nothing_is_left_for_the_device_where_nothing_is_to_do(options):
    assert Augment(size=32, **options).left_for_device(np.zeros((5, 1, 35))) is None


@pytest.mark.parametrize("switched", [{"flip": 0.1}, {"grayscale": 0.1}, {"blur": 0.1}, {"colour_jitter": 0.1}])
def test_each_augmentation_is_left_for_the_device(switched):
    augment = Augment(size=32, on_device=True, **{**PLAIN, **switched})
    assert augment.left_for_device(np.zeros((5, 1, 35))) is not None


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (230, 230)])
def test_evaluation_view_is_torchvisions_resize_and_centre_crop(shape):
    transforms = pytest.importorskip("torchvision.transforms.functional")
    image = photo(*shape)
    expected = transforms.center_crop(transforms.resize(Image.fromarray(image), [256]), [224])
    assert difference(evaluation_view(image, 224, "bilinear"), expected) <= 2


def test_evaluation_view_gives_an_image_of_the_wanted_size_unchanged():
    image = photo(8, 8, 1)
    assert difference(evaluation_view(image, 8), image) == 0


def test_evaluation_view_shows_a_small_image_whole():
    image = photo(8, 8, 1)
    expected = Image.fromarray(image[..., 0]).resize((16, 16), Image.Resampling.BILINEAR)
    assert difference(evaluation_view(image, 16, "bilinear"), np.asarray(expected)[..., None]) <= 2


@pytest.mark.parametrize("shape", [(5, 90), (90, 5), (40, 41)])
def test_evaluation_view_covers_non_square_sizes(shape):
    assert evaluation_view(photo(*shape), (16, 40)).shape == (3, 16, 40)


@pytest.mark.parametrize(
    "wrong",
    [
        {"interpolation": "lanczos"},
        {"flip": 1.5},
        {"crop_scale": (0.0, 1.0)},
        {"crop_aspect": (2, 1)},
        {"size": 0},
        {"blur_radius": (2, 1)},
        {"colour_jitter": -1},
        {"views": 0},
    ],
)
def test_values_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augment(**{"size": 8, **wrong})
