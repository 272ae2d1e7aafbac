"""The three stages of Cascade R-CNN, against plain loops."""

import math

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import clip_boxes_to_image

from elsewhere.models.cascade import STAGES, CascadeHeads
from elsewhere.models.vit import Encoder, Size
from elsewhere.models.vitdet import Detector, Heads

SHAPES = [(64, 64), (64, 64)]
HEADS = Heads(cascade=True, masks=False, width=8, hidden=16, anchors=16, regions=24, score=0.0)


@pytest.fixture
def detector():
    torch.manual_seed(0)
    made = Detector(Encoder((64, 64), 8, 3, Size(16, 2, 2), "learned"), 3, HEADS, window=4, spread=1)
    for predictor in made.regions.box_predictor:  # large enough to move boxes between stages
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.5)
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.5)
    return made.double()


@pytest.fixture
def inputs(detector):
    torch.manual_seed(1)
    features = detector.features(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    features = {name: one.double() for name, one in features.items()}
    corners = 40 * torch.rand(2, 30, 2, dtype=torch.float64)
    boxes = list(torch.cat([corners, corners + 4 + 20 * torch.rand_like(corners)], dim=2))
    targets = [{"boxes": torch.tensor([[5.0, 5, 25, 30], [30, 20, 60, 50]]).double(), "labels": torch.tensor([1, 3])},
               {"boxes": torch.tensor([[10.0, 12, 40, 33]]).double(), "labels": torch.tensor([2])}]  # fmt: skip
    # Some that overlap enough for each stage.
    for one, target in zip(boxes, targets, strict=True):
        for k in range(8):
            one[k] = target["boxes"][k % len(target["boxes"])] + torch.randn(4).double()
    return features, boxes, targets


def overlap(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both)


def encoded(box, region, weights):
    def form(b):
        return (b[0] + b[2]) / 2, (b[1] + b[3]) / 2, b[2] - b[0], b[3] - b[1]

    (x, y, w, h), (rx, ry, rw, rh) = form(box), form(region)
    numbers = (x - rx) / rw, (y - ry) / rh, math.log(w / rw), math.log(h / rh)
    return [number * weight for number, weight in zip(numbers, weights, strict=True)]


def decoded(deltas, region, weights):
    dx, dy, dw, dh = (delta / weight for delta, weight in zip(deltas, weights, strict=True))
    w, h = region[2] - region[0], region[3] - region[1]
    x, y = (region[0] + region[2]) / 2 + dx * w, (region[1] + region[3]) / 2 + dy * h
    w, h = w * math.exp(min(dw, math.log(1000 / 16))), h * math.exp(min(dh, math.log(1000 / 16)))
    return [min(max(number, 0), 64) for number in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]


def looped_losses(heads, features, boxes, targets):
    """Of each stage the loss of classes and of boxes, one region at a time."""
    out = {}
    for number, (least, weights) in enumerate(STAGES):
        pooled = heads.box_roi_pool(features, boxes, SHAPES)
        logits, deltas = heads.box_predictor[number](heads.box_head[number](pooled))
        regions = [(image, box.tolist()) for image, one in enumerate(boxes) for box in one]
        of_classes, of_boxes, moved = 0.0, 0.0, [[], []]
        for (image, region), scores, delta in zip(regions, logits.tolist(), deltas.tolist(), strict=True):
            overlaps = [overlap(true, region) for true in targets[image]["boxes"].tolist()]
            best = max(range(len(overlaps)), key=overlaps.__getitem__)
            label = int(targets[image]["labels"][best]) if overlaps[best] >= least else 0
            of_classes += math.log(sum(math.exp(score) for score in scores)) - scores[label]
            if label:
                wanted = encoded(targets[image]["boxes"][best].tolist(), region, weights)
                for a, b in zip(delta, wanted, strict=True):
                    gap = abs(a - b)
                    of_boxes += 4.5 * gap * gap if gap < 1 / 9 else gap - 1 / 18
            box = decoded(delta, region, weights)
            if box[2] > box[0] and box[3] > box[1]:
                moved[image].append(box)
        out |= {f"loss_classifier_{number + 1}": of_classes / len(regions),
                f"loss_box_reg_{number + 1}": of_boxes / len(regions)}  # fmt: skip
        boxes = [torch.tensor(one).double() for one in moved]
    return out


def test_losses_of_all_stages_are_those_of_a_loop(detector, inputs):
    features, boxes, targets = inputs
    heads = detector.regions
    with torch.no_grad():
        found = heads._box_losses(features, boxes, SHAPES, targets)
        expected = looped_losses(heads, features, boxes, targets)
    assert all(expected[f"loss_box_reg_{stage}"] > 0 for stage in (1, 2, 3))
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-6)


def test_a_stage_sees_a_third_of_the_gradient(detector, inputs):
    features, boxes, _ = inputs
    heads, leaf = detector.regions, {name: one.detach().requires_grad_() for name, one in features.items()}
    logits, _ = heads._stage(0, leaf, boxes, SHAPES)
    (found,) = torch.autograd.grad(logits.sum(), leaf["0"])
    plain, _ = heads.box_predictor[0](heads.box_head[0](heads.box_roi_pool(leaf, boxes, SHAPES)))
    (whole,) = torch.autograd.grad(plain.sum(), leaf["0"])
    assert whole.abs().max() > 0
    torch.testing.assert_close(found, whole / 3)


def test_detections_have_mean_scores_and_the_last_boxes(detector, inputs):
    features, boxes, _ = inputs
    heads = detector.regions.eval()
    heads.nms_thresh, heads.detections_per_img = 1.0, 1000  # all stay
    with torch.no_grad():
        found, _ = heads(features, boxes, SHAPES)
        scores, regions = [], boxes
        for number, (_, weights) in enumerate(STAGES):
            pooled = heads.box_roi_pool(features, regions, SHAPES)
            logits, deltas = heads.box_predictor[number](heads.box_head[number](pooled))
            scores.append(logits.softmax(1))
            moved = [decoded(d, r, weights) for d, r in zip(deltas.tolist(), torch.cat(regions).tolist(), strict=True)]
            regions = list(torch.tensor(moved).double().split([len(one) for one in regions]))
    mean = (sum(scores) / 3)[: len(boxes[0]), 1:]
    large = ((regions[0][:, 2:] - regions[0][:, :2]) >= 1e-2).all(dim=1)
    order = mean[large].flatten().argsort(descending=True)
    torch.testing.assert_close(found[0]["scores"], mean[large].flatten()[order], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        found[0]["boxes"], regions[0][large].repeat_interleave(3, 0)[order], rtol=1e-6, atol=1e-6
    )
    assert found[0]["labels"].tolist() == (order % 3 + 1).tolist()


def test_the_best_detections_are_those_of_torchvision_for_boxes_alike_in_all_classes(detector, inputs):
    _, boxes, _ = inputs
    heads = detector.regions.eval()
    assert isinstance(heads, CascadeHeads)
    heads.score_thresh = 0.2
    logits = 2 * torch.randn(30, 4, dtype=torch.float64)
    deltas = torch.zeros(30, 16, dtype=torch.float64)
    expected = RoIHeads.postprocess_detections(heads, logits, deltas, [boxes[0]], SHAPES[:1])
    found = heads._best(clip_boxes_to_image(boxes[0], SHAPES[0]), F.softmax(logits, dim=1))
    for name, value in zip(("boxes", "scores", "labels"), expected, strict=True):
        torch.testing.assert_close(found[name], value[0])


def test_the_mask_loss_is_that_of_torchvision_on_the_same_regions(inputs):
    torch.manual_seed(0)
    heads = Heads(cascade=True, width=8, hidden=16, anchors=16, regions=24)
    ours = Detector(Encoder((64, 64), 8, 3, Size(16, 2, 2)), 3, heads, window=0).double().regions.train()
    predictor = FastRCNNPredictor(16, 4).double()
    theirs = RoIHeads(
        ours.box_roi_pool, ours.box_head[0], predictor, 0.5, 0.5, 24, 0.25, None, 0.05, 0.5, 100,
        ours.mask_roi_pool, ours.mask_head, ours.mask_predictor,
    )  # fmt: skip
    features, boxes, targets = inputs
    for one in targets:
        one["masks"] = (torch.rand(len(one["boxes"]), 64, 64) < 0.5).to(torch.uint8)
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(4)
        losses.append(model(features, list(boxes), SHAPES, targets)[1]["loss_mask"])
    torch.testing.assert_close(*losses)
