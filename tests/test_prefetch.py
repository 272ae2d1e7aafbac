"""Batches on their way to the device: what the loader left to be done is done, and nothing else changes."""

import pytest
import torch

from elsewhere.data.augment import Augment
from elsewhere.data.images import Digits
from elsewhere.data.loader import Loader
from elsewhere.data.order import Permutations, Plan
from elsewhere.data.prefetch import OnDevice
from elsewhere.data.random_masks import RandomMasks

CPU = torch.device("cpu")


def batches(views=1, workers=0, **settings):
    augment = Augment(size=8, views=views, **{"blur": 0.0, "grayscale": 0.0, **settings})
    plan = Plan(seed=3, global_batch=24, micro_batch=12, stop_step=3, workers=workers)
    reader = Loader(Digits(), augment, RandomMasks((4, 4), 0.75, views=views), Permutations(1000, 3), plan)
    return list(OnDevice(reader, augment, CPU))


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_flips_of_the_device_are_those_of_the_loader(views, workers):
    on_device, in_loader = batches(views, workers, on_device=True), batches(views, workers)
    assert len(on_device) == 6
    for one, other in zip(on_device, in_loader, strict=True):
        assert one.look is not None and other.look is None
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.visible, other.visible)


def test_nothing_is_left_to_do_where_nothing_changes():
    plain, same = batches(flip=0.0, on_device=True), batches(flip=0.0)
    assert all(batch.look is None for batch in plain)
    assert all(torch.equal(one.images, other.images) for one, other in zip(plain, same, strict=True))
