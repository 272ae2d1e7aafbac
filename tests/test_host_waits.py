"""A training step asks its device nothing: the loop between two logs, and each method on a device without values."""

import contextlib
import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from elsewhere.launch.bench_loops import ADVERSARY_LR, constant_schedules, fixed_batches, fresh_method
from elsewhere.launch.config import load_config
from elsewhere.launch.engine.choose import build_engine
from elsewhere.launch.loop import train
from elsewhere.launch.monitor import Monitor
from elsewhere.launch.world import World
from elsewhere.tests.host_waits import HostWaits

SMALL = ["model.width=24", "model.depth=2", "model.heads=2", "engine.device=cpu", "optim.clip_grad=1.0"]
PREDICTOR = ["method.predictor.width=12", "method.predictor.depth=2", "method.predictor.heads=3"]
DECODER = ["method.decoder.width=16", "method.decoder.depth=2", "method.decoder.heads=2"]
CASES = {
    "stop": ("demo", PREDICTOR),
    "stop on both, two contexts": ("demo", [*PREDICTOR, "method.stop.where=both", "mask.context_blocks=2"]),
    "mae": ("cifar10_mae", DECODER),
    "absolute embedding": ("cifar10_adpe_ape_embed", DECODER),
    "absolute coordinate": ("cifar10_adpe_ape_coord", DECODER),
    "relative embedding": ("cifar10_adpe_rpe_embed", DECODER),
    "relative coordinate": ("demo_adpe", DECODER),
}
BATCH, EVERY = 4, 4


def make_config(name, *more):
    recipe, settings = CASES[name]
    config = load_config(recipe, [*SMALL, *settings, *more])
    return config.model_copy(update={"optim": config.optim.model_copy(update={"batch_size": BATCH})})


def run_loop(config, world, folder, last, mark):
    """Steps 0 … `last - 1` of the loop of `elsewhere pretrain`; `mark(step)` is called before them and after each."""
    engine = build_engine(config, fresh_method(config, world), world, BATCH, 1)
    monitor = Monitor(
        folder, world, Console(file=io.StringIO()), first_step=0, last_step=last, images_per_step=BATCH,
        flops_per_image=1.0, peak=None, every=EVERY, tensorboard=False, progress=False,
    )  # fmt: skip
    batches = fixed_batches(config, world, BATCH)
    numbered = (replace(batches[step % len(batches)], step=step) for step in range(last))
    schedules = constant_schedules(config)

    def after(step, batch, _):
        mark(step)
        return False

    mark(0)
    train(engine, numbered, schedules, schedules.with_lr(ADVERSARY_LR, constant=True), monitor, after, 0, last)
    monitor.close()


def waits_by_step(config, folder, last=2 * EVERY):
    found = {}
    with HostWaits() as waits:

        def mark(step):
            found[step] = list(waits.found)
            waits.found.clear()

        run_loop(config, World(), folder, last, mark)
    del found[0]  # building an engine
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_for_no_step_between_two_logs(name, tmp_path):
    found = waits_by_step(make_config(name), tmp_path)
    assert {step: ops for step, ops in found.items() if ops and step % EVERY} == {}


def test_a_log_is_one_look_at_all_its_steps(tmp_path):
    """What is not finite among values that have been read; the reading itself is a copy, which a CPU does not need."""
    found = waits_by_step(make_config("stop"), tmp_path)
    assert found[EVERY] == found[2 * EVERY] == ["aten.nonzero.default"]


@pytest.mark.parametrize("name", ["stop", "relative coordinate"])
def test_float16_waits_once_a_step_for_its_overflow_flag(name, tmp_path):
    found = waits_by_step(make_config(name, "engine.precision=float16"), tmp_path, last=3)
    assert [ops for step, ops in found.items()] == [["aten._local_scalar_dense.default"]] * 3


@pytest.fixture
def plain_autocast(monkeypatch):
    """Autocast that does nothing, for the meta device knows none."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_on_a_device_without_values(name, plain_autocast):
    """What is read fails there, what is made on the host and copied shows; tables are made at the first step."""
    config, world = make_config(name, "optim.clip_grad=0.0"), World(device=torch.device("meta"))
    batch = fixed_batches(config, World(), BATCH, 1)[0].to("meta")
    engine = build_engine(config, fresh_method(config, World()), world, BATCH, 1)
    engine.forward_backward(batch, 0)
    with HostWaits() as waits:
        engine.forward_backward(batch, 0)
    assert waits.found == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_steps_on_a_gpu_do_not_wait_for_it(name, tmp_path):
    config, world = make_config(name, "engine.device=cuda"), World(device=torch.device("cuda"))
    steps = []

    def mark(step):  # the first steps make tables and compile kernels, those of a log read
        steps.append(step)
        torch.cuda.set_sync_debug_mode("error" if EVERY <= step < 2 * EVERY - 1 else "default")

    try:
        run_loop(config, world, tmp_path, 2 * EVERY, mark)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == list(range(2 * EVERY + 1))
