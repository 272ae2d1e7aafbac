"""The commands of README and docs run, on small pictures with a small model, but for those that other tests run."""

import glob
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from elsewhere.launch.cli import main
from elsewhere.launch.config import load_config, recipe_names
from elsewhere.tests.coco_sets import write_scenes
from elsewhere.tests.composites import compose, drawn_cutouts, scenes, write_ade
from elsewhere.tests.conftest import command_line
from elsewhere.tests.test_docs import ALL, arguments

pytestmark = pytest.mark.long

# What is not run here, and the test that does.
ELSEWHERE = {
    r"--node-rank|--hostfile": "test_cluster", r"--supervise": "test_supervise", r"https://": "test_webdataset",
    r"^bench step": "test_bench_step", r"^bench all": "test_bench_all", r"^bench kernels": "test_bench_kernels",
    r"^bench data": "test_bench_data", r"^bench released": "test_bench_released",
    r"^bench scaling": "test_bench_scaling", r"^reproduce": "test_reproduce", r"^zoo \w": "test_zoo",
    r"=timm:": "test_transfer", r"monitor\.wandb": "test_sinks", r"^consolidate DIR": "test_zero_files",
}  # fmt: skip
# Shown for how they are refused.
REFUSED = r"--list bad\.txt|val_path=nine|--pool class|pca,reconstruction|--to mae|from=demo_hf"
PLACES = {
    "/data/shards/train": "shards", "/data/shards/val": "held", "/data/shards": "shards", "/data/ade20k": "scenes",
    "/data/ADEChallengeData2016": "scenes", "/data/coco": "trees", "/data/imagenet/train": "photos/train",
    "/data/imagenet/val": "photos/val", "/data/imagenet": "photos", "/data/birds": "photos", "/data/mine": "photos",
    "/data/photos": "photos", "cifar10:FOLDER": "photos", "cifar10:DIR": "photos", "/shared": "shared",
}  # fmt: skip
RUNS = r"\b(?:runs|shared)/\w+|\bRUN\b|(?<![\w./-])(?:stop|pre)(?![\w./-])"
ENCODER = {"model.size": "nano", "model.depth": 2, "model.image_size": 32, "model.patch_size": 8}
SHORT = {
    "optim.batch_size": 8, "loader.micro_batch": 4, "optim.steps": 2, "optim.warmup_steps": 0, "loader.workers": 0,
    "probe.before": False, "monitor.tensorboard": False, "engine.device": "cpu", "engine.compile": False,
}  # fmt: skip
SMALL = {
    "jepa": {
        **ENCODER, "method.predictor.width": 24, "method.predictor.depth": 1, "method.predictor.heads": 3,
        "mask.target_scale": [0.2, 0.3], "mask.context_keep": 6,
    },
    "mae": {**ENCODER, "method.decoder.width": 24, "method.decoder.depth": 1, "method.decoder.heads": 3},
    "classify": {"model.image_size": 32},
    "segment": {"model.image_size": 32, "data.maps.scale": [128, 32], "method.segmenter.channels": 8,
                "data.maps.zero_is_ignored": True, "optim.batch_size": 4},
    "detect": {
        "model.image_size": 64, "method.detector.width": 16, "method.detector.hidden": 32,
        "method.detector.anchors": 32, "method.detector.regions": 32, "method.detector.window": 2,
        "method.detector.global_blocks": 1, "optim.batch_size": 4,
    },
}  # fmt: skip
SMALL["mae_plus"] = SMALL["mae"]
TRAINS = ("pretrain", "finetune", "segment", "detect")


def write_pictures(folder):
    """Twenty pictures of each of three classes to train on and to hold out, in colours of their own."""
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "horse", "ship")):
            (folder / split / name).mkdir(parents=True)
            for i in range(20):
                pixels = np.random.default_rng(100 * label + i).integers(0, 128, (32, 32, 3))
                pixels[..., label] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i:05}.png")


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Pictures, shards, scenes with masks and with boxes, a run, and files made of it."""
    room = tmp_path_factory.mktemp("room")
    write_pictures(room / "photos")
    for split, folder in (("train", "shards/train"), ("val", "shards/val")):
        assert main(["shards", "write", str(room / "photos"), str(room / folder), "--split", split]) == 0
    names = ("disc", "square", "triangle")
    for split, count in (("train", 6), ("val", 3)):
        cutouts = drawn_cutouts(split)
        write_ade(room / "scenes", split, scenes(cutouts, count, size=(48, 64)), names)
        write_scenes(room / "trees", split, (compose(cutouts, i, (48, 64), most=3) for i in range(count)), names)
    settings = {**SMALL["jepa"], **SHORT, "probe.after": False, "data.path": str(room / "photos")}
    settings |= {"data.mean": [0.5] * 3, "data.std": [0.3] * 3, "monitor.tensorboard": True}
    assert main(["pretrain", "stop_vit_b16", *command_line(settings), f"run.dir={room / 'run'}"]) == 0
    assert main(["export", str(room / "run"), "--to", "hf", "-o", str(room / "demo_hf")]) == 0
    settings = {**SMALL["mae"], **SHORT, "probe.after": False, "data.path": str(room / "photos")}
    for kind in ("ape", "rpe"):
        assert main(["pretrain", f"maeplus_{kind}_vit_b16", *command_line(settings), f"run.dir={room / kind}"]) == 0
    assert main(["consolidate", str(room / "rpe"), "-o", str(room / "encoder.safetensors")]) == 0
    assert main(["export", str(room / "rpe"), "--to", "mae", "-o", str(room / "checkpoint-399.pth")]) == 0
    return room


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def furnish(folder, room, words):
    """Put into `folder` what documentation takes for granted, but for what a command is to write."""
    things = {name: room / name for name in ("photos", "scenes", "trees", "encoder.safetensors", "demo_hf")}
    things |= {"checkpoint-399.pth": room / "checkpoint-399.pth", "cifar": room / "photos", "cifar10": room / "photos"}
    things |= {"folder": room / "photos" / "val" / "cat", "photo.jpg": room / "photos" / "val" / "cat" / "00000.png"}
    if words[:2] != ["shards", "write"]:
        things |= {"shards": room / "shards"}
    written = words[words.index("-o") + 1] if "-o" in words else None
    for name, thing in things.items():
        if name != written:
            (folder / name).symlink_to(thing)
    if written != "mine.yaml":
        (folder / "mine.yaml").write_text("base: stop_vit_b16\ndata: {path: photos}\n")
    (folder / "bad.txt").write_text("nowhere.png\n")
    for name in ("one", "two", "three"):
        (folder / "nine" / "val" / name).mkdir(parents=True)
    read = [word.removeprefix("init.from=") for word in words if not word.startswith("run.dir=")]
    for name in {found for word in read for found in re.findall(rf"^(?:{RUNS})", word)}:
        places = [folder / name / "a", folder / name / "b"] if name == "runs/finetune" else [folder / name]
        for place in places:
            shutil.copytree(room / ("ape" if "_ape_" in name else "run"), place)


def placed(word):
    """A word with a place that is here."""
    for place, here in PLACES.items():
        word = re.sub(rf"(^|=){re.escape(place)}(?=/|$)", rf"\g<1>{here}", word)
    return re.sub(r"step-\d{8}", "step-00000002", word)


def shrunk(words):
    """A training command with as small a model as it takes; what the documentation sets otherwise stays."""
    recipe = words[1]
    kind = load_config(recipe if recipe in recipe_names() else "stop_vit_b16", []).method.kind
    settings = dict(SHORT) if recipe == "demo" else {**SHORT, **SMALL[kind]}
    if words[0] == "pretrain":
        settings |= {"probe.after": False}
        if recipe not in ("demo", "mine.yaml"):
            settings |= {"data.path": "photos"} if not any(word.startswith("data.path=") for word in words) else {}
    elif "vit_b16" in recipe:  # such a recipe does not take the checkpoint's model
        settings |= {name: ENCODER[name] for name in ("model.size", "model.depth", "model.patch_size")}
    replaced = {*settings, "optim.epochs", "optim.warmup_epochs"}
    return [word for word in words if word.partition("=")[0] not in replaced] + command_line(settings)


def status_of(words):
    """The exit status of a command; those of an engine in a process of their own, which joins a process group."""
    if any(word.startswith("engine.kind=") for word in words):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-m", "elsewhere.launch", *words], env=environment)
        return done.returncode
    return main(words)


@pytest.mark.parametrize(("page", "command"), ALL)
def test_a_command_runs(page, command, room, folder, capfd):
    elsewhere = next((test for pattern, test in ELSEWHERE.items() if re.search(pattern, command)), None)
    if elsewhere:
        assert (Path(__file__).parent / f"{elsewhere}.py").exists()
        pytest.skip(f"{elsewhere} runs it")
    words = arguments(command)
    if words is None or "RECIPE" in words or "key=value" in command:
        pytest.skip("a command with something left out")
    words = [placed(word) for word in words]
    furnish(folder, room, words)
    words = [one for word in words for one in (sorted(glob.glob(word)) if "[" in word and "=" not in word else [word])]
    if words[0] in TRAINS:
        words = shrunk(words)
    if words[0] == "submit" and "--dry-run" not in words:
        words.append("--dry-run")
    if "--evaluate" in words:
        assert status_of([word for word in words if word not in ("--evaluate", "--draw", "pictures", "drawings")]) == 0
    status = status_of(words)
    assert status == (2 if re.search(REFUSED, command) else 0), capfd.readouterr().err[-2000:]
