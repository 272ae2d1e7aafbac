"""Composited scenes: masks and boxes are those of what is seen, and no cut-out is in both splits."""

import numpy as np

from elsewhere.tests.composites import BACKGROUND, UNLABELLED, compose, drawn_cutouts, held_out


def test_boxes_are_the_extents_of_visible_pixels_and_masks_agree():
    cutouts = drawn_cutouts("train")
    seen = 0
    for index in range(20):
        scene = compose(cutouts, index, (96, 128), most=3)
        taken = np.zeros(scene.mask.shape, dtype=int)
        for one in scene.instances:
            x0, y0, x1, y1 = one.box
            inside = np.zeros_like(one.mask)
            inside[y0:y1, x0:x1] = True
            assert not (one.mask & ~inside).any()
            assert one.mask[y0].any() and one.mask[y1 - 1].any() and one.mask[:, x0].any() and one.mask[:, x1 - 1].any()
            assert set(np.unique(scene.mask[one.mask])) <= {UNLABELLED, one.label + 2}
            taken += one.mask
            seen += 1
        assert taken.max() <= 1, "a pixel shows one object"
        assert BACKGROUND in scene.mask
    assert seen > 20


def test_a_scene_is_a_function_of_seed_and_index():
    cutouts = drawn_cutouts("train")
    first, again = compose(cutouts, 3), compose(cutouts, 3)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.image, compose(cutouts, 4).image)
    assert not np.array_equal(first.image, compose(cutouts, 3, seed=1).image)


def test_variants_of_a_cut_out_are_held_out_together():
    groups = (("lion", "lion-2"), ("sedan", "sedan_police", "sedan_police_mirror"), ("flower1", "flower9"))
    for group in groups:
        assert len({held_out(name) for name in group}) == 1
