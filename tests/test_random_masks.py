"""Random masks: uniform over subsets, a function of the sample and its view, and refused where nothing is left."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import chi2, norm

from elsewhere.data import random_masks
from elsewhere.data.random_masks import RandomMasks
from elsewhere.data.streams import words

DRAWS = 24_000
CHANCE = 1e-4  # of any one statistical test failing on random numbers that are as they should be


def shown(visible: np.ndarray, patches: int) -> np.ndarray:
    """Patches `[..., K]` as float `[..., N]`, 1 where visible."""
    seen = np.zeros((*visible.shape[:-1], patches))
    np.put_along_axis(seen, visible, 1, axis=-1)
    return seen


def largest_deviation(counts: np.ndarray, rate: float, draws: int) -> float:
    """Of binomial counts, over the bound that one of them passes with probability `CHANCE` at most."""
    bound = norm.isf(CHANCE / (2 * counts.size)) * math.sqrt(draws * rate * (1 - rate))
    return np.abs(counts - draws * rate).max() / bound


@pytest.mark.parametrize(
    ("grid", "ratio", "keep"), [((7, 7), 0.75, 12), ((14, 14), 0.75, 49), ((8, 4), 0.5, 16), ((4, 4), 0.9, 1)]
)
def test_as_many_patches_are_visible_as_in_the_released_code(grid, ratio, keep):
    assert RandomMasks(grid, ratio).keep == keep == int(math.prod(grid) * (1 - ratio))


def test_rounding_costs_no_patch():
    assert RandomMasks((10, 10), 0.9).keep == 10


@pytest.mark.parametrize("views", [1, 3])
def test_visible_patches_are_ascending_and_on_the_grid(views):
    drawn = RandomMasks((5, 3), 0.6, views)(0, 0, 0, np.arange(200))
    assert drawn.visible.shape == (200, views, 6)
    assert drawn.visible.dtype == np.int64
    assert (np.diff(drawn.visible) > 0).all()
    assert drawn.visible.min() == 0
    assert drawn.visible.max() == 14


def test_there_is_no_context_and_no_target():
    drawn = RandomMasks((4, 4), 0.75)(0, 0, 0, np.arange(3))
    assert (drawn.context, drawn.targets, drawn.redraws) == (None, None, 0)


@pytest.mark.parametrize("view", [0, 1])
def test_every_patch_is_visible_equally_often(view):
    masks = RandomMasks((7, 7), 0.75, views=2)
    counts = shown(masks(1, 0, 0, np.arange(DRAWS)).visible[:, view], 49).sum(axis=0)
    rate = 12 / 49
    # A fixed number of visible patches ties the counts: covariance draws * rate * (1 - rate) * (49 I - 1 1ᵀ) / 48.
    statistic = 48 / 49 * ((counts - DRAWS * rate) ** 2).sum() / (DRAWS * rate * (1 - rate))
    assert chi2.ppf(CHANCE / 2, 48) < statistic < chi2.isf(CHANCE / 2, 48)


def test_every_pair_of_patches_is_visible_equally_often():
    seen = shown(RandomMasks((7, 7), 0.75)(2, 0, 0, np.arange(DRAWS)).visible[:, 0], 49)
    counts = (seen.T @ seen)[np.triu_indices(49, 1)]
    assert largest_deviation(counts, 12 / 49 * 11 / 48, DRAWS) < 1


def test_every_subset_is_drawn_equally_often():
    visible = RandomMasks((2, 3), 0.5)(3, 0, 0, np.arange(DRAWS)).visible[:, 0]
    subsets, counts = np.unique(visible, axis=0, return_counts=True)
    assert len(subsets) == math.comb(6, 3)
    statistic = ((counts - DRAWS / 20) ** 2).sum() / (DRAWS / 20)
    assert chi2.ppf(CHANCE / 2, 19) < statistic < chi2.isf(CHANCE / 2, 19)


@pytest.mark.parametrize(("one", "other"), itertools.combinations(range(3), 2))
def test_views_are_independent(one, other):
    seen = shown(RandomMasks((7, 7), 0.75, views=3)(4, 0, 0, np.arange(DRAWS)).visible, 49)
    assert largest_deviation(seen[:, one].T @ seen[:, other], (12 / 49) ** 2, DRAWS) < 1


@pytest.mark.parametrize("apart", [1, 4, 256])
def test_samples_are_independent(apart):
    seen = shown(RandomMasks((7, 7), 0.75)(5, 0, 0, np.arange(DRAWS + apart)).visible[:, 0], 49)
    assert largest_deviation(seen[apart:].T @ seen[:-apart], (12 / 49) ** 2, DRAWS) < 1


def test_the_smallest_random_numbers_are_visible_as_in_the_released_code():
    masks, ids = RandomMasks((3, 5), 0.6, views=3), np.array([9, 2**40, 0])
    visible = masks(6, 2, 0, ids).visible
    for image, view in np.ndindex(3, 3):
        noise = words(6, "visible", 2, ids[image : image + 1], 15, start=16 * view)[0]
        np.testing.assert_array_equal(visible[image, view], np.sort(np.argsort(noise)[:6]))


def test_equal_random_numbers_leave_the_first_patches_visible(monkeypatch):
    largest = np.full((2, 16), 2**32 - 1, dtype=np.uint32)
    monkeypatch.setattr(random_masks, "words", lambda *_: largest)
    assert RandomMasks((4, 4), 0.75)(0, 0, 0, np.arange(2)).visible.tolist() == [[[0, 1, 2, 3]], [[0, 1, 2, 3]]]


def test_masks_do_not_depend_on_the_rest_of_the_batch():
    masks, ids = RandomMasks((7, 7), 0.75, views=2), np.array([7, 123456789012, 0, 55, 54])
    together = masks(9, 4, 0, ids).visible
    for place in (3, 0, 4, 1, 2):
        np.testing.assert_array_equal(masks(9, 4, 0, ids[[place]]).visible[0], together[place])


def test_masks_do_not_depend_on_the_step():
    masks, ids = RandomMasks((7, 7), 0.75), np.arange(50)
    np.testing.assert_array_equal(masks(9, 4, 0, ids).visible, masks(9, 4, 31, ids).visible)


@pytest.mark.parametrize("fewer", [1, 2, 3])
def test_more_views_leave_the_first_ones_alone(fewer):
    ids = np.arange(50)
    some, all_ = (RandomMasks((7, 7), 0.75, views)(9, 4, 0, ids).visible for views in (fewer, 4))
    np.testing.assert_array_equal(some, all_[:, :fewer])


@pytest.mark.parametrize(("seed", "epoch", "first"), [(10, 4, 0), (9, 5, 0), (9, 4, 500)])
def test_masks_change_with_seed_epoch_and_sample(seed, epoch, first):
    masks, ids = RandomMasks((7, 7), 0.75), np.arange(500)
    same = (masks(9, 4, 0, ids).visible == masks(seed, epoch, 0, ids + first).visible).all(axis=-1)
    assert not same.any()  # 49 choose 12 is 9e10


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(ratio=0.99), r"mask\.ratio=0\.99 keeps none of the 16 patches; choose at most 0\.937\."),
        (dict(ratio=1.5), r"mask\.ratio=1\.5 keeps none of the 16"),
        (dict(ratio=math.inf), r"mask\.ratio=inf keeps none of the 16"),
        (dict(ratio=0.0), r"mask\.ratio=0\.0 masks none of the 16 patches; choose at least 0\.063\."),
        (dict(ratio=-0.5), r"mask\.ratio=-0\.5 masks none of the 16"),
        (dict(ratio=math.nan), r"mask\.ratio=nan masks none of the 16"),
        (dict(ratio=0.75, views=0), r"data\.views=0 leaves no crop"),
        (dict(ratio=0.75, grid=(1, 1)), r"grid of 1×1 patches cannot be parted.*choose a larger image"),
        (dict(ratio=0.75, grid=(0, 4)), r"grid of 0×4 patches cannot be parted"),
    ],
)
def test_impossible_settings_are_refused_with_advice(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        RandomMasks(**{"grid": (4, 4), **fields})


@pytest.mark.parametrize("grid", [(1, 2), (4, 4), (7, 7), (14, 14), (37, 37), (100, 100), (120, 123)])
@pytest.mark.parametrize(("wrong", "word"), [(1.0, "most"), (0.0, "least")])
def test_the_advised_ratio_is_accepted(grid, wrong, word):
    with pytest.raises(ValueError, match="choose at") as caught:
        RandomMasks(grid, wrong)
    RandomMasks(grid, float(str(caught.value).rstrip(".").split(f"choose at {word} ")[1]))
