"""What a run of the MAE family shows: reconstructions, arrows of the adversary, and its rows and curves."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import elsewhere
from elsewhere.data.batch import Batch
from elsewhere.launch.build import build_method
from elsewhere.launch.config import load_config
from elsewhere.launch.engine.ddp import DdpEngine
from elsewhere.launch.engine.precision import LossScaler
from elsewhere.launch.optim import make_optimizer
from elsewhere.launch.pictures import draw_reconstructions, draw_shifts
from elsewhere.launch.watch import Watch
from elsewhere.launch.world import World

RED = torch.tensor([230, 80, 60])
EMBEDDING = {"method.adversary.mode": "embedding", "model.relative.lookup": "hard"}


def panels_of(picture, row=0, side=128):
    """The three parts of one image's row, without their white frames."""
    top = row * (side + 4) + 2
    return [picture[:, top : top + side, i * (side + 4) + 2 : i * (side + 4) + 2 + side] for i in range(3)]


def by_patch(picture, grid=(4, 4)):
    """A picture `[3, H, W]` as `[N, numbers]`, a row a patch."""
    rows, columns = grid
    parts = picture.unflatten(2, (columns, -1)).unflatten(1, (rows, -1))
    return parts.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)


@pytest.fixture
def drawn():
    """Random images `[2, 1, 8, 8]`, their masked patches `[2, 16]`, predictions, and the picture of them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 1, 8, 8), generator=generator, dtype=torch.uint8)
    predicted = torch.randint(0, 256, (2, 1, 8, 8), generator=generator).float()
    masked = torch.rand(2, 16, generator=generator) < 0.75
    return images, masked, predicted, draw_reconstructions(images, masked, predicted, (4, 4))


def enlarged(image):
    return image.expand(3, -1, -1).repeat_interleave(16, dim=1).repeat_interleave(16, dim=2).to(torch.uint8)


def test_a_row_begins_with_the_input(drawn):
    images, _, _, picture = drawn
    assert picture.shape == (3, 2 * 132, 3 * 132) and picture.dtype == torch.uint8
    for row in range(2):
        assert torch.equal(panels_of(picture, row)[0], enlarged(images[row]))


def test_masked_patches_of_the_input_are_grey_and_visible_ones_as_they_are(drawn):
    images, masked, _, picture = drawn
    for row in range(2):
        found, given = by_patch(panels_of(picture, row)[1]), by_patch(enlarged(images[row]))
        assert (found[masked[row]] == 128).all()
        assert torch.equal(found[~masked[row]], given[~masked[row]])


def test_a_reconstruction_has_the_predictions_at_masked_patches_and_pixels_at_visible_ones(drawn):
    images, masked, predicted, picture = drawn
    for row in range(2):
        found, given = by_patch(panels_of(picture, row)[2]), by_patch(enlarged(images[row]))
        guessed = by_patch(enlarged(predicted[row]))
        assert torch.equal(found[masked[row]], guessed[masked[row]])
        assert torch.equal(found[~masked[row]], given[~masked[row]])


def red(picture):
    """Rows and columns of the pixels in the colour of arrows."""
    return (picture == RED[:, None, None]).all(dim=0).nonzero().T


@pytest.mark.parametrize("shift", [(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)], ids=str)
def test_an_arrow_goes_from_a_masked_patch_to_where_the_shift_says(shift):
    """On a 2×2 grid with a reach of one patch, a patch has 136 / 4 = 34 pixels, and the first one its centre at 55."""
    masked = torch.tensor([True, False, False, False])
    rows, columns = red(draw_shifts({"shift": torch.tensor([shift])}, masked, (2, 2)))
    for axis, start, moved in ((rows, 16 + 51, shift[0]), (columns, 4 + 51, shift[1])):
        ends = sorted((start, start + 34 * moved))
        thickness = 0 if moved else 3  # the arrow's head
        assert (axis.min().item(), axis.max().item()) == pytest.approx(
            (ends[0] - thickness, ends[1] + thickness), abs=1.5
        )


def test_visible_patches_are_dots_and_masked_ones_arrows():
    masked = torch.tensor([True, False, False, True])
    picture = draw_shifts({"shift": torch.tensor([[0.0, 0.2]])}, masked, (2, 2))
    for patch, hidden in enumerate(masked.tolist()):
        y, x = 16 + 51 + 34 * (patch // 2), 4 + 51 + 34 * (patch % 2)
        colour = RED if hidden else torch.tensor([150, 150, 150])
        assert torch.equal(picture[:, y, x].long(), colour)


def test_every_layer_has_its_panel():
    shifts = {"encoder": torch.zeros(7, 2), "decoder": torch.ones(2, 2)}
    picture = draw_shifts(shifts, torch.ones(4, dtype=torch.bool), (2, 2))
    assert picture.shape == (3, 2 * 160, 6 * 144)
    filled = [(picture[:, 160 * (n // 6) :, 144 * (n % 6) :][:, :160, :144] < 255).any() for n in range(12)]
    assert filled == [True] * 9 + [False] * 3


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_shift_that_is_no_number_is_drawn_all_the_same(number):
    picture = draw_shifts({"shift": torch.tensor([[number, 1.0]])}, torch.ones(4, dtype=torch.bool), (2, 2))
    assert picture.shape == (3, 160, 144)


@pytest.mark.parametrize("normalised", [True, False])
def test_a_perfect_prediction_is_painted_as_the_input(normalised, tiny_mae, monkeypatch):
    config = load_config("demo_adpe", {**tiny_mae, "method.normalise_pixels": normalised})
    method = build_method(config)
    images = torch.randint(0, 256, (3, 2, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    masked = torch.ones(6, 16, dtype=torch.bool)
    monkeypatch.setattr(method, "predict", lambda images, *_: (method.targets(images)[0], masked))
    pictures, engine = {}, DdpEngine(method, make_optimizer(method), World(), LossScaler(False))
    watch = Watch(config, World(), engine, SimpleNamespace(picture=pictures.__setitem__))
    visible = torch.zeros(3, 2, 4, dtype=torch.int64)
    ids = torch.arange(3)
    watch(1, Batch(images, ids, ids, epochs=ids, step=0, visible=visible))
    assert list(pictures) == ["reconstruction"]
    for row in range(6):
        given, _, painted = panels_of(pictures["reconstruction"], row)
        assert (given.int() - painted.int()).abs().max() <= 1


@pytest.fixture
def show(tiny_mae, some_digits, tmp_path):
    """Train six steps with TensorBoard and every look at the adversary; what its own reader finds, and the rows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(**settings):
        settings = {**tiny_mae, "monitor.tensorboard": True, "monitor.adversary_every": 2, **settings}
        elsewhere.pretrain("demo_adpe", some_digits, **settings)
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
        events.Reload()
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        return events, rows

    return run


def test_tensorboard_shows_reconstructions_and_the_adversary(show):
    events, _ = show()
    assert events.Tags()["images"] == ["reconstruction", "adversary"]
    picture = np.array(Image.open(io.BytesIO(events.Images("reconstruction")[0].encoded_image_string)))
    assert picture.shape == (8 * 132, 3 * 132, 3)
    for row in range(8):
        given, hidden, painted = (by_patch(p) for p in panels_of(torch.from_numpy(picture).permute(2, 0, 1), row))
        masked = (hidden == 128).all(dim=1)
        assert masked.sum() == 12
        assert torch.equal(painted[~masked], given[~masked])


def test_an_embedding_attack_has_no_arrows_but_curves_of_its_norm(show):
    events, _ = show(**EMBEDDING)
    tags = events.Tags()
    assert tags["images"] == ["reconstruction"]
    norms = {f"train/adversary_{name}_norm{kind}" for name in ("encoder", "decoder") for kind in ("", "_max")}
    assert norms <= set(tags["scalars"])
    assert [event.value > 0 for event in events.Scalars("train/adversary_encoder_norm")] == [True] * 6


def test_the_adversarys_gain_is_measured_and_written(show):
    events, rows = show(**{"method.adversary.base_lr": 0.5})
    found = [row for row in rows if row.get("group") == "adversary"]
    assert [row["step"] for row in found] == [1, 3, 5]
    for row in found:
        assert row["loss_gain"] == pytest.approx(row["loss_with"] - row["loss_without"]) and row["loss_gain"] != 0
    assert {f"adversary/{name}" for name in ("loss_gain", "loss_with", "loss_without")} <= set(events.Tags()["scalars"])


def test_every_step_writes_the_adversarys_rate_and_norms(show):
    _, rows = show(**{"method.adversary.schedule": "constant"})
    steps = [row for row in rows if "group" not in row]
    assert [row["adversary_lr"] for row in steps] == [pytest.approx(2e-3 * 16 / 256)] * 6
    for part in ("encoder", "decoder"):
        assert steps[-1][f"adversary_{part}_norm_max"] >= steps[-1][f"adversary_{part}_norm"] > 0


def test_a_method_without_an_adversary_writes_nothing_of_one(show):
    alone = {"mode": "none", "norm": "none", "epsilon": None, "base_lr": 1.5e-4}
    events, rows = show(**{f"method.adversary.{key}": value for key, value in alone.items()})
    assert not [key for row in rows for key in row if key.startswith("adversary")]
    assert events.Tags()["images"] == ["reconstruction"]
