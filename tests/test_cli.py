"""The command line: what it lists, what it refuses and how, and what importing the package does."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from elsewhere.launch.cli import _parse, _parser, main
from elsewhere.launch.config import Config, load_config, recipe_names
from elsewhere.launch.errors import out_of_memory
from elsewhere.models.jepa import Jepa

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "model.size=nano", "model.width=24", "model.depth=2", "model.heads=2", "method.predictor.width=16",
    "method.predictor.depth=1", "method.predictor.heads=2", "optim.batch_size=16", "optim.epochs=1",
    "optim.warmup_epochs=0", "probe.before=false", "probe.after=false", "loader.workers=0", "engine.device=cpu",
    "monitor.tensorboard=false", "monitor.pictures_every=0", "monitor.collapse_every=0", "monitor.log_every=1",
]  # fmt: skip


@pytest.fixture
def pretrain(tmp_path, capsys):
    """Run a small `elsewhere pretrain demo` in `tmp_path/run`; returns exit status, stdout and stderr."""

    def run(*overrides, recipe="demo"):
        status = main(["pretrain", recipe, *SMALL, f"run.dir={tmp_path / 'run'}", *overrides])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def refused(pretrain, tmp_path):
    """The sentence that refuses a run, which leaves no checkpoint and no result."""

    def run(*overrides, recipe="demo"):
        status, _, err = pretrain(*overrides, recipe=recipe)
        assert status == 2
        assert err.startswith("elsewhere: ") and err.count("\n") == 1 and err.endswith((".\n", "?\n", ")\n")), err
        assert "Traceback" not in err
        left = {path.name for path in (tmp_path / "run").rglob("*")} if (tmp_path / "run").is_dir() else set()
        assert left <= {".lock", "config.yaml", "metrics.jsonl", "checkpoints"}
        return err.removeprefix("elsewhere: ").strip()

    return run


@pytest.fixture
def folder(tmp_path):
    """40 grey images of two classes, those in `unreadable` being none."""

    def make(unreadable=()):
        for i in range(40):
            path = tmp_path / "images" / "ab"[i % 2] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if i in unreadable:
                path.write_bytes(b"no image")
            else:
                pixels = np.random.default_rng(i).integers(0, 256, (12, 12), dtype=np.uint8)
                Image.fromarray(pixels).save(path)
        return f"data.path={tmp_path / 'images'}"

    return make


def records(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def _commands(parser, name=()):
    """Every command and its parts, by the words that call it."""
    yield name
    for action in parser._actions:
        for word, part in (action.choices or {}).items() if isinstance(action.choices, dict) else ():
            yield from _commands(part, (*name, word))


def test_every_command_can_be_asked_for_help(capsys):
    """A percent sign in a text is argparse's, unless it is doubled."""
    commands = list(_commands(_parser()))
    assert ("bench", "step") in commands and ("reproduce",) in commands
    for words in commands:
        with pytest.raises(SystemExit) as ended:
            main([*words, "--help"])
        assert ended.value.code == 0 and "%%" not in capsys.readouterr().out, words


def test_configs_lists_every_recipe_with_a_line(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(load_config(name).about in line for name, line in zip(recipe_names(), lines, strict=True))


def test_show_prints_the_resolved_recipe(capsys):
    assert main(["show", "stop_vit_l16", "optim.lr=1e-3", "seed=4"]) == 0
    shown = Config.model_validate(yaml.safe_load(capsys.readouterr().out))
    assert shown == load_config("stop_vit_l16", ["optim.lr=1e-3", "seed=4"])


def test_a_run_leaves_config_metrics_and_a_checkpoint(pretrain, folder, tmp_path):
    status, out, err = pretrain(folder())
    assert (status, err) == (0, "")
    assert "Finished: 2 steps" in out
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints"} <= names
    assert load_config(str(tmp_path / "run" / "config.yaml")).optim.batch_size == 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "demos"], "did you mean demo?"),
        (["show", "demo", "optim.lrr=1"], "did you mean optim.lr?"),
        (["pretrain", "demo", "optim.kind=sgd"], "choose 'adamw' or 'apex_adamw'."),
        (["pretrain", "demo", "optim.lr"], "write key=value"),
    ],
)
def test_what_is_not_known_is_refused_in_a_sentence(arguments, words, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("elsewhere: ") and err.count("\n") == 1 and words in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required: COMMAND (`elsewhere --help`"),
        (["pretrian", "demo"], "there is no pretrian; did you mean pretrain? There are 'pretrain'"),
        (["pretrain"], "the following arguments are required: recipe (`elsewhere pretrain --help`"),
        (["bench", "everything"], "there is no everything; there are 'masks'"),
        (["show", "demo", "--flat"], "unrecognized arguments: --flat (`elsewhere --help`"),
    ],
    ids=str,
)
def test_a_wrong_command_ends_with_one_line_that_names_its_help(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith(f"elsewhere: {complaint}") and err.count("\n") == 1, err


def test_a_missing_folder(refused, tmp_path):
    assert refused(f"data.path={tmp_path}/missing") == (
        f"data.path={tmp_path}/missing does not exist: give a folder of images, cifar10:FOLDER for a "
        "torchvision set, or `digits`."
    )


def test_a_missing_validation_folder(refused, folder, tmp_path):
    message = refused(folder(), f"data.val_path={tmp_path}/missing")
    assert message.startswith(f"data.val_path={tmp_path}/missing does not exist")


def test_an_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no images (jpg, " in refused(f"data.path={tmp_path}/empty")


def test_a_file_in_the_place_of_a_folder(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "is a file, not a folder" in refused(f"data.path={tmp_path}/file")


def test_no_path(refused):
    assert refused("data.path=null").startswith("Say where the images are: data.path=FOLDER")


def test_an_unreadable_image_stops_a_run(refused, folder, tmp_path):
    message = refused(folder(range(10, 30)), "data.on_error=stop")
    assert message.startswith(f"An image cannot be read ({tmp_path}/images/") and "data.on_error=skip" in message


@pytest.mark.parametrize("micro", [16, 4])
def test_unreadable_images_are_skipped_and_counted(micro, pretrain, folder, tmp_path):
    settings = "data.on_error=skip", "data.holdout=0", f"loader.micro_batch={micro}"
    status, out, err = pretrain(folder((10, 11, 20, 21)), *settings)
    assert (status, err) == (0, "")
    counted = sum(record.get("skipped_images", 0) for record in records(tmp_path))
    assert counted == out.count("Skipped an unreadable image") > 0


def test_skipped_images_are_named_in_a_line(pretrain, folder, tmp_path):
    _, out, _ = pretrain(folder((10, 11, 20, 21)), "data.on_error=skip", "data.holdout=0")
    for line in (line for line in out.splitlines() if line.startswith("Skipped")):
        assert f" {tmp_path}/images/" in line and line.endswith("not an image in a known format")


def test_a_skipped_image_is_named_once(pretrain, folder):
    _, out, _ = pretrain(folder([10]), "data.on_error=skip", "data.holdout=0", "optim.epochs=3")
    assert out.count("Skipped an unreadable image") == 1


def test_too_many_unreadable_images_stop_a_run(refused, folder, tmp_path):
    images = folder((10, 11, 20, 21))
    message = refused(images, "data.on_error=skip", "data.holdout=0", "data.max_corrupt=3", "monitor.log_every=1")
    assert "cannot be read, more than data.max_corrupt=3" in message and f"{tmp_path}/images/" in message


def test_as_many_unreadable_images_as_are_allowed(pretrain, folder):
    settings = "data.on_error=skip", "data.holdout=0", "optim.epochs=2", "data.remainder=drop", "data.max_corrupt=2"
    status, _, _ = pretrain(folder((10, 20)), *settings)
    assert status == 0


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_folder_of_unreadable_images_alone(refused, folder, on_error):
    assert "cannot be read" in refused(folder(range(40)), f"data.on_error={on_error}")


def test_the_first_image_may_be_unreadable(pretrain, folder):
    """It is looked at before all others."""
    status, _, err = pretrain(folder([0]), "data.on_error=skip", "data.holdout=0")
    assert (status, err) == (0, "")


def test_a_size_that_the_patch_does_not_divide(refused):
    expected = "model.image_size 9x9 is not divisible by model.patch_size=2; use 8x8, or another patch."
    assert refused("model.image_size=9", "model.patch_size=2") == expected


@pytest.mark.parametrize(
    "overrides",
    [
        ["mask.context_keep=60"], ["mask.target_scale=[0.9,0.95]"], ["mask.target_aspect=[20,30]"],
        ["mask.setting=published", "mask.target_scale=[0.01,0.02]"],
    ],
    ids=str,
)  # fmt: skip
def test_masks_that_cannot_fit(refused, overrides):
    assert "mask." in refused(*overrides)


def test_a_batch_larger_than_the_data(refused, folder):
    assert "less than one optim.batch_size=64: set optim.batch_size to 36 or less" in refused(
        folder(), "optim.batch_size=64"
    )


def test_a_micro_batch_that_does_not_divide(refused):
    assert "set optim.batch_size to 15 or 20, or loader.micro_batch to 2 or 4 or 8" in refused("loader.micro_batch=5")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.width=25", "model.width=25 is not divisible by model.heads=2"),
        ("model.width=26", "model.width=26 is not a multiple of 4"),
        ("method.predictor.heads=5", "method.predictor.width=16 is not divisible by method.predictor.heads=5"),
        ("method.predictor.width=18", "method.predictor.width=18 is not a multiple of 4"),
        ("method.teacher.layers=3", "method.teacher.layers=3 is more than the 2 layers of the encoder"),
        ("data.mean=[0.1,0.2]", "data.mean has 2 numbers for model.channels=1"),
        ("optim.betas=[0.9,1.0]", "optim.betas.1=1.0 is not possible"),
        ("model.channels=2", "model.channels=1"),
        ("init.from=/nowhere", "/nowhere does not exist"),
    ],
)
def test_settings_that_do_not_fit_together(refused, override, words):
    assert words in refused(override)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("override", ["model.norm=apex", "optim.kind=apex_adamw", "engine.device=cuda"])
def test_what_needs_a_gpu_is_refused_without_one(refused, override):
    message = refused(override)
    assert override.split("=")[0] in message and "NVIDIA GPU" in message and "visible; use" in message


@pytest.mark.parametrize("override", ["model.norm=apex", "optim.kind=apex_adamw"])
def test_apex_is_refused_without_its_package(refused, override, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "apex", None)
    monkeypatch.setattr("elsewhere.launch.world.pick_device", lambda *_: torch.device("cpu"))
    message = refused(override)
    assert f"{override} needs NVIDIA Apex" in message and "on PyPI is something else" in message


def test_a_run_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["pretrain", "demo", *SMALL, f"run.dir={tmp_path / 'file'}"]) == 2
    assert "run.dir" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_refused_start_overwrites_nothing(pretrain, folder, tmp_path):
    """The same command with another size of model finds a run and lets it be."""
    pretrain(folder())
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    status, _, err = pretrain(folder(), "model.width=32")
    assert status == 2 and "model.width: 24 -> 32" in err and "or choose another run.dir" in err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


IMPORTS = """
import importlib.util, json, sys
assert sys.path[0] == ""
import elsewhere
loaded = sorted({"torch", "numpy", "yaml", "pydantic"} & set(sys.modules))
import elsewhere.launch.cli
later = sorted({"torch", "numpy"} & set(sys.modules))
found = {name: getattr(importlib.util.find_spec(name), "origin", None) for name in ("kernels", "data", "models")}
import transformers
from transformers import ViTConfig, ViTModel
print(json.dumps({"loaded": loaded, "later": later, "found": found, "path": sys.path,
                  "vit": ViTModel.__name__}))
"""


@pytest.fixture(scope="module")
def imports():
    """What a Python started in the checkout finds after it imported the package and its command line."""
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_importing_the_package_loads_nothing_large(imports):
    assert imports["loaded"] == []


@pytest.mark.slow
def test_the_command_line_loads_torch_only_when_it_trains(imports):
    assert imports["later"] == []


@pytest.mark.slow
def test_rooms_of_the_checkout_are_no_modules_of_the_top_level(imports):
    for name, origin in imports["found"].items():
        assert origin is None or not Path(origin).is_relative_to(ROOT), name


@pytest.mark.slow
def test_the_checkout_leaves_the_search_path(imports):
    assert "" not in imports["path"] and str(ROOT) not in imports["path"]


@pytest.mark.slow
def test_transformers_works_beside_the_checkout(imports):
    assert imports["vit"] == "ViTModel"


@pytest.mark.slow
def test_a_module_run_from_the_checkout_refuses_like_the_command():
    command = [sys.executable, "-m", "elsewhere.launch", "pretrain", "demo", "optim.lrr=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "elsewhere: There is no setting optim.lrr; did you mean optim.lr?\n"


def test_settings_may_follow_flags(capsys):
    assert main(["pretrain", "demo", "--fresh", "optim.lrr=1"]) == 2
    assert "There is no setting optim.lrr; did you mean optim.lr?" in capsys.readouterr().err


def test_memory_that_runs_out_is_one_sentence(monkeypatch, pretrain):
    monkeypatch.setattr(Jepa, "predict", lambda *_: torch.empty(1 << 60))
    status, _, err = pretrain()
    assert status == 2 and "Traceback" not in err
    assert re.search(r"elsewhere: Memory ran out \(.*\): lower loader\.micro_batch \(now 16;", err)


def test_memory_of_a_gpu_that_runs_out_is_told_by_what_was_asked_for():
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 is free."
    found = str(out_of_memory(torch.OutOfMemoryError(text), 64))
    assert found.startswith("Memory ran out (Tried to allocate 2.00 GiB): lower loader.micro_batch (now 64;")


@pytest.mark.parametrize(
    "command", [["doctor"], ["bench", "masks"], ["plan", "demo", "--gpus", "1", "--gpu", "h100-80g"]], ids=str
)
def test_json_writes_over_nothing_and_says_so_before_any_work(command, tmp_path, capsys):
    there = tmp_path / "there.json"
    there.write_text("kept")
    for path, why in ((there, "there already"), (tmp_path, "there already"), (tmp_path / "no" / "x", "not writable")):
        assert main([*command, "--json", str(path)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"elsewhere: --json {path}") and why in err
    assert there.read_text() == "kept"


@pytest.mark.parametrize(
    ("words", "name"),
    [(["pretrain", "demo", "--fresh", "seed=1"], "overrides"),
     (["bench", "step", "demo", "--steps", "1", "seed=1"], "recipes"),
     (["bench", "released", "adpe", "--rounds", "1", "seed=1"], "cases")],
    ids=str,
)  # fmt: skip
def test_settings_are_heard_behind_flags_by_every_name_they_have(words, name):
    assert vars(_parse(words))[name][-1] == "seed=1"
