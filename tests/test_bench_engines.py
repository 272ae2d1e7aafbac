"""`elsewhere bench engines`: that its two loops compute the same, what it counts, and what it refuses."""

import json
import os
import subprocess
import sys

import pytest
import torch

from elsewhere.launch.bench_batches import fixed_batches
from elsewhere.launch.bench_bytes import held, whole_bytes
from elsewhere.launch.bench_engines import engine_settings
from elsewhere.launch.bench_loops import constant_schedules, fresh_method
from elsewhere.launch.cli import main
from elsewhere.launch.config import load_config
from elsewhere.launch.engine.choose import build_engine
from elsewhere.launch.world import World

STOP = {
    "model.width": 24, "model.depth": 2, "model.heads": 3, "method.teacher.momentum": 0.9, "optim.batch_size": 4,
    "method.predictor.width": 12, "method.predictor.depth": 1, "method.predictor.heads": 3, "engine.device": "cpu",
    "monitor.tensorboard": False,
}  # fmt: skip
ADPE = {
    "model.width": 24, "model.depth": 1, "model.heads": 2, "method.decoder.width": 16, "method.decoder.depth": 1,
    "method.decoder.heads": 2, "method.adversary.epsilon": 0.01, "optim.clip_grad": 0.05, "engine.device": "cpu",
    "monitor.tensorboard": False,
}  # fmt: skip


def test_engines_go_by_kind_or_by_deepspeed_setting():
    assert engine_settings("fsdp") == ["engine.kind=fsdp"]
    assert engine_settings("my/zero.json") == ["engine.kind=deepspeed", "engine.deepspeed=my/zero.json"]


def test_ranks_have_batches_of_their_own():
    config = load_config("demo", STOP)
    one, other = (fixed_batches(config, World(rank=rank, size=2), 4, 2) for rank in (0, 1))
    ids = torch.cat([batch.sample_ids for batch in [*one, *other]])
    assert sorted(ids.tolist()) == list(range(16))
    assert not torch.equal(one[0].images, other[0].images)


def test_rates_stand_still():
    schedules = constant_schedules(load_config("demo"))
    for of in (schedules.lr_at, schedules.weight_decay_at, schedules.momentum_at):
        assert of(0) == of(1) == of(5000)


def test_one_process_holds_the_whole_state_once():
    config, world = load_config("demo", STOP), World()
    method = fresh_method(config, world)
    count = sum(p.numel() for p in method.encoder.parameters()), sum(p.numel() for p in method.predictor.parameters())
    trained, frozen = 4 * sum(count), 4 * count[0]  # the teacher is an encoder
    whole = {"weights": trained, "teacher": frozen, "moments": 2 * trained, "gradients": trained}
    assert whole_bytes(method) == whole
    engine = build_engine(config, method, world, 4, 1)
    engine.forward_backward(fixed_batches(config, world, 4, 1)[0], 0)
    sizes = {part: sum(found.values()) for part, found in held(engine).items()}
    sizes["moments"] -= 4 * sum(p.requires_grad for p in method.parameters())  # AdamW's counts of steps
    assert sizes == {**whole, "masters": 0, "gathered": 0, "buckets": 0}


def measure(folder, recipe, settings, engines, ranks=2, measures="overhead"):
    """What the command wrote, run as `ranks` processes."""
    path = folder / "engines.json"
    launcher = [sys.executable, "-W", "ignore", "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    overrides = [f"{key}={value}" for key, value in settings.items()]
    size = ["--batch", "4", "--steps", "4", "--turn", "4"]
    done = subprocess.run(
        [*launcher, "elsewhere.launch", "bench", "engines", recipe, *overrides, "--engines", engines,
         "--measure", measures, *size, "--json", str(path)],
        capture_output=True, text=True, timeout=500, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(path.read_text()), done.stdout


@pytest.mark.long
@pytest.mark.parametrize("recipe, settings", [("demo", STOP), ("demo_adpe", ADPE)], ids=["StoP", "AdPE"])
@pytest.mark.parametrize("engines", ["ddp,fsdp", "zero2,zero3"])
def test_the_bare_loops_take_the_steps_of_ours(recipe, settings, engines, tmp_path):
    """The command itself compares the losses of the first turn, and fails where they differ."""
    if "zero" in engines:
        pytest.importorskip("deepspeed")
    result, table = measure(tmp_path, recipe, settings, engines)
    assert [row["engine"] for row in result["overhead"]] == engines.split(",")
    assert all(row["losses_differ_by"] <= 1e-5 for row in result["overhead"])
    assert table.count("losses differ by") == 1  # rank 0 alone prints


@pytest.mark.long
def test_fsdp_divides_all_states_between_two_ranks(tmp_path):
    result, _ = measure(tmp_path, "demo", STOP, "fsdp", measures="bytes")
    row = result["bytes"][0]
    assert row["share"] == sum(row["whole"].values()) / 2
    assert 1.0 <= row["ratio"] < 1.05


@pytest.fixture
def refused(capsys):
    def run(*arguments):
        assert main(["bench", "engines", "demo", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err.removeprefix("elsewhere: ").strip()

    return run


def test_an_unknown_measure(refused):
    assert refused("--measure", "speed") == "--measure speed is not known; choose among overhead, saving, bytes."


@pytest.mark.parametrize(
    "engine, setting, way",
    [("ddp", "engine.precision=float16", "engine.precision=float32 or bfloat16"),
     ("fsdp", "engine.offload=true", "leave engine.offload and engine.replicas out"),
     ("zero2_offload", "seed=0", "choose --engines without them")],
)  # fmt: skip
def test_what_cannot_be_measured(engine, setting, way, refused):
    assert way in refused(setting, "engine.device=cpu", "--engines", engine)
