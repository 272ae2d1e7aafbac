"""Testing of segmentation: windows and their averages against brute force, figures against scikit-learn's."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, jaccard_score
from torch.nn import functional as F

from elsewhere.data.images import DataError
from elsewhere.data.segmentation import MaskDataset
from elsewhere.launch.efficiency_settings import SlidingSection
from elsewhere.launch.engine.ddp import DdpEngine
from elsewhere.launch.evaluate.confusion import confusion, figures
from elsewhere.launch.evaluate.label_maps import measure_maps
from elsewhere.launch.evaluate.overlays import draw_maps, overlay, palette
from elsewhere.launch.evaluate.sliding import predict_sliding, starts, windows
from elsewhere.launch.world import World
from elsewhere.models.segmenter import Segmenter
from elsewhere.models.vit import Encoder, Size

FILL = torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None]


@pytest.mark.parametrize("stride", [3, 5, 8])
def test_windows_leave_no_gap_and_end_at_the_end(stride):
    for length in range(1, 60):
        found = starts(length, 8, stride)
        assert found[0] == 0 and found[-1] == max(0, length - 8)
        assert all(0 < b - a <= stride for a, b in pairwise(found))
        assert set(range(length)) <= {start + i for start in found for i in range(8)}


def test_published_windows():
    assert (
        starts(512, 512, 341) == [0]
        and starts(683, 512, 341) == [0, 171]
        and starts(1195, 512, 341) == [0, 341, 682, 683]
    )


def corners(pixels):
    """Logits of two classes that depend on where in its window a pixel stands, `[n, 2, h, w]` float64."""
    place = torch.arange(pixels.shape[-2])[:, None] * 3 + torch.arange(pixels.shape[-1])
    return torch.stack([pixels[:, 0].double() + place, pixels[:, 1].double() * 0.5 - place], dim=1)


def image(height, width):
    return torch.randint(0, 60, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(height))


def sliding(views, flipped, size, window=(8, 8), stride=(5, 5), ask=corners, batch=3):
    return predict_sliding(views, flipped, size, windows(views, window, stride, FILL), ask, batch)


def test_overlapping_windows_are_averaged_as_by_brute_force():
    view = image(14, 21)
    sums, counts = torch.zeros(2, 14, 21, dtype=torch.float64), torch.zeros(14, 21)
    for top in (0, 5, 6):
        for left in (0, 5, 10, 13):
            for row in range(8):
                for column in range(8):
                    place = 3 * row + column
                    red, green = view[0, top + row, left + column], view[1, top + row, left + column]
                    sums[:, top + row, left + column] += torch.tensor([float(red) + place, float(green) / 2 - place])
                    counts[top + row, left + column] += 1
    torch.testing.assert_close(sliding([view], [False], (14, 21)), (sums / counts).softmax(dim=0))


def test_padding_of_small_images_is_left_out():
    view, asked = image(5, 11), []

    def ask(pixels):
        asked.append(pixels)
        return corners(pixels)

    found = sliding([view], [False], (5, 11), ask=ask)
    padded = FILL.expand(3, 8, 11).clone()
    padded[:, :5] = view
    torch.testing.assert_close(found, sliding([padded], [False], (8, 11))[:, :5])
    assert torch.equal(asked[0][0, :, 5:], FILL.expand(3, 3, 8))


def test_results_have_the_mask_s_own_resolution():
    """Logits are resized, not classes: as torch's bilinear of the logits themselves."""
    view = image(8, 8)
    wanted = F.interpolate(corners(view[None]), size=(20, 12), mode="bilinear")[0].softmax(dim=0)
    torch.testing.assert_close(sliding([view], [False], (20, 12)), wanted)


def test_scales_and_flips_are_averaged_as_probabilities():
    def by_pixel(pixels):  # knows no place, so a mirrored view says the same
        return torch.stack([pixels[:, 0].double(), pixels[:, 1].double()], dim=1) / 10

    view = image(8, 8)
    once = sliding([view], [False], (8, 8), ask=by_pixel)
    torch.testing.assert_close(sliding([view, view.flip(-1)], [False, True], (8, 8), ask=by_pixel), once)
    other = image(12, 12)
    both = sliding([view, other], [False, False], (8, 8), ask=by_pixel)
    torch.testing.assert_close(both, (once + sliding([other], [False], (8, 8), ask=by_pixel)) / 2)


def test_forward_passes_are_no_larger_than_asked():
    sizes = []

    def ask(pixels):
        sizes.append(len(pixels))
        return corners(pixels)

    one = sliding([image(14, 21), image(9, 8)], [False, False], (14, 21), ask=ask, batch=5)
    assert max(sizes) == 5 and sum(sizes) == 12 + 2
    torch.testing.assert_close(one, sliding([image(14, 21), image(9, 8)], [False, False], (14, 21), batch=1))


def some_maps(classes=6):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, classes - 1, 4000)  # the last class is never there
    predicted = np.where(rng.random(4000) < 0.6, truth, rng.integers(0, classes - 2, 4000))
    truth[rng.random(4000) < 0.1] = 255
    return truth.astype(np.uint8), predicted.astype(np.uint8)


def test_figures_are_scikit_learn_s():
    truth, predicted = some_maps()
    known = truth != 255
    matrix = confusion(truth, predicted, 6)
    assert np.array_equal(matrix, confusion_matrix(truth[known], predicted[known], labels=range(6)))
    found = figures(matrix, list("abcdef"))
    per_class = jaccard_score(truth[known], predicted[known], labels=range(5), average=None)
    assert [found["classes"][name]["iou"] for name in "abcde"] == pytest.approx(per_class, abs=1e-6)
    assert found["miou"] == pytest.approx(per_class.mean(), abs=1e-6)
    assert found["macc"] == pytest.approx(balanced_accuracy_score(truth[known], predicted[known]), abs=1e-6)
    assert found["aacc"] == pytest.approx((truth == predicted)[known].mean(), abs=1e-6)


def test_a_class_that_is_nowhere_counts_in_no_mean():
    found = figures(confusion(np.array([0, 0, 255]), np.array([0, 2, 1]), 4), list("abcd"))
    assert found["classes"]["d"] == {"iou": None, "accuracy": None, "share": 0.0}
    assert found["classes"]["b"]["iou"] is None, "what is predicted where nothing is labelled counts nowhere"
    assert found["classes"]["c"] == {"iou": 0.0, "accuracy": None, "share": 0.0}
    assert found["miou"] == 0.25 and found["macc"] == 0.5


class Scenes:
    """Seven images of different sizes with labels of three classes."""

    classes = ("a", "b", "c")
    spoilt = ()

    def __len__(self):
        return 7

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        size = (20 + 5 * i, 33 - i)
        labels = rng.integers(0, 3, size).astype(np.int64)
        labels[rng.random(size) < 0.1] = 255
        if i in self.spoilt:
            labels = labels[1:]
        return rng.integers(0, 256, (*size, 3)).astype(np.uint8), labels


class SpoiltScenes(Scenes):
    spoilt = (2, 5)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    method = Segmenter(Encoder((16, 16), 4, 3, Size(24, 2, 2), positions="learned"), 3, channels=16)
    torch.nn.init.normal_(method.classifier.weight, std=0.5)
    return method


def measured(model, ranks, source, workers=0, **options):
    """Each rank's part asked for by itself, and put together by the last."""
    parts = []
    for rank in range(ranks):
        world = World(rank=rank, size=1)
        world.size = ranks
        world.gather_host = lambda value: [value] if isinstance(value, int) else parts.append(value) or parts
        engine = DdpEngine.__new__(DdpEngine)
        engine.method, engine.world = model, world
        found = measure_maps(engine, MaskDataset(source), (64, 16), SlidingSection(), (1, 2, 3), workers, **options)
    return found


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_image_counts_once_at_any_number_of_ranks(model, ranks):
    """Against one image after the other, resized and cut by hand; sizes and masks are each image's own."""
    source, matrix = MaskDataset(Scenes()), 0
    for i in range(7):
        pixels, truth = source.read(i), source.mask(i)
        scale = 16 / min(truth.shape)
        size = tuple(int(side * scale + 0.5) for side in truth.shape)
        view = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
        view = F.interpolate(view, size=size, mode="bilinear", antialias=True)
        sums, counts = torch.zeros(3, *size), torch.zeros(size)
        for top in sorted({*range(0, size[0] - 16, 10), size[0] - 16}):
            for left in sorted({*range(0, size[1] - 16, 10), size[1] - 16}):
                place = slice(top, top + 16), slice(left, left + 16)
                sums[:, place[0], place[1]] += model.predict(view[:, :, place[0], place[1]])[0]
                counts[place] += 1
        logits = F.interpolate((sums / counts)[None], size=truth.shape, mode="bilinear")[0]
        matrix = matrix + confusion(truth, logits.argmax(dim=0).numpy(), 3)
    found = measured(model, ranks, Scenes())
    wanted = figures(matrix, "abc")
    assert found["images"] == 7 and found["classes"]["b"]["share"] == wanted["classes"]["b"]["share"]
    assert found["miou"] == pytest.approx(wanted["miou"], abs=1e-4) and found["aacc"] == pytest.approx(
        wanted["aacc"], abs=1e-4
    )


def test_what_cannot_be_read_is_counted_or_stops(model):
    found = measured(model, 1, SpoiltScenes(), on_error="skip")
    assert (found["images"], found["unreadable"]) == (5, 2)
    with pytest.raises(DataError, match=r"SpoiltScenes\[2\]: is 31x30 pixels and its mask 31x29"):
        measured(model, 1, SpoiltScenes())


def test_windows_with_gaps_are_refused(model):
    engine = DdpEngine.__new__(DdpEngine)
    engine.method, engine.world = model, World()
    with pytest.raises(DataError, match="gaps"):
        measure_maps(engine, MaskDataset(Scenes()), (64, 16), SlidingSection(stride=17), (1, 2, 3), 0)


def test_pictures_show_truth_and_prediction(model, tmp_path):
    measured(model, 1, Scenes(), draw=tmp_path / "drawn", pictures=2)
    assert [path.name for path in sorted((tmp_path / "drawn").iterdir())] == [
        "0000_Scenes[0].png",
        "0001_Scenes[1].png",
    ]


def test_overlays_have_the_colour_of_the_class_and_leave_ignored_pixels():
    colours, picture = palette(150), np.full((2, 2, 3), 100, np.uint8)
    assert len(np.unique(colours, axis=0)) == 150
    drawn = overlay(picture, np.array([[0, 149], [255, 1]], np.uint8), colours, strength=1.0)
    assert drawn[0, 0].tolist() == colours[0].tolist() and drawn[0, 1].tolist() == colours[149].tolist()
    assert drawn[1, 0].tolist() == [100, 100, 100]
    panels = draw_maps(picture, np.zeros((2, 2), np.uint8), np.ones((2, 2), np.uint8), ["a", "b"])
    assert panels.shape[1] == 3 * (2 + 4) and panels.shape[0] > 2 + 4
