"""Fine-tuning runs: from a pre-trained run, resumed to the bit, measured exactly once an image, swept."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import elsewhere
from elsewhere.data.images import TorchDataset
from elsewhere.launch.build import build_encoder, build_method, build_optimizer
from elsewhere.launch.cli import main
from elsewhere.launch.config import load_config
from elsewhere.launch.engine.ddp import DdpEngine
from elsewhere.launch.errors import UserError
from elsewhere.launch.evaluate.finetune import accuracy, finetune
from elsewhere.launch.evaluate.task_config import task_config
from elsewhere.launch.world import World
from elsewhere.models.classifier import Classifier
from elsewhere.tests.conftest import TINY, command_line

SMALL = {
    "data.path": "digits", "data.rand_augment": None, "optim.batch_size": 96, "optim.epochs": 1,
    "optim.warmup_epochs": 0, "loader.workers": 0, "monitor.log_every": 1, "monitor.tensorboard": False,
    "probe.every_epochs": 0, "engine.device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A StoP run of a few steps on the digits."""
    settings = {**TINY, "optim.batch_size": 256, "model.init_std": 0.1}
    folder = tmp_path_factory.mktemp("pretrained")
    return elsewhere.pretrain("demo", **{**settings, "run.dir": str(folder / "run")}).run


@pytest.fixture
def settings(tmp_path, pretrained):
    return {**SMALL, "init.from": str(pretrained), "run.dir": str(tmp_path / "run")}


def test_the_model_is_the_checkpoint_s_and_starts_with_its_weights(settings, pretrained):
    config = task_config("finetune", settings, "classify", "finetune")
    theirs = elsewhere.load(pretrained)
    assert (config.model.width, config.model.depth, config.model.class_token) == (24, 2, False)
    started = finetune(config)
    ours = elsewhere.load(started.run)  # a fine-tuned encoder is read like any other
    moved = ours.blocks[0].attn.qkv.weight - theirs.blocks[0].attn.qkv.weight
    assert 0 < moved.abs().max() < 0.05 < theirs.blocks[0].attn.qkv.weight.abs().max()


def test_the_run_s_folder_is_by_the_recipe_s_name(settings):
    del settings["run.dir"]
    assert task_config("cifar10_finetune", settings, "classify", "finetune").run.dir == "runs/cifar10_finetune"


def test_what_is_named_wins_over_the_checkpoint_s(settings):
    config = task_config("finetune", {**settings, "model.image_size": 16, "data.mean": [0.1]}, "classify", "finetune")
    assert config.model.image_size == (16, 16) and config.data.mean == [0.1] and config.model.width == 24


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_an_encoder_with_relative_positions_is_tuned_on_larger_images(tmp_path, tiny_mae, some_digits, pool, capsys):
    """Its tables know offsets and not sizes; its absolute positions are resampled."""
    attack = {"model.relative.terms": "k", "model.relative.lookup": "interpolated",
              "method.adversary.mode": "coordinate"}  # fmt: skip
    run = elsewhere.pretrain("demo_adpe", some_digits, **{**tiny_mae, **attack}).run
    grid = elsewhere.load(run).grid
    more = {"init.from": str(run), "run.dir": str(tmp_path / "tuned"), "optim.steps": 2, "optim.batch_size": 32}
    size = {"model.image_size": 2 * elsewhere.load(run).image_size[0], "method.classifier.pool": pool}
    result = finetune("finetune", **{**SMALL, **more, **size})
    said = capsys.readouterr().out
    assert f"positions {grid[0]}x{grid[1]} resampled to {2 * grid[0]}x{2 * grid[1]}" in said
    assert "relative positions on k" in said and result.after["images"] == 359


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(settings, tmp_path, losses, monkeypatch):
    whole = finetune("finetune", **{**settings, "run.dir": str(tmp_path / "whole")})
    calls, real = [], DdpEngine.step

    def stop_once(self, *given):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(DdpEngine, "step", stop_once)
    with pytest.raises(KeyboardInterrupt):
        finetune("finetune", **{**settings, "checkpoint.every_steps": 4})
    resumed = finetune("finetune", **settings)
    assert losses(resumed.run) == losses(whole.run) and resumed.after == whole.after


@pytest.mark.long
def test_other_drawn_paths_and_mixing_are_part_of_the_loss(settings, tmp_path, losses):
    """Or the test of resuming would hold for runs without them."""
    settings = {**settings, "optim.steps": 2}
    with_all = finetune("finetune", **settings)
    for key in ("model.drop_path", "data.mixup", "data.erase", "data.label_smoothing"):
        changed = {**settings, key: 0.0, "run.dir": str(tmp_path / key)}
        changed |= {"data.cutmix": 0.0} if key == "data.mixup" else {}
        assert losses(finetune("finetune", **changed).run) != losses(with_all.run), key


class Numbered(torch.utils.data.Dataset):
    """Images of one grey level each; their labels are whether that is above the middle."""

    classes = ("dark", "light")

    def __init__(self, count: int):
        self.targets = [int(i % 7 > 3) for i in range(count)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return np.full((8, 8, 3), 30 * (i % 7), dtype=np.uint8), self.targets[i]


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_image_counts_once_at_any_number_of_ranks(ranks, tmp_path):
    """137 images do not divide by ranks or batches; each rank's part is asked for by itself."""
    config = load_config("finetune", {"model.size": "nano", "model.image_size": 8, "model.patch_size": 4,
                                      "model.positions": "learned"})  # fmt: skip
    torch.manual_seed(0)
    method = Classifier(build_encoder(config), 2)
    torch.nn.init.normal_(method.head.weight, std=0.3)
    source = TorchDataset(Numbered(137), 3)
    images = torch.stack([torch.from_numpy(source.read(i)).permute(2, 0, 1) for i in range(137)])
    logits = method.classify(images)
    truth = torch.tensor(Numbered(137).targets)
    parts = []
    for rank in range(ranks):
        world = World(rank=rank, size=1)
        world.size = ranks
        world.gather_host = lambda value: parts.append(value) or parts
        engine = DdpEngine.__new__(DdpEngine)
        engine.method, engine.world = method, world
        found = accuracy(engine, source, config, 0)
    assert found["images"] == 137 and found["unreadable"] == 0
    assert found["top1"] == pytest.approx(float((logits.argmax(1) == truth).double().mean()), abs=1e-6)
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, truth)), rel=1e-4)


def test_measuring_again_gives_the_same_figures(settings, capsys):
    result = finetune("finetune", **settings)
    again = finetune("finetune", **settings, measure_only=True)
    assert again.after == result.after and again.steps == result.steps


def test_a_sweep_trains_each_value_once_and_names_the_best(settings, capsys):
    given = ["finetune", "finetune", *command_line(settings), "--sweep", "optim.blr=1e-5,1e-2"]
    assert main(given) == 0
    folder = settings["run.dir"]
    found = json.loads(Path(folder, "sweep.json").read_text())
    assert found["key"] == "optim.blr" and set(found["runs"]) == {"1e-5", "1e-2"}
    best = max(found["runs"], key=lambda value: found["runs"][value]["top1"])
    assert found["best"] == best and f"The best is optim.blr={best}" in capsys.readouterr().out
    rows = Path(folder, "optim.blr=1e-2", "metrics.jsonl").read_text()
    assert main(given) == 0 and Path(folder, "optim.blr=1e-2", "metrics.jsonl").read_text() == rows


def folder_of_classes(parent: Path) -> Path:
    for name in ("dark", "light"):
        folder = parent / "images" / name
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8), 60 * i, dtype=np.uint8)).save(folder / f"{i}.png")
    return parent / "images"


def test_a_sweep_without_held_out_images_names_no_best(settings, tmp_path, capsys):
    given = {**settings, "data.path": str(folder_of_classes(tmp_path)), "optim.steps": 1, "optim.batch_size": 4,
             "data.holdout": 0.0}  # fmt: skip
    assert main(["finetune", "finetune", *command_line(given), "--sweep", "optim.blr=1e-5,1e-2"]) == 0
    assert "Nothing was measured" in capsys.readouterr().out
    assert json.loads(Path(settings["run.dir"], "sweep.json").read_text())["best"] is None


def test_a_place_to_measure_on_has_labels(settings, tmp_path):
    images = folder_of_classes(tmp_path)
    places = {"data.path": str(images), "data.val_path": str(images / "dark"), "optim.batch_size": 4}
    with pytest.raises(UserError, match="has no labels: give a folder of classes"):
        finetune("finetune", **{**settings, **places})


def test_a_run_of_another_kind_is_not_continued(settings, pretrained):
    with pytest.raises(UserError, match=r"is of method\.kind=jepa, and this recipe of classify: choose another run"):
        finetune("finetune", **{**settings, "run.dir": str(pretrained)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init.from": None}, "starts from pre-trained weights: name a run or a file by init.from=PATH"),
        ({"init.from": "nowhere"}, "nowhere does not exist"),
        ({"method.classifier.classes": 7}, "classifier.classes=7, but data.path has 10 classes"),
        ({"method.classifier.pool": "token"}, "no class token; choose pool=mean"),
        ({"model.width": 48}, "set .* to match|set it to match|as it was trained"),
        ({"model.relative.terms": "k"}, "relative"),
        ({"optim.batch_size": 95}, "a micro-batch of 95 is odd"),
        ({"data.views": 2}, "data.views"),
        (
            {"data.rand_augment": "rand-m9-mstd0.5-inc1"},
            "needs RGB images, and model.channels=1: set data.rand_augment",
        ),
    ],
)
def test_bad_settings_are_one_sentence(settings, change, message, capsys):
    values = {key: value for key, value in {**settings, **change}.items() if value is not None or key not in change}
    assert main(["finetune", "finetune", *command_line(values)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and len(said.strip().splitlines()) == 1
    assert re.search(message, said), said


def test_a_recipe_of_another_kind_names_its_command(settings):
    with pytest.raises(UserError, match="takes one of classify"):
        finetune("demo", **settings)
    with pytest.raises(UserError, match="use `elsewhere finetune`"):
        elsewhere.pretrain("finetune", **settings)


ENGINES = [
    {"engine.kind": "fsdp"}, {"engine.kind": "deepspeed", "engine.deepspeed": "zero2"},
    {"engine.kind": "deepspeed", "engine.deepspeed": "zero3"}, {"engine.compile": True},
    {"engine.activation_checkpointing": "full"}, {"engine.precision": "bfloat16"},
    {"engine.precision": "float16"},
]  # fmt: skip


def start_finetune(settings: dict, ranks: int = 1) -> str:
    """What a fine-tuning in processes of its own printed: DeepSpeed starts once in a process."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    done = subprocess.run(
        [*launcher, "elsewhere.launch", "finetune", "finetune", *command_line(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, cwd=Path(settings["run.dir"]).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: "-".join(str(v) for v in engine.values()))
def test_every_engine_fine_tunes_alike(settings, tmp_path, losses, engine):
    plain = losses(finetune("finetune", **{**settings, "run.dir": str(tmp_path / "plain")}).run)
    start_finetune({**settings, **engine})
    np.testing.assert_allclose(losses(settings["run.dir"]), plain, rtol=2e-2 if "engine.precision" in engine else 2e-5)


@pytest.mark.long
def test_two_ranks_fine_tune_and_measure_as_one(settings, tmp_path, losses):
    """Without mixing, which pairs the images of a rank."""
    settings |= {"data.mixup": 0.0, "data.cutmix": 0.0}
    alone = finetune("finetune", **{**settings, "run.dir": str(tmp_path / "alone")})
    start_finetune(settings, ranks=2)
    np.testing.assert_allclose(losses(settings["run.dir"]), losses(alone.run), rtol=1e-5)
    found = json.loads(Path(settings["run.dir"], "results.json").read_text())["after"]
    assert found["images"] == alone.after["images"] and found["top1"] == pytest.approx(alone.after["top1"], abs=0.01)


def test_the_optimizer_has_its_layers(settings):
    config = task_config("finetune", settings, "classify", "finetune")
    scales = {group["lr_scale"] for group in build_optimizer(config, build_method(config)).param_groups}
    assert sorted(scales, reverse=True) == pytest.approx([0.65**k for k in range(4)])
