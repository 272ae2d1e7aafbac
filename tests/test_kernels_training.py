"""Training with Triton's kernels, in the interpreter, is training with the references: by every engine, and compiled.

Run as a program under torchrun this file trains the cases of its number of processes.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
STEPS = 3
# Recipe, processes and settings of every run; heads are of 24 numbers, the fewest that the kernels know.
RECIPES = {
    "StoP": ("demo", {
        "model.heads": 1, "model.patch_size": 1, "mask.context_keep": 18, "method.predictor.width": 12,
        "method.predictor.depth": 1, "method.predictor.heads": 3,
    }),
    "coordinates": ("demo_adpe", {
        "model.heads": 1, "method.decoder.width": 24, "method.decoder.depth": 1, "method.decoder.heads": 1,
    }),
    "keys": ("demo_adpe", {
        "model.heads": 1, "method.decoder.width": 24, "method.decoder.depth": 1, "method.decoder.heads": 1,
        "model.relative.lookup": "hard", "method.adversary.mode": "embedding", "method.adversary.where": "keys",
    }),
}  # fmt: skip
TRITON = {"kernels": "triton"}
ENGINES = {
    "reference": (1, {"kernels": "reference"}),
    "one process": (1, TRITON),
    "full checkpointing": (1, {**TRITON, "engine.activation_checkpointing": "full"}),
    "compiled": (1, {**TRITON, "engine.compile": True}),
    "ddp": (2, TRITON),
    "fsdp, selective checkpointing": (
        2, {**TRITON, "engine.kind": "fsdp", "engine.activation_checkpointing": "selective"},
    ),
    "zero 3, full checkpointing": (
        2,
        {
            **TRITON, "engine.kind": "deepspeed", "engine.deepspeed": "zero3",
            "engine.activation_checkpointing": "full",
        },
    ),
}  # fmt: skip
COMMON = {
    "model.width": 24, "model.depth": 1, "data.path": "digits", "data.views": 1, "loader.workers": 0,
    "optim.batch_size": 4, "optim.epochs": 1, "optim.warmup_epochs": 0, "probe.before": False, "probe.after": False,
    "monitor.log_every": 1, "monitor.tensorboard": False, "monitor.pictures_every": 0, "checkpoint.every_minutes": 0,
    "engine.device": "cpu", "engine.precision": "float32",
}  # fmt: skip


def rank_main(folder):
    """Train every case of this number of processes; runs go to `folder`."""
    import torch
    from sklearn.datasets import load_digits

    from elsewhere.launch.config import load_config
    from elsewhere.launch.pretrain import pretrain

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    pixels = torch.from_numpy(load_digits().images[: 4 * STEPS] / 16).float()[:, None]  # pyright: ignore
    digits = torch.utils.data.TensorDataset(pixels, torch.zeros(4 * STEPS, dtype=torch.int64))
    for engine, (processes, settings) in ENGINES.items():
        for method, (recipe, small) in RECIPES.items():
            if processes == int(os.environ["WORLD_SIZE"]):
                run = str(Path(folder) / f"{engine}|{method}")
                pretrain(load_config(recipe, {**COMMON, **small, **settings, "run.dir": run}), digits)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The losses of every run by engine and method, and what its banner says of kernels."""
    folder = tmp_path_factory.mktemp("kernels")
    said: list[tuple[str, str, str]] = []
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*command, __file__, str(folder)], capture_output=True, text=True, timeout=900, env=environment
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        said += re.findall(r"(?:run  .*/(.*)\|(\w+)  |kernels  +(.*))", done.stdout)
    found = {}
    for path in folder.glob("*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[tuple(path.parent.name.split("|"))] = [row["loss"] for row in rows if "group" not in row]
    banners = {run[:2]: kernels[2] for run, kernels in zip(said[::2], said[1::2], strict=True)}
    return found, banners


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("engine", list(ENGINES)[1:])
def test_losses_are_those_of_the_reference(trained, engine, method):
    losses, _ = trained
    expected = losses["reference", method]
    assert len(expected) == STEPS
    assert losses[engine, method] == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_banner_says_what_computes(trained, engine, method):
    operator = ENGINES[engine][1]["kernels"]
    path = "noise" if method == "StoP" else "relative attention"
    assert trained[1][engine, method] == f"{path}: {operator} (as asked)"


if __name__ == "__main__":
    rank_main(sys.argv[1])
