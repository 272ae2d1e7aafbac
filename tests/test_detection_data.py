"""Images, boxes and masks placed on a canvas together."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from elsewhere.data.coco import CocoImages
from elsewhere.data.detection import (
    DetectionBatches,
    Placement,
    WholeImages,
    boxes_of,
    fitted,
    jittered,
    place_boxes,
    place_image,
    place_mask,
    stack_whole,
)  # fmt: skip
from elsewhere.data.order import Request

CANVAS = (96, 96)
POLYGON = [[30.0, 20, 110, 30, 90, 100, 40, 90]]
PLACEMENTS = [
    Placement((120, 150)), Placement((60, 75)), Placement((60, 75), mirrored=True), Placement((240, 300), (50, 90)),
    Placement((240, 300), (100, 20), True), Placement((96, 120), (0, 24)),
]  # fmt: skip


def white_on_black(polygon=POLYGON, fine=8):
    """The polygon as pixels that it fills more or less; Pillow draws through the centres of pixels."""
    picture = Image.new("L", (150 * fine, 120 * fine))
    ImageDraw.Draw(picture).polygon([fine * number - 0.5 for number in polygon[0]], fill=255)
    return np.array(picture.reduce(fine))


def run_lengths(mask):
    flat = mask.T.ravel() > 127
    changes = np.flatnonzero(np.diff(flat, prepend=False)).tolist()
    return {"size": list(mask.shape), "counts": np.diff([0, *changes, mask.size]).tolist()}


def overlap(one, other):
    return (one & other).sum() / (one | other).sum()


@pytest.mark.parametrize("where", PLACEMENTS)
@pytest.mark.parametrize("kind", ["polygon", "run lengths"])
def test_a_mask_lies_where_its_pixels_do(where, kind):
    image = white_on_black()
    placed = place_image(image[..., None], where, CANVAS, torch.zeros(1, dtype=torch.uint8), "bilinear")[0].numpy()
    mask = place_mask(POLYGON if kind == "polygon" else run_lengths(image), image.shape, where, CANVAS)
    assert mask.shape == CANVAS and mask.max() == 1
    assert overlap(mask == 1, placed > 127) > 0.94


@pytest.mark.parametrize("where", PLACEMENTS)
def test_a_box_is_that_of_its_mask(where):
    box = np.array([[30.0, 20, 110, 100]])
    mask = place_mask([[30.0, 20, 110, 20, 110, 100, 30, 100]], (120, 150), where, CANVAS)
    found, expected = place_boxes(box, (120, 150), where, CANVAS), boxes_of(mask[None])
    assert np.abs(found - expected).max() <= 0.5


def test_beside_the_image_stands_the_filling():
    placed = place_image(
        np.full((20, 30, 3), 9, np.uint8), Placement((10, 15)), (12, 18), torch.tensor([1, 2, 3]).byte(), "bilinear"
    )
    assert (placed[:, :10, :15] == 9).all()
    assert (placed[:, 10:] == torch.tensor([1, 2, 3])[:, None, None]).all()
    assert (placed[:, :, 15:] == torch.tensor([1, 2, 3])[:, None, None]).all()


def test_an_image_fits_the_canvas_at_its_own_shape():
    assert fitted((480, 640), (1024, 1024)) == (768, 1024)
    assert fitted((640, 480), (1024, 1024), 0.5) == (512, 384)
    assert fitted((1, 900), (90, 90)) == (1, 90)


def test_jitter_reaches_both_ends_and_cuts_inside_of_the_image():
    rng, sizes, starts, mirrored = np.random.default_rng(0), [], [], 0
    for _ in range(2000):
        where = jittered((100, 200), (64, 64), rng.random(4), (0.1, 2.0), 0.5)
        sizes.append(where.size[1])
        starts.append((where.start[0] / max(1, where.size[0] - 64), where.start[1] / max(1, where.size[1] - 64)))
        assert all(
            s == 0 if size <= 64 else 0 <= s <= size - 64 for s, size in zip(where.start, where.size, strict=True)
        )
        mirrored += where.mirrored
    assert min(sizes) <= 8 and max(sizes) >= 126  # 6.4 to 128
    assert max(s[1] for s in starts) == 1 and 900 < mirrored < 1100


@pytest.fixture
def source(tmp_path) -> CocoImages:
    images, annotations = [], []
    for number in range(1, 5):
        Image.fromarray(white_on_black()).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 150, "height": 120})
        if number != 4:
            annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": [30, 20, 80, 80],
                                "segmentation": POLYGON})  # fmt: skip
    path = tmp_path / "some.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "one"}]})
    )
    return CocoImages(str(path), str(tmp_path))


def batches(source, masks=True, jitter=(0.1, 2.0)):
    return DetectionBatches(
        source, CANVAS, jitter=jitter, flip=0.5, interpolation="bilinear", fill=[124, 116, 104], masks=masks, seed=3,
        on_error="stop",
    )  # fmt: skip


def request(ids, epoch=0, step=0):
    return Request(np.full(len(ids), epoch), step, 0, np.array(ids))


def test_a_sample_is_a_function_of_seed_epoch_and_id(source):
    made = batches(source)
    one, other = made[request([0, 1, 2], step=5)], made[request([2, 3, 0], step=9)]
    assert torch.equal(one.images[0], other.images[2]) and torch.equal(one.truth[0]["masks"], other.truth[2]["masks"])
    assert not torch.equal(one.images[0], one.images[1])  # of the same picture
    assert not torch.equal(one.images[0], made[request([0], epoch=1)].images[0])


def test_boxes_are_those_of_the_masks_that_are_seen(source):
    made = batches(source)
    for epoch in range(20):
        for one in made[request([0, 1, 2], epoch)].truth:
            assert len(one["boxes"]) == len(one["labels"]) == len(one["masks"])
            if len(one["boxes"]):
                assert one["masks"].sum() > 0
                assert one["boxes"].tolist() == boxes_of(one["masks"].numpy()).tolist()


def test_an_object_that_shows_nothing_but_a_corner_of_its_box_is_left_out(source):
    corner = Placement((240, 300), (144, 204))
    assert len(batches(source, masks=False).truth(0, corner)["boxes"]) == 1
    assert len(batches(source).truth(0, corner)["boxes"]) == 0


def test_an_image_without_objects_has_empty_truth(source):
    (truth,) = batches(source)[request([3])].truth
    assert {name: (tuple(t.shape), t.dtype) for name, t in truth.items()} == {
        "boxes": ((0, 4), torch.float32), "labels": ((0,), torch.int64), "masks": ((0, *CANVAS), torch.uint8),
    }  # fmt: skip


def test_without_masks_boxes_come_from_the_file(source):
    (truth,) = batches(source, masks=False, jitter=(1.0, 1.0))[request([0])].truth
    left, right = truth["boxes"][0, 0].item(), truth["boxes"][0, 2].item()
    assert "masks" not in truth
    # 96 / 150 of the size; mirrored or not.
    assert (left, right) in [
        pytest.approx((30 * 0.64, 110 * 0.64), rel=1e-4),
        pytest.approx((40 * 0.64, 120 * 0.64), rel=1e-4),
    ]


def test_held_out_images_are_whole_and_say_how_much_is_image(source):
    whole = WholeImages(source, np.array([2, 0]), CANVAS, "bilinear", [9, 9, 9], "stop")
    images, filled, sizes, indices, failed = stack_whole([whole[0], whole[1]])
    assert (filled.tolist(), sizes.tolist(), indices, failed) == ([[77, 96]] * 2, [[120, 150]] * 2, [2, 0], 0)
    assert (images[:, :, 77:] == 9).all() and images[:, :, :77].max() == 255


def test_a_held_out_image_that_cannot_be_read_is_counted_or_stops(source):
    Path(source.name(1)).write_bytes(b"no image")
    for on_error, expected in (("skip", 1), ("stop", None)):
        whole = WholeImages(source, np.array([1, 2]), CANVAS, "bilinear", [9, 9, 9], on_error)
        stacked = stack_whole([whole[0], whole[1]])
        if expected is None:
            assert stacked.startswith("An image cannot be read") and "2.png" in stacked
        else:
            assert stacked[3:] == ([2], 1)
