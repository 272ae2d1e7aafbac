"""The data benchmark reads the same images by every reader and says how fast."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from elsewhere.launch import bench_data
from elsewhere.launch.cli import main

READERS = ["ImageFolder + Pillow", "folder", "shards", "webdataset"]
FFCV = [".beton jpg, by index", ".beton jpg, ffcv", ".beton raw, by index", ".beton raw, ffcv"]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images" / "some"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    return str(folder.parent)


def check(rows, readers):
    assert [(row["views"], row["size"], row["reader"]) for row in rows] == [
        (views, size, reader) for views, size in ((1, 224), (4, 112)) for reader in readers
    ]
    assert all(0 < row["least"] <= row["images_per_second"] <= row["most"] for row in rows)
    assert rows[0]["ratio"] == rows[len(readers)]["ratio"] == 1


def test_a_table_of_readers_and_crops(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_data, "find_spec", lambda name: None)
    assert main(["bench", "data", images, "--json", str(tmp_path / "data.json")]) == 0
    result = json.loads((tmp_path / "data.json").read_text())
    check(result["rows"], READERS)
    assert result["undecoded_per_second"] > 0
    assert "webdataset" in capsys.readouterr().out


@pytest.mark.long  # FFCV compiles for a minute
@pytest.mark.skipif(find_spec("ffcv") is None, reason="FFCV is not installed")
def test_ffcv_is_measured_where_it_is_installed(images):
    check(bench_data.bench_data(images, rounds=1)["rows"], READERS + FFCV)


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert main(["bench", "data", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
