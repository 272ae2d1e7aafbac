"""Detection runs: from a pre-trained run, resumed to the bit, measured exactly once an image, drawn."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import elsewhere
from elsewhere.data.coco import CocoImages, find_coco
from elsewhere.data.detection import WholeImages
from elsewhere.launch.build import build_method, build_schedules
from elsewhere.launch.cli import main
from elsewhere.launch.config import load_config
from elsewhere.launch.engine.ddp import DdpEngine
from elsewhere.launch.errors import UserError
from elsewhere.launch.evaluate.detect import Detection, detect, fill_of, scores
from elsewhere.launch.evaluate.draw_boxes import draw_detections
from elsewhere.launch.evaluate.task_config import task_config
from elsewhere.launch.world import World
from elsewhere.models.vitdet import Detector
from elsewhere.tests.coco_sets import write_scenes
from elsewhere.tests.composites import compose, drawn_cutouts
from elsewhere.tests.conftest import command_line

SMALL = {
    "model.image_size": 64, "method.detector.width": 16, "method.detector.hidden": 32, "method.detector.anchors": 32,
    "method.detector.regions": 32, "method.detector.window": 3, "method.detector.global_blocks": 1, "optim.lr": 1e-3,
    "optim.batch_size": 2, "optim.steps": 6, "optim.warmup_steps": 2, "loader.workers": 0, "monitor.log_every": 1,
    "monitor.tensorboard": False, "engine.device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, tiny_mae_anywhere):
    """A run of MAE+ of few steps, with a class token and interpolated relative positions."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    settings = {"model.image_size": 32, "model.patch_size": 8, "model.depth": 2, "optim.batch_size": 512}
    return elsewhere.pretrain("demo_adpe", **{**tiny_mae_anywhere, **settings, "run.dir": str(folder)}).run


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Seven images to train on, of which one has no objects, and five held out."""
    folder = tmp_path_factory.mktemp("coco")
    for split, count in (("train", 7), ("val", 5)):
        cutouts = drawn_cutouts(split)
        made = [compose(cutouts, index, (48, 64), most=3) for index in range(count)]
        if split == "train":
            made[3].instances.clear()
        write_scenes(folder, split, iter(made), ["disc", "square", "triangle"], "png")
    return folder


@pytest.fixture
def settings(tmp_path, pretrained, coco):
    return {**SMALL, "init.from": str(pretrained), "data.path": str(coco), "run.dir": str(tmp_path / "run")}


def configured(settings):
    return task_config("detect", settings, "detect", "detect")


def test_the_encoder_starts_with_the_weights_of_the_checkpoint_in_windows_without_its_class_token(settings, pretrained):
    config, theirs = configured(settings), elsewhere.load(pretrained)
    parts = Detection().assemble(config, World(), None, None)
    assert "4x4 resampled to 8x8" in Detection().start(config, parts)
    ours = parts.method.encoder
    assert theirs.num_prefix_tokens == 1 and ours.num_prefix_tokens == 0
    assert ours.blocks[0].window == 3 and ours.relative.lookup == "interpolated"
    for number in range(2):
        found, expected = ours.blocks[number].attn, theirs.blocks[number].attn
        assert torch.equal(found.qkv.weight, expected.qkv.weight)
        assert torch.equal(found.relative_k.table, expected.relative_k.table[..., :-1])


def test_a_run_measures_boxes_and_masks_at_its_end(settings):
    result = detect("detect", **settings)
    assert result.complete and result.steps == 6
    after = json.loads((result.run / "results.json").read_text())["after"]
    assert after["images"] == 5
    for kind in ("box", "mask"):
        for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
            assert after[f"{kind}_{name}"] is None or 0 <= after[f"{kind}_{name}"] <= 1
    assert set(after["categories"]) == {"disc", "square", "triangle"}


@pytest.mark.long
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(settings, tmp_path, losses, monkeypatch):
    settings |= {"model.drop_path": 0.3, "method.detector.regions": 12, "method.detector.anchors": 12}
    whole = detect("detect", **{**settings, "run.dir": str(tmp_path / "whole")})
    calls, real = [], DdpEngine.step

    def stop_once(self, *given):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(DdpEngine, "step", stop_once)
    with pytest.raises(KeyboardInterrupt):
        detect("detect", **{**settings, "checkpoint.every_steps": 3})
    resumed = detect("detect", **settings)
    assert losses(resumed.run) == losses(whole.run) and resumed.after == whole.after


@pytest.mark.long
def test_it_is_measured_and_drawn_alone_on_the_command_line(settings, tmp_path, capsys):
    settings |= {"method.detector.head": "cascade", "method.detector.masks": False, "optim.steps": 2}
    assert main(["detect", "detect", *command_line(settings)]) == 0
    drawn = tmp_path / "drawn"
    assert main(["detect", "detect", *command_line(settings), "--evaluate", "--draw", str(drawn)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("average precision")]
    assert len(said) == 2 and said[0] == said[1] and "box AP" in said[0] and "mask" not in said[0]
    assert sorted(path.name for path in drawn.iterdir()) == [f"scene_{i:05}_{i + 1}.png" for i in range(5)]
    assert main(["detect", "detect", *command_line(settings), "--evaluate", "--draw", str(drawn)]) == 2
    assert "not empty; name another folder" in capsys.readouterr().err
    assert main(["detect", "detect", *command_line(settings), "--draw", str(tmp_path / "new")]) == 2
    assert "--draw goes with --evaluate" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_held_out_image_is_measured_once_at_any_number_of_ranks(ranks, coco, monkeypatch):
    """Five images do not divide by three ranks; each rank's part is asked for by itself, the first rank's last."""
    settings = {
        **SMALL, "model.size": "nano", "model.patch_size": 8, "model.positions": "learned", "loader.micro_batch": 2,
        "method.detector.score": 0.0, "method.detector.detections": 7, "method.detector.classes": 3,
    }  # fmt: skip
    config = load_config("detect", settings)
    method = build_method(config)
    assert isinstance(method, Detector)
    val = CocoImages(*find_coco(str(coco), "val", None, None))
    monkeypatch.setattr("elsewhere.launch.evaluate.detect.average_precision", lambda *given: {"given": given})
    kept: list[list] = [[], []]
    for rank in reversed(range(ranks)):
        world, calls = World(rank=rank, size=1), iter(kept)
        world.size = ranks
        world.gather_host = lambda value, calls=calls: (part := next(calls), part.append(value), part)[2]
        world.first_decides = lambda build: build()
        engine = DdpEngine.__new__(DdpEngine)
        engine.method, engine.world = method, world
        found = scores(engine, val, config, 0)
    _, ids, records, _, _ = found["given"]
    assert ids == [1, 2, 3, 4, 5] and found["unreadable"] == 0
    assert sorted(record["image_id"] for record in records) == sorted(7 * ids)
    alone = method.predict(*whole_image(val, config), torch.tensor([[48, 64]]))[0]
    of_third = [record["score"] for record in records if record["image_id"] == 3]
    assert of_third == pytest.approx(alone["scores"].tolist(), rel=1e-5)


def whole_image(val, config):
    image, filled, _, _ = WholeImages(val, np.array([2]), (64, 64), "bilinear", fill_of(config), "stop")[0]
    return image[None], filled[None]


def without(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


WRONG = {
    "no weights": ({"init.from": None}, "name a run or a file by init.from=PATH"),
    "another number of classes": ({"method.detector.classes": 80}, "has 3 categories; set it to 3, or leave it out"),
    "no folder": ({"data.path": "nowhere"}, "nowhere/annotations/instances_train*.json must be one file"),
    "two places": ({"data.path": ["a", "b"]}, "give the folder of one COCO set"),
    "patches": ({"model.patch_size": 14, "model.image_size": 56}, "not model.patch_size=14"),
    "a class token": ({"model.class_token": True}, "set model.class_token=false"),
    "crops": ({"data.views": 2}, "data.views belongs to method.kind=mae"),
    "shards": ({"data.source": "shards"}, "data.source=shards does not go with detection"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_sentence(case, settings, capsys):
    change, sentence = WRONG[case]
    given = command_line({key: value for key, value in {**settings, **change}.items() if value is not None})
    assert main(["detect", "detect", *given]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_held_out_images_of_other_categories_are_refused(settings, tmp_path, coco):
    for path in coco.glob("annotations/*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    val = tmp_path / "instances_val.json"
    without(val, lambda content: content["categories"].append({"id": 77, "name": "more"}))
    settings |= {"data.val_annotations": str(val), "data.val_images": str(coco / "val")}
    with pytest.raises(UserError, match="category 77 is in one of them alone"):
        detect("detect", **settings)


def test_a_run_of_other_categories_is_refused(settings, tmp_path, coco, capsys):
    settings |= {"optim.steps": 1, "probe.after": False}
    detect("detect", **settings)
    for path in coco.glob("annotations/*.json"):
        (tmp_path / path.name).write_text(path.read_text())
        without(tmp_path / path.name, lambda content: content["categories"].append({"id": 77, "name": "more"}))
        split = path.stem.removeprefix("instances_")
        prefix = "data." if split == "train" else "data.val_"
        settings |= {prefix + "annotations": str(tmp_path / path.name), prefix + "images": str(coco / split)}
    assert main(["detect", "detect", *command_line(settings), "--evaluate"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "was trained on 3 categories" in said and "has 4" in said


def test_what_is_left_out_is_said(settings, tmp_path, coco, capsys):
    path = tmp_path / "instances_train.json"
    path.write_text((coco / "annotations" / "instances_train.json").read_text())
    without(path, lambda content: content["annotations"][0].update(bbox=[60, 2, 30, 7]))
    settings |= {"data.annotations": str(path), "data.images": str(coco / "train")}
    with pytest.raises(UserError, match="annotation 1 has the box"):
        detect("detect", **settings)
    detect("detect", **{**settings, "data.on_error": "skip", "optim.steps": 1})
    assert "1 boxes outside their image" in " ".join(capsys.readouterr().out.split())


def test_the_rate_falls_to_a_tenth_where_published():
    schedules = build_schedules(load_config("detect_ape_vit_b16", {}), 1000.0)
    # ViTDet: 163,889 and 177,546 of 184,375 steps; here of 400,000.
    rates = [schedules.lr_at(step) for step in (0, 125, 250, 355_599, 355_600, 385_199, 385_200, 399_999)]
    assert rates == pytest.approx([1e-7, 5.005e-5, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6], rel=1e-3)


def test_boxes_and_masks_are_drawn_where_they_are():
    image = np.zeros((60, 80, 3), np.uint8)
    masks = torch.zeros(2, 60, 80, dtype=torch.bool)
    masks[0, 35:45, 35:45] = True
    masks[1, 5:8, 70:75] = True
    found = {"boxes": torch.tensor([[30.0, 30, 50, 50], [65, 2, 78, 10]]), "labels": torch.tensor([2, 1]),
             "scores": torch.tensor([0.9, 0.3]), "masks": masks}  # fmt: skip
    picture = np.asarray(draw_detections(image, found, ["one", "two"]))
    assert picture[50, 50].any() and picture[30, 50].any()  # corners of the box
    assert picture[44, 44].any() and not picture[48, 48].any()  # within the mask, and beside it
    assert not picture[:12].any()  # scores below ½ are not drawn


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "deepspeed engine.deepspeed=zero3"])
def test_two_ranks_of_any_engine_train_as_one_process_does(engine, settings, tmp_path, losses):
    settings |= {"optim.steps": 4, "loader.micro_batch": 1, "engine.precision": "float32"}
    one = detect("detect", **{**settings, "run.dir": str(tmp_path / "one")})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "elsewhere.launch", "detect", "detect", *command_line(settings),
               *f"engine.kind={engine}".split()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(one.run), rel=2e-4)
    after = json.loads(Path(tmp_path / "run" / "results.json").read_text())["after"]
    assert after["images"] == 5 and after["box_AP"] == pytest.approx(one.after["box_AP"], abs=0.02)
