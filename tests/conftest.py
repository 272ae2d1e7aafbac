"""Golden cases for tests: every case of a pattern that stands in the folder named by ELSEWHERE_GOLDEN."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# Triton decides when it is imported how kernels are defined: without a GPU they shall run on the CPU, in Python.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from elsewhere.launch.optim import Freeze, Schedules, mae_first_counter

GOLDEN = Path(os.environ.get("ELSEWHERE_GOLDEN", Path(__file__).parent / "golden"))
torch.set_num_threads(1)


@dataclass
class Golden:
    """One recorded case: its JSON description and its tensors by name."""

    name: str
    about: dict
    tensors: dict[str, torch.Tensor]

    @property
    def config(self) -> dict:
        return self.about["config"]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors whose name starts with `prefix.`, without it."""
        return {k.removeprefix(prefix + "."): v for k, v in self.tensors.items() if k.startswith(prefix + ".")}

    def replay(self, prefix: str) -> list[torch.Tensor]:
        """Tensors `prefix.0`, `prefix.1`, … in order."""
        part = self.part(prefix)
        return [part[str(i)] for i in range(len(part))]


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("golden")
    if marker:
        paths = sorted(GOLDEN.glob(marker.args[0] + ".json"))
        # A folder of one's own may hold some kinds of cases only; ours holds all.
        assert paths or "ELSEWHERE_GOLDEN" in os.environ, f"no golden case {marker.args[0]} in {GOLDEN}"
        metafunc.parametrize("golden", paths, ids=[p.stem for p in paths], indirect=True)


@pytest.fixture
def golden(request) -> Golden:
    path = request.param
    return Golden(path.stem, json.loads(path.read_text()), load_file(path.with_suffix(".safetensors")))


@pytest.fixture
def close():
    """Assert max|found - expected| <= 1e-5 · max(1, max|expected|), naming the tensor."""

    def check(found, expected, name=""):
        assert found.shape == expected.shape, f"{name}: {tuple(found.shape)} is not {tuple(expected.shape)}"
        if expected.numel():
            expected = expected.double()
            bound = 1e-5 * max(1.0, expected.abs().max().item())
            worst = (found.detach().double() - expected).abs().max().item()
            assert worst <= bound, f"{name}: off by {worst:.2e}, allowed {bound:.2e}"

    return check


def without_rounding_noise(name, tensor):
    """Drop the k third of every qkv bias: softmax cancels it, so its gradient is rounding noise (PUBLISHED.md)."""
    if not name.endswith("qkv.bias"):
        return tensor
    third = tensor.numel() // 3
    return torch.cat([tensor[:third], tensor[2 * third :]])


@pytest.fixture
def compare_named(close):
    """Compare two sets of tensors by name, all of them but those whose last name is in `unused`."""

    def compare(found, expected, unused=()):
        compared = 0
        for name, tensor in expected.items():
            if name.rsplit(".", 1)[-1] in unused:
                continue
            assert name in found, f"{name} has no counterpart"
            close(without_rounding_noise(name, found[name]), without_rounding_noise(name, tensor), name)
            compared += 1
        assert compared == len(found), f"not compared: {sorted(set(found) - set(expected))}"

    return compare


def released_schedules(run: dict) -> Schedules:
    """The schedules that a recording's configuration describes in the released code's words."""

    def freeze(which):
        epoch = run.get(f"fix_{which}_thres", -1)
        return Freeze(epoch, run.get(f"fix_{which}_strategy", "const")) if epoch >= 0 else None

    return Schedules(
        steps_per_epoch=run["ipe"], epochs=run["epochs"], warmup_epochs=run["warmup"], lr=run["lr"],
        start_lr=run["start_lr"], final_lr=run["final_lr"], weight_decay=run["wd"],
        final_weight_decay=run["final_wd"], stretch=run["ipe_scale"], freeze_lr=freeze("lr"),
        freeze_weight_decay=freeze("wd"),
    )  # fmt: skip


@pytest.fixture
def schedules_of():
    return released_schedules


def released_mae_schedules(args: dict, steps_per_epoch: int, accumulation: int = 1) -> Schedules:
    """The schedules that the arguments of a recording of MAE or AdPE describe."""
    decay = args.get("weight_decay", 0.0)
    return Schedules(
        steps_per_epoch=steps_per_epoch, epochs=args["epochs"], warmup_epochs=args["warmup_epochs"], lr=args["lr"],
        start_lr=0.0, final_lr=args["min_lr"], weight_decay=decay, final_weight_decay=decay,
        first_counter=mae_first_counter(accumulation), whole_steps=False,
    )  # fmt: skip


@pytest.fixture
def mae_schedules_of():
    return released_mae_schedules


_QUIET = {
    "data.path": "digits",
    "loader.workers": 0,
    "monitor.log_every": 1,
    "monitor.tensorboard": False,
    "probe.before": False,
    "probe.after": False,
}

TINY = {
    "model.width": 24,
    "model.depth": 2,
    "model.heads": 3,
    "model.patch_size": 1,
    "mask.target_scale": [0.15, 0.2],
    "mask.context_keep": 18,
    "method.teacher.momentum": 0.99,
    "method.predictor.width": 12,
    "method.predictor.depth": 1,
    "method.predictor.heads": 3,
    "optim.batch_size": 32,
    "optim.epochs": 1,
    "optim.warmup_epochs": 0.2,
    "optim.lr": 1e-3,
    **_QUIET,
}


@pytest.fixture
def tiny(tmp_path):
    """Settings of a run of seconds on the digits (44 steps an epoch), into `tmp_path/run`, as a dictionary."""
    return {**TINY, "run.dir": str(tmp_path / "run")}


_TINY_MAE = {
    "model.width": 24,
    "model.depth": 1,
    "model.heads": 2,
    "method.decoder.width": 16,
    "method.decoder.depth": 1,
    "method.decoder.heads": 2,
    "optim.batch_size": 16,
    "optim.epochs": 1,
    "optim.warmup_epochs": 0,
    "engine.device": "cpu",
    **_QUIET,
}


@pytest.fixture
def tiny_mae(tmp_path):
    """Settings of a `demo_adpe` of a second or two, into `tmp_path/run`, as a dictionary."""
    return {**_TINY_MAE, "run.dir": str(tmp_path / "run")}


@pytest.fixture(scope="session")
def tiny_mae_anywhere():
    """The settings of `tiny_mae` without the folder."""
    return dict(_TINY_MAE)


@pytest.fixture(scope="session")
def some_digits():
    """96 of the digits as a data set of one's own: six steps of 16."""
    from sklearn.datasets import load_digits

    pixels = load_digits().images[:96]  # pyright: ignore[reportAttributeAccessIssue]
    images = torch.from_numpy(pixels / 16).float()[:, None]
    return torch.utils.data.TensorDataset(images, torch.zeros(96, dtype=torch.int64))


def command_line(settings: dict) -> list[str]:
    """Settings as `key=value` arguments."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def training_rows(run) -> list[dict]:
    """The rows of a run's metrics that belong to training steps."""
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "group" not in row]


@pytest.fixture
def losses():
    """The losses of a run by step, exactly as written; steps must follow one another."""

    def read(run) -> list[float]:
        rows = training_rows(run)
        assert [row["step"] for row in rows] == list(range(len(rows))), "a step is missing or there twice"
        return [row["loss"] for row in rows]

    return read


@pytest.fixture
def start():
    """Start `elsewhere pretrain` with settings as a process of its own, single-threaded; killed at the end."""
    import subprocess
    import sys

    started = []

    def run(settings: dict, *flags: str, ranks: int = 1, recipe: str = "demo") -> subprocess.Popen:
        launcher = [sys.executable, "-m"]
        if ranks > 1:
            launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
        process = subprocess.Popen(
            [*launcher, "elsewhere.launch", "pretrain", recipe, *command_line(settings), *flags],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(settings["run.dir"]).parent,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def wait_for_step():
    """Wait until a run's metrics hold `step`."""
    import time

    def wait(process, run, step: int, seconds: float = 120.0) -> None:
        path, end = Path(run) / "metrics.jsonl", time.monotonic() + seconds
        while not (path.exists() and f'{{"step": {step},' in path.read_text()):
            assert process.poll() is None, f"the run ended before step {step}: {process.communicate()[0]}"
            assert time.monotonic() < end, f"step {step} did not come within {seconds} s"
            time.sleep(0.02)

    return wait
