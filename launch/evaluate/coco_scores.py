"""COCO's average precision of boxes and masks, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ...data.coco import NEEDS_PYCOCOTOOLS, mask_tools, read_coco
from ...data.images import DataError

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def as_records(found: dict[str, Tensor], image: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Detections of one image (see `Detector.predict`) as COCO's result format has them, masks as run lengths."""
    boxes = found["boxes"].cpu().double()
    boxes[:, 2:] -= boxes[:, :2]
    columns = boxes.tolist(), found["scores"].cpu().tolist(), found["labels"].cpu().tolist()
    records: list[dict[str, Any]] = [
        {"image_id": image, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, score, label in zip(*columns, strict=True)
    ]
    if "masks" in found and records:
        masks = np.asfortranarray(found["masks"].cpu().numpy().astype(np.uint8).transpose(1, 2, 0))
        for record, code in zip(records, mask_tools().encode(masks), strict=True):
            record["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
    return records


def average_precision(
    annotations: str,
    image_ids: Sequence[int],
    records: list[dict[str, Any]],
    masks: bool,
    left_out: Collection[int] = (),
) -> dict[str, Any]:
    """COCO's six figures in 0…1 of boxes (`box_AP` …) and, if `masks`, of masks (`mask_AP` …), and AP by category.

    `records` are detections of the images `image_ids` of the file `annotations`; the places `left_out` of its list of
    annotations do not count. A figure is None where the file has nothing to measure it on, such as objects of that
    size. Raises `DataError` without pycocotools.
    """
    make_coco, make_judge = _pycocotools()
    content, chosen = read_coco(annotations), {int(one) for one in image_ids}
    objects = [one for place, one in enumerate(content["annotations"]) if place not in left_out]
    for number, one in enumerate(objects, start=1):  # what COCO's files have and others forget
        one["id"] = number
        one.setdefault("iscrowd", 0)
        one.setdefault("area", one["bbox"][2] * one["bbox"][3])
    content["annotations"] = objects
    content["images"] = [one for one in content["images"] if one["id"] in chosen]
    out: dict[str, Any] = {}
    by_category: dict[str, dict[str, float | None]] = {one["name"]: {} for one in content["categories"]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = make_coco()
        truth.dataset = content
        truth.createIndex()
        for name, kind in (("box", "bbox"), ("mask", "segm"))[: 1 + masks]:
            # With a box in it, a mask's area would be taken to be the box's.
            part = [{k: v for k, v in one.items() if k != "bbox" or kind == "bbox"} for one in records]
            judge = make_judge(truth, truth.loadRes(part) if part else _nothing(truth), kind)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            for figure, value in zip(NAMES, judge.stats, strict=False):
                out[f"{name}_{figure}"] = _known(value)
            precision = judge.eval["precision"][:, :, :, 0, -1]  # [overlaps, recalls, categories]
            for place, category in enumerate(judge.params.catIds):
                values = precision[:, :, place]
                found = _known(values[values > -1].mean() if (values > -1).any() else -1)
                by_category[truth.cats[category]["name"]][name] = found
    return out | {"categories": by_category}


def _pycocotools() -> tuple[Any, Any]:
    """pycocotools' COCO and COCOeval; `DataError` without it."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise DataError(NEEDS_PYCOCOTOOLS) from None
    return COCO, COCOeval


def _nothing(truth: Any) -> Any:
    """Detections of nothing, which `loadRes` does not take."""
    empty = _pycocotools()[0]()
    empty.dataset = {key: truth.dataset[key] for key in ("images", "categories")} | {"annotations": []}
    empty.createIndex()
    return empty


def _known(value: float) -> float | None:
    return round(float(value), 6) if value > -1 else None
