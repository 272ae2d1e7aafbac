"""float16 in divided engines: an infinity on one rank makes all ranks skip, the adversary and the teacher included.

Run as a program under torchrun this file does what each of two ranks does.
"""

import os
import subprocess
import sys

import pytest

ENGINES = {
    "fsdp": {"engine.kind": "fsdp"},
    **{f"zero {stage}": {"engine.kind": "deepspeed", "engine.deepspeed": f"zero{stage}"} for stage in (1, 2, 3)},
}
SMALL = {
    "demo": {
        "model.width": 24, "model.depth": 1, "model.heads": 3, "method.predictor.width": 12,
        "method.predictor.depth": 1, "method.predictor.heads": 3,
    },
    "demo_adpe": {
        "model.width": 24, "model.depth": 1, "model.heads": 2, "method.decoder.width": 16, "method.decoder.depth": 1,
        "method.decoder.heads": 2,
    },
}  # fmt: skip
CASES = [(engine, recipe) for engine in ENGINES for recipe in SMALL]
pytestmark = pytest.mark.long


def make(world, engine, recipe):
    """The engine, in float16, and this rank's half of a batch."""
    import numpy as np
    import torch

    from elsewhere.data.batch import Batch
    from elsewhere.launch.build import build_masks, build_method
    from elsewhere.launch.config import load_config
    from elsewhere.launch.engine.choose import build_engine

    config = load_config(
        recipe, {**SMALL[recipe], **ENGINES[engine], "optim.batch_size": 16, "engine.precision": "float16"}
    )
    method = build_method(config)
    method.compute_dtype = torch.float16
    masks = build_masks(config, method.encoder.grid)
    built = build_engine(config, method, world, 8, 1)
    for group in built.optimizer.param_groups:
        group["lr"] = 1e-3
    ids = np.arange(8) + 8 * world.rank
    made = masks(0, 0, 0, ids)
    parts = {name: getattr(made, name) for name in ("context", "targets", "visible")}
    parts = {name: torch.from_numpy(part) for name, part in parts.items() if part is not None}
    views = (config.data.views,) if config.data.views > 1 else ()
    shape = (8, *views, config.model.channels, *config.model.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(world.rank))
    epochs = torch.zeros(8, dtype=torch.int64)
    return built, Batch(images=images, sample_ids=torch.from_numpy(ids), labels=epochs, epochs=epochs, step=0, **parts)


def take_step(engine, batch, spoil=""):
    """A step in which this rank's `spoil` gradients are infinite; whether it was applied."""
    method, plain = engine.method, engine.method.objective
    if spoil == "method":
        method.objective = lambda *inputs: (lambda loss, scalars: (loss * float("inf"), scalars))(*plain(*inputs))
    engine.forward_backward(batch, 0)
    if spoil:
        method.objective = plain
    if spoil == "adversary":
        for tensor in engine.adversary.tensors.values():
            tensor.grad.view(-1)[0] = float("inf")
    applied = engine.step(0.1)
    if applied:
        engine.after_step(0.9)
    return applied


def everything(engine):
    tensors = [*engine.stored(), *(engine.adversary.tensors.values() if engine.adversary else ())]
    return [tensor.detach().clone() for tensor in tensors]


def rank_main(path):
    import torch

    from elsewhere.launch.world import join

    world = join("cpu")
    found = {}
    for name, recipe in CASES:
        engine, batch = make(world, name, recipe)
        engine.scaler.value = 1024.0  # nothing overflows by itself
        first = take_step(engine, batch)
        for where in ("method", "adversary") if engine.adversary else ("method",):
            before, scale = everything(engine), engine.scaler.value
            skipped = not take_step(engine, batch, where if world.rank == 1 else "")
            stayed = all(torch.equal(a, b) for a, b in zip(before, everything(engine), strict=True))
            halved, said = engine.scaler.value == scale / 2, engine.overflow_in
            again = take_step(engine, batch)
            moved = not any(torch.equal(a, b) for a, b in zip(before[-2:], everything(engine)[-2:], strict=True))
            found[f"{name}|{recipe}|{where}"] = [first, skipped, stayed, halved, again, moved, said]
    everyone = world.gather_host(found)
    if world.first:
        torch.save(everyone, path)
    world.close()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    import torch

    path = tmp_path_factory.mktemp("ranks") / "found.pt"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launcher, __file__, path], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("where", ["method", "adversary"])
@pytest.mark.parametrize(("engine", "recipe"), CASES)
def test_an_infinity_on_one_rank_skips_the_step_on_both_and_the_next_is_taken(engine, recipe, where, two_ranks):
    if (recipe, where) == ("demo", "adversary"):
        pytest.skip("StoP has no adversary")
    for found in two_ranks:
        first, skipped, stayed, halved, again, moved, said = found[f"{engine}|{recipe}|{where}"]
        assert first and skipped and stayed and halved and again and moved
        # An infinite loss reaches the adversary as well, whose flag is the only one that ZeRO has not of its own.
        both = "method and adversary" if engine == "fsdp" else "adversary"
        assert said == (both if (recipe, where) == ("demo_adpe", "method") else where)


if __name__ == "__main__":
    rank_main(sys.argv[1])
