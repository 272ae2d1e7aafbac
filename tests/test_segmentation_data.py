"""Images with masks: layouts, ids, what is refused, and training views that are a function of (seed, epoch, sample)."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image

from elsewhere.data.images import DataError, NoHeldOutImages
from elsewhere.data.loader import Loader
from elsewhere.data.map_augment import MapAugment, MapBatches, distort, fitted, resize_labels
from elsewhere.data.order import Permutations, Plan, Request
from elsewhere.data.segmentation import IGNORED, MaskDataset, MaskFolder, check_some, labels_of, read_pair
from elsewhere.tests.composites import compose, drawn_cutouts, scenes, write_ade

NAMES = ("disc", "square", "triangle")
FILL = (1, 2, 3)


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    """Twelve and five composited scenes in the ADE20K layout."""
    folder = tmp_path_factory.mktemp("ade")
    for split, count in (("train", 12), ("val", 5)):
        write_ade(folder, split, scenes(drawn_cutouts(split), count, size=(48, 64)), NAMES)
    return folder


def plain(folder, pictures=("a", "b", "c"), ids=(0, 1), size=(6, 8), images="images", masks="masks"):
    """Images and masks without splits, and two classes."""
    for name in (images, masks):
        (folder / name).mkdir(parents=True)
    for name in pictures:
        Image.fromarray(np.full((*size, 3), 9, np.uint8)).save(folder / images / f"{name}.png")
        Image.fromarray(np.resize(np.array(ids, np.uint8), size)).save(folder / masks / f"{name}.png")
    (folder / "classes.txt").write_text("one\ntwo\n")
    return folder


def test_ade20k_s_layout_with_zero_ignored(ade):
    for split, count in (("train", 12), ("val", 5)):
        source = MaskFolder(str(ade), split, zero_is_ignored=True)
        assert len(source) == count and source.classes == ["background", *NAMES]
        scene = compose(drawn_cutouts(split), 3, (48, 64))
        labels = np.where(scene.mask == 0, IGNORED, scene.mask.astype(int) - 1)
        assert np.array_equal(source.mask(3), labels) and labels.max() == IGNORED
        assert np.abs(source.read(3).astype(int) - scene.image).mean() < 8  # JPEG


def test_ade20k_s_table_of_objects_names_the_classes(tmp_path):
    folder = plain(tmp_path / "x")
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t9\t9\t1\twall, side\n"
                                              "2\t0.1\t9\t9\t1\tsky\n")  # fmt: skip
    assert MaskFolder(str(folder)).classes == ["wall", "sky"]


@pytest.mark.parametrize(
    ("images", "masks"), [("images", "masks"), ("images", "annotations"), ("JPEGImages", "SegmentationClass")]
)
def test_folders_without_splits_hold_out_a_share(tmp_path, images, masks):
    folder = plain(tmp_path / "x", [f"{i:02}" for i in range(20)], images=images, masks=masks)
    parts = [MaskFolder(str(folder), split, holdout=0.2) for split in ("train", "val")]
    names = [{part.name(i) for i in range(len(part))} for part in parts]
    assert [len(part) for part in names] == [16, 4] and not names[0] & names[1]
    assert len(MaskFolder(str(folder), "train", holdout=0.0)) == 20
    with pytest.raises(NoHeldOutImages, match=r"holdout=0"):
        MaskFolder(str(folder), "val", holdout=0.0)


def test_splits_may_stand_above_the_pair_and_may_have_subfolders(tmp_path):
    plain(tmp_path / "train"), plain(tmp_path / "val", ["d"])
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    for kind in ("images", "masks"):
        (tmp_path / "train" / kind / "city").mkdir()
        (tmp_path / "train" / kind / "a.png").rename(tmp_path / "train" / kind / "city" / "a.png")
    assert len(MaskFolder(str(tmp_path), "train")) == 3 and len(MaskFolder(str(tmp_path), "val")) == 1
    assert read_pair(MaskFolder(str(tmp_path), "train"), 2)[1].shape == (6, 8)


def test_palette_masks_are_read_by_index(tmp_path):
    folder = plain(tmp_path / "x", ["a"])
    mask = Image.fromarray(np.eye(6, 8, dtype=np.uint8), mode="P")
    mask.putpalette([0, 0, 0, 200, 10, 10])
    mask.save(folder / "masks" / "a.png")
    assert np.array_equal(MaskFolder(str(folder), holdout=0).mask(0), np.eye(6, 8, dtype=np.uint8))


def test_sixteen_bit_ids_are_read(tmp_path):
    folder = plain(tmp_path / "x", ["a"])
    Image.fromarray(np.full((6, 8), 300, np.uint16)).save(folder / "masks" / "a.png")
    with pytest.raises(DataError, match=r"unknown ids \(300\)"):
        MaskFolder(str(folder), holdout=0).mask(0)


def test_ids_become_labels():
    ids = np.array([[0, 1, 2, 3, 255]])
    assert labels_of(ids, 4, False, "x").tolist() == [[0, 1, 2, 3, 255]]
    assert labels_of(ids, 3, True, "x").tolist() == [[255, 0, 1, 2, 255]]
    with pytest.raises(DataError, match=r"x has unknown ids \(2, 3\).*0 … 1, and 255 for none"):
        labels_of(ids, 2, False, "x")
    with pytest.raises(DataError, match=r"set data.maps.zero_is_ignored=true"):
        labels_of(ids, 3, False, "x")
    with pytest.raises(DataError, match=r"unknown ids \(3\).*0 and 255 for none, 1 … 2"):
        labels_of(ids, 2, True, "x")


def broken(folder, how):
    """A folder of three pairs of which one is not as it should be."""
    plain(folder)
    image, mask = folder / "images" / "b.png", folder / "masks" / "b.png"
    if how == "no mask":
        mask.unlink()
    elif how == "no image":
        image.unlink()
    elif how == "another size":
        Image.fromarray(np.zeros((6, 7), np.uint8)).save(mask)
    elif how == "colours":
        Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(mask)
    elif how == "unknown id":
        Image.fromarray(np.full((6, 8), 7, np.uint8)).save(mask)
    elif how == "cut":
        mask.write_bytes(mask.read_bytes()[:40])
    elif how == "no names":
        (folder / "classes.txt").unlink()
    elif how == "two images":
        (folder / "images" / "b.jpg").write_bytes(b"")
    elif how == "no folder":
        (folder / "masks").rename(folder / "segments")
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no mask", "1 of 3 images have no mask, first b.png"),
        ("no image", "1 of 3 masks have no image, first b.png"),
        ("another size", "b.png: is 8x6 pixels and its mask 7x6"),
        ("colours", "b.png: is a picture of mode RGB, but a mask holds one class id a pixel"),
        ("unknown id", r"b.png has unknown ids \(7\)"),
        ("cut", "b.png: "),
        ("no names", "put their names into .*classes.txt, one a line, or set"),
        ("two images", "holds both b.jpg and b.png"),
        ("no folder", "has no pair of folders like images and annotations"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, how, message):
    with pytest.raises(DataError, match=message) as error:
        check_some(MaskFolder(str(broken(tmp_path / "x", how)), holdout=0.0))
    assert "\n" not in str(error.value)


def test_the_number_of_classes_must_be_that_of_the_names(ade):
    with pytest.raises(DataError, match=r"classes=7, but .*classes.txt names 4"):
        MaskFolder(str(ade), classes=7)


class Pairs:
    """A data set of one's own."""

    classes = ("one", "two")

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return np.full((6, 8, 3), i, np.uint8), torch.full((6, 8), i, dtype=torch.int64)


def test_a_data_set_of_pairs():
    source = MaskDataset(Pairs())
    image, labels = read_pair(source, 1)
    assert image.max() == 1 and labels.dtype == np.uint8 and (labels == 1).all()
    with pytest.raises(DataError, match=r"Pairs\[2\] has unknown ids"):
        source.mask(2)


def test_sizes_that_fit():
    """mmsegmentation's: the long side at most 2048, the short one at most 512, proportions kept."""
    assert fitted(480, 640, (2048, 512)) == (512, 683)
    assert fitted(100, 1000, (2048, 512)) == (205, 2048)
    assert fitted(640, 480, (2048, 512)) == (683, 512)


def augment(**changes):
    options = {"size": (32, 32), "scale": (128, 40), "distort": False, "fill": FILL, **changes}
    return MapAugment(**options)


def blocks(side=8, rows=6, columns=8):
    """Labels of blocks, and an image whose colour says which label a pixel has."""
    labels = np.kron(np.arange(rows * columns).reshape(rows, columns) % 5, np.ones((side, side))).astype(np.uint8)
    return np.stack([labels * 40] * 3, axis=2), labels


def test_labels_stay_on_their_pixels():
    image, labels = blocks(24)
    view, turned = augment(scale=(256, 80)), 0
    for sample in range(12):
        numbers = view.numbers(0, np.array([0]), np.array([sample]))[0]
        pixels, maps = view(image, labels, numbers)
        inside = maps != IGNORED
        near = (pixels[0].float() / 40 - maps).abs() < 0.25
        assert pixels.shape == (3, 32, 32) and near[inside].float().mean() > 0.75  # the rest are borders of blocks
        unflipped, _ = augment(scale=(256, 80), flip=0.0)(image, labels, numbers)
        turned += int(not torch.equal(unflipped, pixels))
    assert 0 < turned < 12


def test_smaller_images_are_padded_with_the_fill_and_ignored():
    image, labels = blocks(rows=2, columns=2)  # 16 x 16
    view = augment(scale=(20, 20), resize=(1.0, 1.0), flip=0.0)
    pixels, maps = view(image, labels, view.numbers(0, np.array([0]), np.array([0]))[0])
    assert (maps[20:] == IGNORED).all() and (maps[:, 20:] == IGNORED).all() and (maps[:20, :20] != IGNORED).all()
    assert pixels[:, 31, 31].tolist() == list(FILL) and pixels[:, 0, 25].tolist() == list(FILL)


def test_crops_of_one_class_are_avoided_where_ten_tries_find_others():
    """A plain with a small stripe: with the rule, crops that meet it are far more frequent."""
    labels = np.zeros((64, 640), dtype=np.uint8)
    labels[:, 300:340] = 1
    image = np.zeros((64, 640, 3), dtype=np.uint8)

    def met(share):
        view = augment(scale=(640, 64), resize=(1.0, 1.0), most_of_one_class=share)
        return sum(
            len(torch.unique(view(image, labels, view.numbers(0, np.array([0]), np.array([i]))[0])[1])) > 1
            for i in range(40)
        )

    assert met(0.75) > 2 * met(1.0) > 0


def test_ignored_pixels_are_no_class_to_the_rule():
    labels = np.full((32, 64), IGNORED, dtype=np.uint8)
    labels[:, ::2] = 3
    view = augment(scale=(64, 32), resize=(1.0, 1.0))
    numbers = view.numbers(0, np.array([0]), np.array([0]))[0]
    assert view._place(labels, numbers[1:21]) == (0, int(numbers[20] * 33))  # the last of ten


def test_labels_are_resized_to_the_nearest_by_centres():
    labels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert resize_labels(labels, (2, 2)).tolist() == [[5, 7], [13, 15]]
    assert np.array_equal(resize_labels(labels, (8, 8)), np.kron(labels, np.ones((2, 2), np.uint8)))


def test_distortion_is_that_of_its_numbers():
    """Against a pixel by pixel computation with colorsys, each change alone, and all with contrast last."""
    image = np.random.default_rng(0).integers(30, 220, (6, 5, 3)).astype(np.uint8)
    off = np.array([0.9, 0.5, 0.2, 0.9, 0.5, 0.9, 0.5, 0.9, 0.5])

    def by_hand(pixel, brightness=0.0, alpha=1.0, saturation=1.0, turn=0.0):
        r, g, b = (min(255.0, max(0.0, value + brightness)) / 255 for value in pixel)
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        rgb = colorsys.hsv_to_rgb((h + turn) % 1, min(1.0, s * saturation), v)
        return [min(255.0, 255 * value * alpha) for value in rgb]

    cases = [
        ({0: 0.1, 1: 0.75}, {"brightness": 16}),
        ({3: 0.1, 4: 0.75}, {"alpha": 1.25}),
        ({5: 0.1, 6: 0.1}, {"saturation": 0.6}),
        ({7: 0.1, 8: 0.9}, {"turn": 0.08}),
        ({0: 0.1, 1: 0.25, 2: 0.9, 3: 0.1, 4: 0.3, 5: 0.1, 6: 0.9},
         {"brightness": -16, "alpha": 0.8, "saturation": 1.4}),
    ]  # fmt: skip
    assert np.array_equal(distort(image, off), image)
    for changes, wanted in cases:
        numbers = off.copy()
        numbers[list(changes)] = list(changes.values())
        expected = np.array([[by_hand(pixel, **wanted) for pixel in row] for row in image.tolist()])
        assert np.abs(distort(image, numbers).astype(float) - expected).max() < 6  # eight bits of hue and saturation


def test_grey_images_keep_saturation_and_hue():
    numbers = np.array([0.9, 0.5, 0.2, 0.9, 0.5, 0.1, 0.9, 0.1, 0.9])
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 1)).astype(np.uint8)
    assert np.array_equal(distort(image, numbers), image)


@pytest.fixture
def batches(ade):
    source = MaskFolder(str(ade), zero_is_ignored=True)
    return MapBatches(source, augment(distort=True), seed=3)


def request(ids, epochs=0):
    ids = np.array(ids)
    return Request(np.zeros_like(ids) + epochs, 0, 0, ids)


def test_a_sample_is_a_function_of_seed_epoch_and_id(batches, ade):
    one, other = batches[request([4, 1, 7])], batches[request([7, 4])]
    for mine, theirs in ((0, 1), (2, 0)):
        assert torch.equal(one.images[mine], other.images[theirs]) and torch.equal(one.truth[mine], other.truth[theirs])
    assert one.truth.dtype == torch.int64 and one.images.dtype == torch.uint8
    assert not torch.equal(batches[request([4], 1)].images[0], one.images[0])
    again = MapBatches(MaskFolder(str(ade), zero_is_ignored=True), augment(distort=True), seed=4)
    assert not torch.equal(again[request([4])].images[0], one.images[0])


def test_workers_change_nothing(batches):
    def all_of(workers):
        plan = Plan(seed=3, global_batch=4, micro_batch=2, stop_step=3, workers=workers)
        return list(Loader.of(batches, Permutations(12, 3), plan))

    for one, other in zip(all_of(0), all_of(2), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.truth, other.truth)


def test_an_unreadable_mask_is_replaced_and_named_or_stops(tmp_path):
    folder = broken(tmp_path / "x", "cut")
    view = augment()
    with pytest.raises(DataError, match=r"An image cannot be read .*b.png"):
        MapBatches(MaskFolder(str(folder), holdout=0), view, seed=0)[request([1])]
    found = MapBatches(MaskFolder(str(folder), holdout=0), view, seed=0, on_error="skip")[request([1])]
    assert "b.png" in found.skipped[0] and found.sample_ids[0] != 1
    other = int(found.sample_ids[0])
    plain_one = MapBatches(MaskFolder(str(folder), holdout=0), view, seed=0)[request([other])]
    assert torch.equal(found.images, plain_one.images)
