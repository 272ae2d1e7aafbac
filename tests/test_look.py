"""`elsewhere look`: what it computes, what it draws, and what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from elsewhere.launch.cli import main
from elsewhere.launch.evaluate.look import components
from elsewhere.launch.pretrain import pretrain
from elsewhere.tests.conftest import _TINY_MAE, TINY  # pyright: ignore


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of StoP and one of MAE+ on the digits, and a folder of eight images."""
    folder = tmp_path_factory.mktemp("look")
    small = {"optim.batch_size": 256, "run.dir": str(folder / "stop")}
    pretrain("demo", **{**TINY, **small})
    pretrain("demo_adpe", **{**_TINY_MAE, "optim.batch_size": 256, "run.dir": str(folder / "mae")})
    (folder / "images").mkdir()
    for i in range(8):
        pixels = np.full((8, 8), 20 * i + 30, np.uint8)
        pixels[i:, :] = 255
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    return folder


@pytest.fixture
def look(runs, tmp_path, capsys):
    def start(run, *arguments, output="out.png"):
        status = main(["look", str(runs / run), *map(str, arguments), "-o", str(tmp_path / output),
                       "engine.device=cpu", "loader.workers=0"])  # fmt: skip
        return status, capsys.readouterr().err, tmp_path / output

    return start


def test_components_are_sklearns_but_for_the_sign():
    tokens = torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7) + 50
    found = components(tokens).flatten(0, 1).numpy()
    expected = PCA(3).fit_transform(tokens.flatten(0, 1).double().numpy())
    signs = np.sign((found * expected).sum(axis=0))
    assert np.abs(found - expected * signs).max() < 1e-3


def test_components_of_a_narrow_encoder_are_filled_up():
    assert components(torch.randn(2, 4, 2)).shape == (2, 4, 3)


def test_all_of_a_masked_autoencoder_is_drawn(look, runs):
    status, _, path = look("mae", runs / "images" / "1.png", runs / "images" / "5.png", "--among", runs / "images")
    picture = np.asarray(Image.open(path))
    # Two rows of components, a row of neighbours an image, and both reconstructions beside each other.
    assert status == 0 and picture.shape == (2 * 132 + 12 + 2 * 132 + 12 + 132, 7 * 132, 3)


def test_the_image_itself_is_no_neighbour_and_its_copy_is_the_first(look, runs, tmp_path):
    among = tmp_path / "among"
    among.mkdir()
    for i in (2, 5, 7):
        (among / f"{i}.png").write_bytes((runs / "images" / f"{i}.png").read_bytes())
    _, _, path = look("stop", runs / "images" / "5.png", "--among", among, "--what", "neighbours")
    picture = np.asarray(Image.open(path))
    assert picture.shape == (132, 4 * 132, 3)
    query, first = picture[40:, 4:128], picture[40:, 136:260]
    assert np.array_equal(query, first)
    (tmp_path / "out.png").unlink()
    _, _, path = look("stop", among / "5.png", "--among", among, "--what", "neighbours")
    assert np.asarray(Image.open(path)).shape == (132, 3 * 132, 3)


@pytest.mark.parametrize(
    ("run", "arguments", "sentence"),
    [
        ("stop", ["--what", "reconstruction"], "is a run of jepa, which makes no pixels"),
        ("stop", ["--what", "neighbours"], "add --among FOLDER"),
        ("stop", ["nowhere.png"], "nowhere.png does not exist"),
        ("stop", ["optim.lr=1"], "optim.lr is a setting of training"),
    ],
)
def test_what_cannot_be_drawn_is_refused(look, runs, run, arguments, sentence):
    status, err, path = look(run, runs / "images" / "1.png", *arguments)
    assert status == 2 and sentence in err and err.count("\n") == 1 and not path.exists()


def test_nothing_is_overwritten_and_only_png_is_written(look, runs, tmp_path):
    (tmp_path / "out.png").write_text("mine")
    assert "exists already" in look("stop", runs / "images" / "1.png")[1]
    assert "must end in .png" in look("stop", runs / "images" / "1.png", output="out.jpg")[1]
    assert (tmp_path / "out.png").read_text() == "mine"
