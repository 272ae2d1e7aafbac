"""What `data.path` may name: one place, several, patterns, and what each `data.source` insists on."""

import numpy as np
import pytest
from PIL import Image

from elsewhere.data.images import DataError, NoHeldOutImages, Subset
from elsewhere.data.shard_writer import WriteOptions, write_shards
from elsewhere.data.sources import Joined, open_source


def folder(path, classes, each=4, start=0):
    """A folder of classes whose images have values of their own, from `start` on."""
    for place, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for i in range(each):
            value = start + place * each + i
            Image.fromarray(np.full((9, 8, 3), value, np.uint8)).save(path / name / f"{i}.png")
    return str(path)


def values(source):
    return [int(source.read(i)[0, 0, 0]) for i in range(len(source))]


def labels(source):
    return [source.classes[source.label(i)] for i in range(len(source))]


@pytest.fixture
def two(tmp_path):
    return [folder(tmp_path / "a1", ["cat", "dog"]), folder(tmp_path / "a2", ["ant", "dog"], start=50)]


def test_several_folders_are_joined_and_their_classes_united(two):
    source = open_source(two, "train", 3, holdout=0)
    assert values(source) == [*range(8), *range(50, 58)]
    assert source.classes == ["ant", "cat", "dog"]
    assert labels(source) == ["cat"] * 4 + ["dog"] * 4 + ["ant"] * 4 + ["dog"] * 4
    assert source.name(8).startswith(two[1])


@pytest.mark.parametrize("pattern", ["a{1,2}", "a{1..2}", "a?", "a*"])
def test_braces_and_wildcards_name_folders(two, tmp_path, pattern):
    assert values(open_source(str(tmp_path / pattern), "train", 3, holdout=0)) == [*range(8), *range(50, 58)]


def test_a_pattern_in_a_list_is_one_place_of_it(two, tmp_path):
    source = open_source([str(tmp_path / "a?"), two[0]], "train", 3, holdout=0)
    assert isinstance(source, Joined)
    assert source.sizes == [16, 8]
    assert values(source) == [*range(8), *range(50, 58), *range(8)]


def test_each_of_several_folders_holds_out_its_share(two):
    train, val = (values(open_source(two, split, 3, holdout=0.25)) for split in ("train", "val"))
    assert sorted(train + val) == [*range(8), *range(50, 58)]
    assert sum(value < 50 for value in val) == sum(value >= 50 for value in val) == 2


def test_places_without_val_are_left_out_of_it(two, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (8, 8)).save(flat / "one.png")
    with pytest.raises(DataError, match=r"Some of the places in data\.path have classes and others have none"):
        open_source([two[0], str(flat)], "train", 3, holdout=0.25)
    with pytest.raises(NoHeldOutImages):
        open_source([str(flat), str(flat)], "val", 3, holdout=0.25)


def test_folders_and_shards_are_joined(two, tmp_path):
    write_shards(two[1], tmp_path / "shards", options=WriteOptions(), processes=1)
    source = open_source([two[0], str(tmp_path / "shards")], "train", 3, holdout=0)
    assert sorted(values(source)) == [*range(8), *range(50, 58)]


def test_a_joined_source_has_no_image_beyond_its_end(two):
    source = open_source(two, "train", 3, holdout=0)
    assert isinstance(source, Joined)
    for i in (-1, 16):
        with pytest.raises(IndexError):
            source.read(i)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("nowhere{1,2}", "nowhere1 names nothing that exists"),
        ("b*", r"b\* names nothing that exists"),
        ([], "data.path is an empty list"),
    ],
)
def test_patterns_that_name_nothing(tmp_path, path, sentence):
    with pytest.raises(DataError, match=sentence):
        open_source(str(tmp_path / path) if path else path, "train", 3)


@pytest.mark.parametrize(("kind", "what"), [("shards", "shards"), ("ffcv", r"a \.beton file")])
def test_a_source_that_is_insisted_on(two, kind, what):
    with pytest.raises(DataError, match=f"data.source={kind}, but data.path=.*a1 is not {what}"):
        open_source(two[0], "train", 3, kind=kind)


def test_images_are_insisted_on_where_shards_stand_beside_them(two, tmp_path):
    write_shards(two[1], tmp_path / "both", options=WriteOptions(), processes=1)
    Image.new("RGB", (8, 8)).save(tmp_path / "both" / "one.png")
    assert len(open_source(str(tmp_path / "both"), "train", 3, holdout=0)) == 8
    assert len(open_source(str(tmp_path / "both"), "train", 3, holdout=0, kind="images")) == 1


def test_a_subset_names_what_it_was_taken_from(two):
    source = Subset(open_source(two[0], "train", 3, holdout=0), [5, 2])
    assert values(source) == [5, 2]
    assert [source.label(i) for i in range(2)] == [1, 0]
