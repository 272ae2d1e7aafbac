"""RandAugment, erasing, mixup and labels: timm's, but functions of the seed and of what a batch holds."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing

from elsewhere.data.augment import Augment
from elsewhere.data.batch import Batch
from elsewhere.data.label_mixing import LabelMixing, RandAugmented, seeded
from elsewhere.data.streams import uniforms, words

POLICY = "rand-m9-mstd0.5-inc1"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = {"size": 32, "flip": 0.0, "blur": 0.0, "grayscale": 0.0, "crop_scale": (0.5, 1.0)}


def photo() -> np.ndarray:
    rows, columns = np.mgrid[:48, :48]
    return np.stack([rows * 5, columns * 5, (rows + columns) * 2], axis=2).astype(np.uint8)


def batch_of(count: int, step: int = 3) -> Batch:
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(count) + 10
    return Batch(images, ids, ids % 4, torch.full_like(ids, 2), step)


def mixing(**given) -> LabelMixing:
    return LabelMixing(7, 4, 8, mean=MEAN, std=STD, **given)


def test_rand_augment_is_timm_s_on_our_crop():
    ours, crop = RandAugmented(policy=POLICY, **PLAIN), Augment(**PLAIN)
    epochs, ids = np.array([1]), np.array([5])
    found = ours(photo(), ours.numbers(0, epochs, ids)[0])
    view = crop(photo(), crop.numbers(0, epochs, ids)[0])
    theirs = rand_augment_transform(POLICY, {"translate_const": 14, "img_mean": (124, 116, 104)})
    with seeded(int(uniforms(0, "rand augment", epochs, ids, 1)[0, 0] * 2**32)):
        expected = theirs(Image.fromarray(view.permute(1, 2, 0).numpy()))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(expected))
    assert not torch.equal(found, view)


def test_rand_augment_is_a_function_of_seed_epoch_and_sample():
    augment = RandAugmented(policy=POLICY, **PLAIN)
    one = augment.numbers(0, np.array([1, 1]), np.array([5, 6]))
    again = augment.numbers(0, np.array([1]), np.array([6]))
    random.seed(99)
    torch.testing.assert_close(augment(photo(), one[1]), augment(photo(), again[0]), rtol=0, atol=0)
    later = augment.numbers(0, np.array([2]), np.array([6]))
    assert not torch.equal(augment(photo(), later[0]), augment(photo(), again[0]))


def test_generators_of_others_are_left_as_they_were():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    augment = RandAugmented(policy=POLICY, **PLAIN)
    augment(photo(), augment.numbers(0, np.array([0]), np.array([0]))[0])
    mixing(erase=1.0, mixup=0.8, cutmix=1.0)(batch_of(8))
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_erased_pixels_are_timm_s_of_the_normalised_image():
    batch = batch_of(8)
    found = mixing(erase=1.0)(batch).images
    mean, std = torch.tensor(MEAN).view(-1, 1, 1), torch.tensor(STD).view(-1, 1, 1)
    for i, image in enumerate(batch.images):
        expected = (image.float() / 255 - mean) / std
        with seeded(int(words(7, "erasing", 2, np.array([10 + i]), 1)[0, 0]), torch.device("cpu")):
            RandomErasing(1.0, mode="pixel", device="cpu")(expected)
        torch.testing.assert_close((found[i] / 255 - mean) / std, expected, rtol=0, atol=1e-5)
        assert not torch.allclose(found[i], image.float(), atol=0.1)


def test_an_erased_part_is_a_sample_s_own_whatever_its_neighbours():
    batch, erase = batch_of(8), mixing(erase=0.5)
    alone = Batch(batch.images[3:4], batch.sample_ids[3:4], batch.labels[3:4], batch.epochs[3:4], 3)
    torch.testing.assert_close(erase(alone).images[0], erase(batch).images[3], rtol=0, atol=0)


def test_mixed_images_and_labels_are_timm_s():
    batch, mix = batch_of(8), mixing(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    found = mix(batch)
    with seeded(int(words(7, "mixing", 3, np.array([10]), 1)[0, 0])):
        theirs = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=4)
        images, truth = theirs(batch.images.float(), batch.labels)
    torch.testing.assert_close(found.images, images, rtol=0, atol=0)
    torch.testing.assert_close(found.truth, truth, rtol=0, atol=0)
    torch.testing.assert_close(found.truth.sum(dim=1), torch.ones(8))
    assert not torch.equal(mix(batch_of(8, step=4)).truth, found.truth), "each step mixes otherwise"


def test_smoothed_labels_give_torch_s_smoothed_loss():
    batch, logits = batch_of(8), torch.randn(8, 4, dtype=torch.float64)
    truth = mixing(label_smoothing=0.1)(batch).truth.double()
    loss = torch.nn.functional.cross_entropy(logits, truth)
    expected = torch.nn.functional.cross_entropy(logits, batch.labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandAugmented(policy="rand-q9", **PLAIN), "rand_augment=rand-q9 is not a policy of timm"),
        (lambda: RandAugmented(policy="autoaugment", **PLAIN), "is not a policy of timm"),
        (lambda: RandAugmented(on_device=True, **PLAIN), "use loader.augment=workers"),
        (lambda: LabelMixing(0, 4, 3, mean=MEAN, std=STD, mixup=0.8), "a micro-batch of 3 is odd"),
    ],
)
def test_what_cannot_be_says_what_to_do(build, message):
    with pytest.raises(ValueError, match=message):
        build()
