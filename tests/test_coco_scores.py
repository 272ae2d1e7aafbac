"""Average precision: of perfect detections, and computed by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from elsewhere.data.images import DataError
from elsewhere.launch.evaluate.coco_scores import as_records, average_precision


def polygon(left, top, width, height):
    return [[left, top, left + width, top, left + width, top + height, left, top + height]]


def written(tmp_path, boxes, names=("one", "two"), **more):
    """A file of one image for each list of (category, box)."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 200} for i in range(1, len(boxes) + 1)]
    annotations = [
        {"image_id": i, "category_id": category, "bbox": list(box), "segmentation": polygon(*box), **more}
        for i, objects in enumerate(boxes, start=1) for category, box in objects
    ]  # fmt: skip
    path = tmp_path / "some.json"
    categories = [{"id": number, "name": name} for number, name in zip((3, 8), names, strict=True)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return str(path)


def detections(*found):
    """What `predict` gives for (label, box, score), masks filling the box."""
    boxes = torch.tensor([[x, y, x + w, y + h] for _, (x, y, w, h), _ in found]).float().reshape(-1, 4)
    masks = torch.zeros(len(found), 200, 200, dtype=torch.bool)
    for mask, box in zip(masks, boxes.long().tolist(), strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = True
    return {"boxes": boxes, "masks": masks, "labels": torch.tensor([one[0] for one in found]),
            "scores": torch.tensor([one[2] for one in found])}  # fmt: skip


TRUE = [[(3, (10, 10, 50, 60)), (8, (100, 20, 40, 40))], [(3, (30, 30, 120, 100))]]


def test_perfect_detections_have_an_average_precision_of_one(tmp_path):
    path = written(tmp_path, TRUE)
    records = as_records(detections((1, (10, 10, 50, 60), 0.9), (2, (100, 20, 40, 40), 0.8)), 1, [3, 8])
    records += as_records(detections((1, (30, 30, 120, 100), 0.7)), 2, [3, 8])
    found = average_precision(path, [1, 2], records, True)
    for kind in ("box", "mask"):
        assert {found[f"{kind}_{name}"] for name in ("AP", "AP50", "AP75", "APm", "APl")} == {1.0}
        assert found[f"{kind}_APs"] is None  # no object is smaller than 32²
    assert found["categories"] == {"one": {"box": 1.0, "mask": 1.0}, "two": {"box": 1.0, "mask": 1.0}}


def test_a_wrong_detection_between_two_right_ones_costs_what_it_does_by_hand(tmp_path):
    path = written(tmp_path, [[(3, (10, 10, 50, 60))], [(3, (30, 30, 120, 100))]])
    records = as_records(detections((1, (10, 10, 50, 60), 0.9), (1, (120, 120, 50, 50), 0.8)), 1, [3, 8])
    records += as_records(detections((1, (30, 30, 120, 100), 0.7)), 2, [3, 8])
    # Precision is 1 up to a recall of ½, which has 51 of COCO's 101 points, and 2/3 beyond.
    expected = (51 + 50 * 2 / 3) / 101
    found = average_precision(path, [1, 2], records, True)
    assert found["box_AP"] == found["mask_AP"] == pytest.approx(expected, abs=1e-6)


def test_an_overlap_of_three_quarters_and_a_bit_counts_at_six_of_ten_thresholds(tmp_path):
    path = written(tmp_path, [[(3, (0, 0, 100, 100))]])
    records = as_records(detections((1, (0, 0, 78, 100), 0.9)), 1, [3, 8])
    found = average_precision(path, [1], records, True)
    assert (found["box_AP"], found["box_AP50"], found["box_AP75"]) == (0.6, 1.0, 1.0)
    assert found["mask_AP"] == 0.6


def test_mask_sizes_are_those_of_masks_and_not_of_their_boxes(tmp_path):
    # Of a box of 40 x 40 the mask fills a row: small by its mask, medium by its box.
    path = written(tmp_path, [[(3, (10, 10, 40, 40))]], area=200, segmentation=polygon(10, 10, 40, 5))
    both = detections((1, (100, 100, 40, 40), 0.95), (1, (10, 10, 40, 40), 0.9))
    both["masks"][0, 105:] = both["masks"][1, 15:] = False
    found = average_precision(path, [1], as_records(both, 1, [3, 8]), True)
    # The wrong one is small as well, and stands before the right one: its precision is ½.
    assert (found["mask_APs"], found["mask_APm"]) == (0.5, None)


def test_crowds_are_neither_missed_nor_wrong(tmp_path):
    path = written(tmp_path, [[(3, (10, 10, 50, 60))]])
    what = json.loads(Path(path).read_text())
    crowd = {"image_id": 1, "category_id": 3, "bbox": [100, 100, 80, 80], "iscrowd": 1, "area": 6400}
    mask = np.zeros((200, 200), bool)
    mask[100:180, 100:180] = True
    changes = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False)).tolist()
    crowd["segmentation"] = {"size": [200, 200], "counts": np.diff([0, *changes, mask.size]).tolist()}
    what["annotations"].append(crowd)
    Path(path).write_text(json.dumps(what))
    found = detections((1, (110, 110, 30, 30), 0.95), (1, (10, 10, 50, 60), 0.9))
    assert average_precision(path, [1], as_records(found, 1, [3, 8]), True)["box_AP"] == 1.0


def test_nothing_found_is_an_average_precision_of_zero(tmp_path):
    found = average_precision(written(tmp_path, TRUE), [1, 2], [], True)
    assert (found["box_AP"], found["mask_AP"]) == (0.0, 0.0)


def test_images_that_are_not_measured_count_for_nothing(tmp_path):
    records = as_records(detections((1, (30, 30, 120, 100), 0.7)), 2, [3, 8])
    found = average_precision(written(tmp_path, TRUE), [2], records, False)
    assert found["box_AP"] == 1.0 and "mask_AP" not in found


def test_objects_that_were_left_out_are_not_missed(tmp_path):
    path = written(tmp_path, TRUE)
    what = json.loads(Path(path).read_text())
    what["annotations"].append({"image_id": 2, "category_id": 8, "bbox": [1], "segmentation": [[1, 2]]})
    Path(path).write_text(json.dumps(what))
    records = as_records(detections((1, (30, 30, 120, 100), 0.7)), 2, [3, 8])
    found = average_precision(path, [2], records, True, {3})
    assert (found["box_AP"], found["mask_AP"]) == (1.0, 1.0)


def test_without_pycocotools_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    for name in ("pycocotools", "pycocotools.coco", "pycocotools.cocoeval"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match="pip install pycocotools"):
        average_precision(written(tmp_path, TRUE), [1], [], False)
