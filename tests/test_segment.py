"""Segmentation runs: from a pre-trained run on composited scenes, resumed to the bit, measured again, drawn."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import elsewhere
from elsewhere.launch.checkpoint import inspect
from elsewhere.launch.cli import main
from elsewhere.launch.engine.ddp import DdpEngine
from elsewhere.launch.errors import UserError
from elsewhere.launch.evaluate.segment import segment
from elsewhere.launch.evaluate.task_config import task_config
from elsewhere.tests.composites import drawn_cutouts, scenes, write_ade
from elsewhere.tests.conftest import command_line

SMALL = {
    "data.maps.zero_is_ignored": True, "data.maps.scale": [64, 16], "model.image_size": 16, "optim.batch_size": 4,
    "optim.steps": 6, "optim.warmup_steps": 2, "method.segmenter.channels": 8, "loader.workers": 0,
    "monitor.log_every": 1, "monitor.tensorboard": False, "engine.device": "cpu", "model.drop_path": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ade")
    for split, count in (("train", 10), ("val", 3)):
        write_ade(folder, split, scenes(drawn_cutouts(split), count, size=(24, 32)), ("disc", "square", "triangle"))
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, tiny_mae_anywhere):
    """An AdPE run of a few steps on twelve colour images: relative positions, a class token."""
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "images").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    settings = {**tiny_mae_anywhere, "data.path": str(folder / "images"), "optim.batch_size": 6, "model.channels": 3,
                "data.mean": None, "data.std": None, "run.dir": str(folder / "run")}  # fmt: skip
    return elsewhere.pretrain("demo_adpe", **settings).run


@pytest.fixture
def settings(tmp_path, pretrained, ade):
    return {**SMALL, "init.from": str(pretrained), "data.path": str(ade), "run.dir": str(tmp_path / "run")}


def test_the_encoder_is_the_checkpoint_s_with_its_positions_on_the_new_grid(settings, pretrained):
    config = task_config("segment", settings, "segment", "segment")
    theirs = elsewhere.load(pretrained)
    assert config.model.relative.terms == "k" and config.model.class_token is True
    ours = elsewhere.load(segment(config).run, recipe=None)
    assert ours.grid == (8, 8) and theirs.grid == (4, 4) and ours.cls_token is not None
    moved = ours.blocks[0].attn.qkv.weight - theirs.blocks[0].attn.qkv.weight
    assert 0 < moved.abs().max() < 0.05


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(settings, tmp_path, losses, monkeypatch):
    whole = segment("segment", **{**settings, "run.dir": str(tmp_path / "whole")})
    calls, real = [], DdpEngine.step

    def stop_once(self, *given):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(DdpEngine, "step", stop_once)
    with pytest.raises(KeyboardInterrupt):
        segment("segment", **{**settings, "checkpoint.every_steps": 3})
    resumed = segment("segment", **settings)
    assert losses(resumed.run) == losses(whole.run) and resumed.after == whole.after


def test_micro_batches_change_nothing_but_rounding(settings, tmp_path, losses):
    settings = {**settings, "method.segmenter.norm": "group"}
    plain = losses(segment("segment", **settings).run)
    cut = losses(segment("segment", **{**settings, "loader.micro_batch": 1, "run.dir": str(tmp_path / "cut")}).run)
    np.testing.assert_allclose(cut, plain, rtol=2e-5)


def test_batch_norm_keeps_its_statistics_in_the_checkpoint(settings):
    result = segment("segment", **settings)
    mean = inspect(Path(result.run) / "checkpoints" / "step-00000006").tensors("method.head.fused.1.running_mean")
    assert len(mean) == 1 and all(values.abs().min() > 0 for values in mean.values())
    assert segment("segment", **settings, measure_only=True).after == result.after


def test_other_micro_batches_are_told_where_batch_norm_would_differ(settings):
    segment("segment", **{**settings, "optim.steps": 2})
    with pytest.raises(UserError, match="norms apart: 1 -> 2"):
        segment("segment", **{**settings, "optim.steps": 2, "loader.micro_batch": 2})


def test_what_is_there_is_measured_again_and_drawn(settings, tmp_path, capsys):
    result = segment("segment", **settings)
    known = json.loads(Path(result.run, "results.json").read_text())["after"]
    assert known == result.after and known["images"] == 3 and set(known["classes"]) == {"background", "disc", "square",
                                                                                       "triangle"}  # fmt: skip
    command = ["segment", "segment", *command_line(settings), "--evaluate", "--draw", str(tmp_path / "drawn")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"mIoU {100 * known['miou']:.2f} %" in said and re.search(r"triangle +\S+ +\S+ +\S+", said)
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 3
    assert main(command) == 2 and "choose a new or empty folder" in capsys.readouterr().err


def test_scales_and_flips_may_be_tested_later(settings):
    once = segment("segment", **settings)
    tested = {"probe.sliding.scales": [0.75, 1.0, 1.5], "probe.sliding.flip": True, "probe.sliding.stride": 9}
    more = segment("segment", **settings, **tested, measure_only=True)
    assert more.after["images"] == once.after["images"] == 3


class Pairs:
    classes = ("dark", "light")

    def __len__(self):
        return 8

    def __getitem__(self, i):
        labels = np.indices((20, 20))[0] // 4 % 2
        return (labels * 200)[..., None].repeat(3, axis=2).astype(np.uint8), labels


def test_a_data_set_of_one_s_own_is_learned(settings):
    """Dark and light stripes: what is found is nearly always right."""
    own = {**settings, "data.path": None, "data.maps.zero_is_ignored": False, "optim.steps": 40, "optim.lr": 5e-3,
           "data.maps.distort": False, "model.drop_path": 0.0}  # fmt: skip
    found = segment("segment", Pairs(), val_dataset=Pairs(), **own).after
    assert found["miou"] > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init.from": None}, "starts from pre-trained weights: name a run or a file by init.from=PATH"),
        ({"data.path": None}, "Say where images and masks are"),
        ({"data.path": "nowhere"}, "nowhere is not a folder"),
        ({"method.segmenter.classes": 7}, "classes=7, but .*classes.txt names 4"),
        ({"method.segmenter.blocks": [0, 1]}, "name four of the blocks"),
        ({"data.maps.zero_is_ignored": False}, "unknown ids"),
        ({"data.crop_scale": [0.1, 1.0]}, "data.crop_scale is not for method.kind=segment"),
        ({"data.mixup": 0.5}, "mixup"),
        ({"model.image_size": 17}, "not divisible"),
        ({"model.relative.terms": "none"}, "relative"),
    ],
)
def test_bad_settings_are_one_sentence(settings, change, message, capsys):
    values = {key: value for key, value in {**settings, **change}.items() if value is not None or key not in change}
    assert main(["segment", "segment", *command_line(values)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and len(said.strip().splitlines()) == 1
    assert re.search(message, said), said


def test_drawing_goes_with_measuring(settings, capsys):
    assert main(["segment", "segment", *command_line(settings), "--draw", "x"]) == 2
    assert "--draw goes with --evaluate" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_two_ranks_train_and_measure_like_one(settings, tmp_path, losses, norm):
    """Also with batch norm, whose statistics are those of both ranks."""
    settings = {**settings, "method.segmenter.norm": norm}
    plain = segment("segment", **{**settings, "run.dir": str(tmp_path / "plain")})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "elsewhere.launch", "segment", "segment", *command_line(settings)]  # fmt: skip
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    np.testing.assert_allclose(losses(settings["run.dir"]), losses(plain.run), rtol=5e-5)
    found = json.loads(Path(settings["run.dir"], "results.json").read_text())["after"]
    assert found["images"] == 3 and found["aacc"] == pytest.approx(plain.after["aacc"], abs=5e-3)


@pytest.mark.long
@pytest.mark.parametrize("engine", [
    {"engine.kind": "fsdp"}, {"engine.kind": "deepspeed", "engine.deepspeed": "zero3"},
    {"engine.activation_checkpointing": "full"}, {"engine.precision": "bfloat16"},
], ids=lambda engine: "-".join(str(v) for v in engine.values()))  # fmt: skip
def test_every_engine_segments_alike(settings, tmp_path, losses, engine):
    """Each in a process of its own: DeepSpeed starts once in a process."""
    plain = losses(segment("segment", **{**settings, "run.dir": str(tmp_path / "plain")}).run)
    command = [sys.executable, "-m", "elsewhere.launch", "segment", "segment", *command_line({**settings, **engine})]
    trained, measured = (
        subprocess.run([*command, *flags], check=True, cwd=tmp_path, capture_output=True, text=True).stdout
        for flags in ([], ["--evaluate"])
    )
    tolerance = 2e-2 if engine.get("engine.precision") else 5e-5
    np.testing.assert_allclose(losses(settings["run.dir"]), plain, rtol=tolerance)
    figures = [line for line in trained.splitlines() if line.startswith("segmentation after")]
    assert figures and figures[-1] in measured.splitlines()
