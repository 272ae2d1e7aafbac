"""All engines train alike: the same recipe, seed and global batch, over 20 steps, with micro-batches and clipping.

So does a run that another engine takes up, with another number of processes, after 10 of them. Run as a program under
torchrun this file trains the cases of its number of processes; `--table` prints what docs/benchmarks/parity.md keeps.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = {"StoP": "demo", "AdPE": "demo_adpe"}
PRECISIONS = ("float32", "bfloat16", "float16")
# Processes and settings of each engine; the first is what the others are compared with.
ENGINES = {
    "one process": (1, {}),
    "ddp": (2, {}),
    "fsdp": (2, {"engine.kind": "fsdp"}),
    "fsdp, offloaded": (2, {"engine.kind": "fsdp", "engine.offload": True}),
    "hsdp 2 × 2": (4, {"engine.kind": "fsdp", "engine.replicas": 2}),
    **{f"zero {stage}": (2, {"engine.kind": "deepspeed", "engine.deepspeed": f"zero{stage}"}) for stage in range(4)},
}
# In float32 alone.
ENGINES_BESIDE = {
    "fsdp, one rank": (1, {"engine.kind": "fsdp"}),
    "zero 3, one rank": (1, {"engine.kind": "deepspeed", "engine.deepspeed": "zero3"}),
    "fsdp, full checkpointing": (2, {"engine.kind": "fsdp", "engine.activation_checkpointing": "full"}),
    "zero 3, selective checkpointing": (
        2, {"engine.kind": "deepspeed", "engine.deepspeed": "zero3", "engine.activation_checkpointing": "selective"},
    ),
}  # fmt: skip
ALL = {**ENGINES, **ENGINES_BESIDE}
RESUMED = [
    ("one process", "zero 0"), ("zero 0", "fsdp"), ("fsdp", "zero 2"), ("zero 2", "ddp"), ("ddp", "zero 3"),
    ("zero 3", "one process"), ("zero 1", "hsdp 2 × 2"), ("hsdp 2 × 2", "fsdp, offloaded"),
    ("fsdp, offloaded", "zero 3, one rank"), ("zero 3, one rank", "zero 1"),
]  # fmt: skip
SMALL = {
    "demo": {
        "model.depth": 2, "model.heads": 3, "model.patch_size": 1, "mask.context_keep": 18,
        "method.teacher.momentum": 0.99, "method.predictor.width": 12, "method.predictor.depth": 1,
        "method.predictor.heads": 3,
    },
    "demo_adpe": {
        "model.depth": 1, "model.heads": 2, "method.decoder.width": 16, "method.decoder.depth": 1,
        "method.decoder.heads": 2,
    },
}  # fmt: skip
COMMON = {
    "model.width": 24, "data.path": "digits", "loader.workers": 0, "loader.micro_batch": 4, "optim.batch_size": 32,
    "optim.epochs": 1, "optim.warmup_epochs": 0, "optim.clip_grad": 0.5, "probe.before": False, "probe.after": False,
    "monitor.log_every": 1, "monitor.tensorboard": False, "monitor.pictures_every": 0, "checkpoint.every_minutes": 0,
    "checkpoint.every_steps": 10, "checkpoint.keep": 9, "engine.device": "cpu",
    # A rank was silent for more than the usual 22 s where DeepSpeed compiled its extension on a busy machine.
    "engine.silence_seconds": 240,
}  # fmt: skip


def cases(processes):
    """Folder, recipe and settings of every run with this number of processes that starts anew."""
    for engine, (ranks, settings) in ALL.items():
        for recipe in RECIPES:
            for precision in PRECISIONS if engine in ENGINES else PRECISIONS[:1]:
                if ranks == processes and (engine, precision) != ("zero 0", "float16"):  # refused, see test_ds_settings
                    yield f"{engine}|{recipe}|{precision}", RECIPES[recipe], {**settings, "engine.precision": precision}


def resumed_cases(processes):
    """The same of every run that another engine began."""
    for first, second in RESUMED:
        ranks, settings = ALL[second]
        for recipe in RECIPES:
            if ranks == processes:
                name = f"{first} -> {second}|{recipe}|float32"
                yield name, RECIPES[recipe], {**settings, "engine.precision": "float32"}


def rank_main(folder, chosen):
    """Train every chosen case of this number of processes; runs go to `folder`."""
    import torch
    from sklearn.datasets import load_digits

    from elsewhere.launch.config import load_config
    from elsewhere.launch.pretrain import pretrain

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")  # one for all cases
    pixels = torch.from_numpy(load_digits().images[:640] / 16).float()[:, None]  # pyright: ignore
    digits = torch.utils.data.TensorDataset(pixels, torch.zeros(640, dtype=torch.int64))
    for name, recipe, settings in chosen(int(os.environ["WORLD_SIZE"])):
        run = Path(folder) / name
        config = load_config(recipe, {**COMMON, **SMALL[recipe], **settings, "run.dir": str(run)})
        pretrain(config, digits)


def begin_resumed(folder):
    """Copy what each case that is taken up starts from: the run of the first engine, up to its tenth step."""
    for first, second in RESUMED:
        for recipe in RECIPES:
            run = folder / f"{first} -> {second}|{recipe}|float32"
            shutil.copytree(folder / f"{first}|{recipe}|float32", run)
            (run / "results.json").unlink()
            shutil.rmtree(run / "checkpoints" / "step-00000020")


def train_all(folder):
    """The losses of all cases by name."""
    for processes in (1, 2, 4):
        start(folder, processes, "--new")
    begin_resumed(folder)
    for processes in (1, 2, 4):
        start(folder, processes, "--resumed")
    found = {}
    for path in folder.glob("*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name] = [row["loss"] for row in rows if "group" not in row]
    return found


def start(folder, processes, which):
    """Train in so many processes, `--new` runs or `--resumed` ones."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, __file__, which, str(folder)], capture_output=True, text=True, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def difference(losses, engine, recipe, precision):
    """The largest difference of a step's loss to that of one process."""
    one, other = (losses[f"{name}|{recipe}|{precision}"] for name in ("one process", engine))
    assert len(one) == 20
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def losses(folder):
    return train_all(folder)


OTHERS = [engine for engine in ENGINES if engine != "one process"]
CHANGED = [*OTHERS, *ENGINES_BESIDE, *(f"{first} -> {second}" for first, second in RESUMED)]
pytestmark = pytest.mark.long


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("engine", CHANGED)
def test_an_engine_gives_the_losses_of_one_process(engine, recipe, losses):
    assert difference(losses, engine, recipe, "float32") <= 1e-5


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("engine", CHANGED)
def test_an_engine_ends_with_the_tensors_of_one_process(engine, recipe, losses, folder):
    """An adversary or a teacher that stood still would hardly show in 20 losses."""
    from elsewhere.launch.tensor_files import read_tensors

    runs = [folder / f"{name}|{recipe}|float32" for name in ("one process", engine)]
    one, other = (read_tensors(run / "checkpoints" / "step-00000020", lambda name: True) for run in runs)
    assert one.keys() == other.keys()
    still = ("method.teacher.", "adversary.", "exp_avg")  # Adam's steps make more of a rounding than these
    for name, tensor in one.items():
        worst = (tensor - other[name]).abs().max().item()
        assert worst <= (1e-6 if name.startswith(still) else 1e-4), f"{name}: {worst:.1e}"


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("engine", [engine for engine in OTHERS if engine != "ddp"])
def test_in_half_precision_an_engine_differs_as_ddp_does(engine, recipe, precision, losses):
    """At most three times as much as two ranks of ddp differ from one process, or as the loss is rounded.

    AdPE's is rounded more on its way: seen with torch 2.14.1, where ddp happens to round as one process does (1.2e-7 at
    most in float16, 2.2e-5 in bfloat16), the others differ by up to 4.5e-5 and 2.0e-4. What an engine gets wrong shows
    in float32, above.
    """
    if (engine, precision) == ("zero 0", "float16"):
        pytest.skip("refused: DeepSpeed has no hook for our loss scaler at stage 0")
    rounding = 1.2e-7  # float32 near 1
    if recipe == "AdPE":
        rounding = {"float16": 3e-5, "bfloat16": 1e-4}[precision]
    allowed = 3 * max(rounding, difference(losses, "ddp", recipe, precision))
    assert difference(losses, engine, recipe, precision) <= allowed


def print_table(losses):
    columns = [(recipe, precision) for recipe in RECIPES for precision in PRECISIONS]
    print("| engine | " + " | ".join(f"{recipe} {precision}" for recipe, precision in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for engine in (name for name in dict.fromkeys(key.split("|")[0] for key in sorted(losses, key=_place))):
        cells = []
        for recipe, precision in columns:
            there = f"{engine}|{recipe}|{precision}" in losses
            cells.append(f"{difference(losses, engine, recipe, precision):.1e}" if there else "–")
        print(f"| {engine} | " + " | ".join(cells) + " |")


def _place(key):
    engine = key.split("|")[0]
    return list(ALL).index(engine) if engine in ALL else len(ALL)


if __name__ == "__main__":
    if sys.argv[1] == "--table":
        import tempfile

        with tempfile.TemporaryDirectory() as made:
            print_table(train_all(Path(made)))
    else:
        rank_main(sys.argv[2], resumed_cases if sys.argv[1] == "--resumed" else cases)
