"""The deepspeed launcher and torchrun start the same command, and a complaint is heard once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from elsewhere.launch.cli import main

SMALL = {
    "data.path": "digits", "model.width": 24, "model.depth": 1, "model.heads": 3, "method.predictor.width": 12,
    "method.predictor.depth": 1, "method.predictor.heads": 3, "optim.epochs": 1, "optim.warmup_epochs": 0,
    "optim.batch_size": 64, "loader.workers": 0, "probe.before": False, "probe.after": False,
    "monitor.tensorboard": False, "engine.device": "cpu", "engine.kind": "deepspeed", "engine.deepspeed": "zero1",
}  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
DEEPSPEED = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--module"]


def launch(launcher, run, **settings):
    """What two processes print, and their exit status."""
    if launcher is DEEPSPEED and not Path(launcher[0]).exists():
        pytest.skip("the deepspeed command is not beside this Python")
    values = {**SMALL, **settings, "run.dir": str(run)}
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where ssh-less nodes look, too
    done = subprocess.run(
        [*launcher, "elsewhere.launch", "pretrain", "demo", *overrides], capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": beside}, cwd=run.parent,
    )  # fmt: skip
    return done.stdout + done.stderr, done.returncode


def test_the_rank_that_the_deepspeed_launcher_adds_is_taken(capsys):
    assert main(["--local_rank=1", "configs"]) == 0
    assert "demo" in capsys.readouterr().out


@pytest.mark.long
def test_both_launchers_train_alike(tmp_path, losses):
    for name, launcher in (("deepspeed", DEEPSPEED), ("torchrun", TORCHRUN)):
        output, status = launch(launcher, tmp_path / name)
        assert status == 0, output
    assert losses(tmp_path / "deepspeed") == losses(tmp_path / "torchrun")


COMPLAINTS = {
    "clipping": ({"gradient_clipping": 1.0}, {}, "gradient_clipping"),
    "half precision": ({"fp16": {"enabled": True}}, {}, "engine.precision"),
    "replicas": ({}, {"engine.kind": "fsdp", "engine.deepspeed": "zero2", "engine.replicas": 3}, "engine.replicas=3"),
    "batch": ({}, {"optim.batch_size": 33}, "optim.batch_size=33"),
}


@pytest.mark.long
@pytest.mark.parametrize("case", COMPLAINTS)
def test_a_complaint_is_one_sentence_once(case, tmp_path):
    file, settings, expected = COMPLAINTS[case]
    if file:
        path = tmp_path / "mine.json"
        path.write_text(json.dumps({**file, "zero_optimization": {"stage": 1}}))
        settings = {**settings, "engine.deepspeed": str(path)}
    output, status = launch(TORCHRUN, tmp_path / "run", **settings)
    said = [line for line in output.splitlines() if line.startswith("elsewhere: ")]
    assert status != 0 and len(said) == 1 and expected in said[0], output
    assert "elsewhere/launch" not in output.replace("elsewhere.launch", "")  # no traceback of ours


@pytest.mark.long
def test_another_model_is_refused_by_every_engine(tmp_path):
    output, status = launch(TORCHRUN, tmp_path / "run")
    assert status == 0, output
    for name, settings in {
        "fsdp": {"engine.kind": "fsdp", "engine.deepspeed": "zero2"},
        "zero3": {"engine.deepspeed": "zero3"},
    }.items():
        shutil.copytree(tmp_path / "run", tmp_path / name)
        output, status = launch(TORCHRUN, tmp_path / name, **{**settings, "model.width": 36})
        said = [line for line in output.splitlines() if line.startswith("elsewhere: ")]
        assert status != 0 and len(said) == 1 and "model.width: 24 -> 36" in said[0], output
