"""COCO JSON files as a source of images, and one sentence for everything that is wrong with one."""

import json

import numpy as np
import pytest
from PIL import Image

from elsewhere.data.coco import CocoImages, find_coco
from elsewhere.data.decode import UnreadableImage
from elsewhere.data.images import DataError

TRIANGLE = [[2.0, 2, 10, 2, 2, 9]]


def content():
    return {
        "images": [{"id": 7, "file_name": "a.png", "width": 20, "height": 16},
                   {"id": 3, "file_name": "sub/b.png", "width": 12, "height": 16},
                   {"id": 5, "file_name": "c.png", "width": 20, "height": 16}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 40, "bbox": [2, 2, 8, 7], "iscrowd": 0, "segmentation": TRIANGLE},
            {"id": 2, "image_id": 3, "category_id": 9, "bbox": [0, 4, 12.4, 6], "iscrowd": 0, "segmentation": TRIANGLE},
            {"id": 3, "image_id": 7, "category_id": 9, "bbox": [1, 1, 5, 5], "iscrowd": 1,
             "segmentation": {"size": [16, 20], "counts": [320]}},
        ],
        "categories": [{"id": 40, "name": "cat"}, {"id": 9, "name": "dog"}],
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train" / "sub").mkdir(parents=True)
    for name, size in (("a.png", (20, 16)), ("sub/b.png", (12, 16)), ("c.png", (20, 16))):
        Image.new("RGB", size, (200, 10, 10)).save(tmp_path / "train" / name)
    return tmp_path


def opened(folder, what, **options):
    path = folder / "annotations" / "instances_train.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(what if isinstance(what, str) else json.dumps(what))
    return CocoImages(*find_coco(str(folder), "train", None, None), **options)


def test_objects_are_corners_and_labels_by_category_without_crowds(folder):
    source = opened(folder, content())
    assert (source.classes, source.category_ids, source.ids.tolist()) == (["dog", "cat"], [9, 40], [7, 3, 5])
    boxes, labels, outlines = source.objects(0)
    assert (boxes.tolist(), labels.tolist(), outlines) == ([[2, 2, 10, 9]], [2], [TRIANGLE])
    assert source.objects(1)[0].tolist() == [[0, 4, 12, 10]]  # what rounding put outside is cut off
    assert source.objects(2)[0].shape == (0, 4)


def test_images_are_read_by_their_names(folder):
    source = opened(folder, content())
    assert source.read(1).shape == (16, 12, 3)
    assert source.name(1).endswith("train/sub/b.png")


def test_images_without_boxes_are_dropped_if_so_wished(folder):
    assert opened(folder, content(), without_boxes="drop").ids.tolist() == [7, 3]


def test_boxes_alone_need_no_segmentation(folder):
    what = content()
    del what["annotations"][0]["segmentation"]
    assert len(opened(folder, what, masks=False).objects(0)[1]) == 1


def test_an_image_of_another_size_than_the_file_says_cannot_be_read(folder):
    source = opened(folder, content())
    Image.new("RGB", (16, 20)).save(folder / "train" / "a.png")
    with pytest.raises(UnreadableImage, match=r"is 16x20, but .* says 20x16"):
        source.read(0)


def put(path, value):
    def change(what):
        *parents, last = path
        for one in parents:
            what = what[one]
        what[last] = value

    return change


FAULTS = {
    "box outside": (put(("annotations", 0, "bbox"), [15, 2, 8, 7]),
                    r"annotation 1 has the box \[15, 2, 8, 7\] \(left, .* outside its image of 20x16"),
    "box before": (put(("annotations", 0, "bbox"), [-3, 2, 8, 7]), "outside its image of 20x16"),
    "box of three": (put(("annotations", 0, "bbox"), [1, 2, 3]), r"the box \[1, 2, 3\], not \[left, top, width"),
    "box of NaN": (put(("annotations", 0, "bbox"), [1, 2, 3, float("nan")]), "annotation 1 has the box"),
    "unknown category": (put(("annotations", 1, "category_id"), 41), "annotation 2 is of category 41, which the file"),
    "unknown image": (put(("annotations", 1, "image_id"), 99), "annotation 2 is of image 99, which the file lacks"),
    "no outline": (put(("annotations", 0, "segmentation"), []),
                   r"has no segmentation; set method\.detector\.masks=false"),
    "outline of two points": (put(("annotations", 0, "segmentation"), [[1, 2, 3, 4]]), "has a malformed segmentation"),
    "outline of another size": (put(("annotations", 0, "segmentation"), {"size": [20, 16], "counts": [320]}),
                                "has a malformed segmentation"),
    "missing file": (put(("images", 0, "file_name"), "z.png"), r"1 of the 3 images of .* are not in .*, first z\.png"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence_with_a_way_out(folder, fault):
    change, sentence = FAULTS[fault]
    what = content()
    change(what)
    with pytest.raises(DataError, match=sentence) as raised:
        opened(folder, what)
    assert "data.on_error=skip" in str(raised.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_at_fault_is_left_out_and_counted_if_so_wished(folder, fault):
    what = content()
    FAULTS[fault][0](what)
    source = opened(folder, what, on_error="skip")
    assert sum(len(source.objects(i)[0]) for i in range(len(source))) == 1
    assert sum(source.dropped.values()) == 1
    assert len(source.left_out) == (fault != "missing file")


@pytest.mark.parametrize(
    "text, sentence",
    [
        ('{"images": [\n}', r"is not valid JSON \(line 2"),
        ("[]", "has no list 'images' of objects"),
        ('{"images": [], "annotations": {}, "categories": []}', "has no list 'annotations' of objects"),
        ('{"images": [], "annotations": [], "categories": []}', "has no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "has no image"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "an image has no id of"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "a category has no id of its own or no name"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_cocos_is_one_sentence(folder, text, sentence):
    with pytest.raises(DataError, match=sentence):
        opened(folder, text)


def test_boxes_of_no_extent_are_left_out_and_counted(folder):
    what = content()
    what["annotations"][0]["bbox"] = [2, 2, 0, 5]  # as COCO itself has one
    source = opened(folder, what)
    assert len(source.objects(0)[0]) == 0
    assert source.dropped == {"objects of no extent": 1}


def test_without_the_layout_the_file_can_be_named(folder):
    opened(folder, content())
    path = folder / "annotations" / "instances_train.json"
    with pytest.raises(
        DataError, match=r"instances_val\*\.json must be one file and there is no such file: name it by"
    ):
        find_coco(str(folder), "val", None, None)
    assert find_coco(None, "val", str(path), str(folder)) == (str(path), str(folder))
    with pytest.raises(DataError, match=r"data\.val_annotations=nowhere is no file"):
        find_coco(str(folder), "val", "nowhere", None)
    with pytest.raises(DataError, match=r"data\.val_images=nowhere is no folder"):
        find_coco(None, "val", str(path), "nowhere")


def test_of_several_files_of_a_split_one_must_be_named(folder):
    opened(folder, content())
    (folder / "annotations" / "instances_train2017.json").write_text("{}")
    with pytest.raises(DataError, match=r"2 files instances_train\.json, instances_train2017\.json: name it by"):
        find_coco(str(folder), "train", None, None)


@pytest.mark.parametrize("where", ["train2017", "images/train2017", "images"])
def test_the_folder_of_images_is_found_as_coco_and_others_lay_it_out(tmp_path, where):
    (tmp_path / where).mkdir(parents=True)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{}")
    assert find_coco(str(tmp_path), "train", None, None)[1] == str(tmp_path / where)


def test_sizes_are_height_and_width(folder):
    assert np.array_equal(opened(folder, content()).sizes, [[16, 20], [16, 12], [16, 20]])
