"""The data benchmark reads the same images three ways and says how fast."""

import json

import numpy as np
from PIL import Image

from elsewhere.launch.cli import main


def test_a_table_of_readers_and_crops(tmp_path, capsys):
    folder = tmp_path / "images" / "some"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    assert main(["bench", "data", str(folder.parent), "--json", str(tmp_path / "data.json")]) == 0
    rows = json.loads((tmp_path / "data.json").read_text())["rows"]
    assert [(row["views"], row["size"]) for row in rows] == [(1, 224)] * 3 + [(4, 112)] * 3
    assert all(0 < row["least"] <= row["images_per_second"] <= row["most"] for row in rows)
    assert rows[0]["ratio"] == rows[3]["ratio"] == 1
    assert "elsewhere, shards" in capsys.readouterr().out


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert main(["bench", "data", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
