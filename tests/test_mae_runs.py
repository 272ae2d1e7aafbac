"""Runs of the MAE family: every mode trains, a stopped run goes on bit by bit, ranks agree, float16 skips as one."""

import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import elsewhere
from elsewhere.launch.build import build_method
from elsewhere.launch.checkpoint import inspect
from elsewhere.launch.config import load_config
from elsewhere.launch.engine.base import MOMENTS
from elsewhere.launch.engine.choose import build_engine

ALONE = {"method.adversary.mode": "none", "method.adversary.norm": "none", "method.adversary.epsilon": None,
         "method.adversary.base_lr": 1.5e-4}  # fmt: skip
ABSOLUTE = {"model.relative.terms": "none", "model.relative.lookup": "hard"}
EMBEDDING = {"method.adversary.mode": "embedding"}
HARD = {"model.relative.lookup": "hard"}
MODES = {
    "mae": {"method.kind": "mae", **ALONE, **ABSOLUTE},
    "mae_plus absolute": {**ALONE, **ABSOLUTE},
    "mae_plus relative": {**ALONE, **HARD},
    "coordinate relative": {},
    "coordinate relative, published lookup": {"model.relative.lookup": "published", "method.adversary.norm": "linf"},
    "coordinate relative, all terms per head": {"model.relative.terms": "qkv", "model.relative.shared": False},
    "coordinate absolute": ABSOLUTE,
    "embedding absolute": {**EMBEDDING, **ABSOLUTE, "method.adversary.norm": "linf"},
    "embedding absolute, as released": {
        **EMBEDDING, **ABSOLUTE, "method.mask_token": "adversary", "method.adversary.norm": "none",
        "method.adversary.epsilon": None,
    },
    "embedding relative": {**EMBEDDING, **HARD},
    "embedding relative, a vector per bucket": {**EMBEDDING, "method.adversary.per": "bucket"},
    "embedding relative, masked queries": {**EMBEDDING, **HARD, "method.adversary.where": "queries",
                                           "method.adversary.per": "bucket"},
    "relative bias": {**ALONE, **HARD, "model.relative.mode": "bias", "model.relative.terms": "qk"},
    "relative cross": {**ALONE, **HARD, "model.relative.method": "cross", "model.relative.terms": "kv"},
    "relative euclidean": {**EMBEDDING, **HARD, "model.relative.method": "euclidean"},
    "relative quantised": {**EMBEDDING, **HARD, "model.relative.method": "quantised"},
    "micro-batches": {"loader.micro_batch": 8, "optim.schedule": "mae_micro"},
}  # fmt: skip
AS_RELEASED = {**EMBEDDING, **HARD, "method.adversary.where": "queries", "method.adversary.norm": "none",
               "method.adversary.epsilon": None}  # fmt: skip


def adversary_of(run, step):
    """The adversary's tensors of a checkpoint, without their moments."""
    found = saved(run, step).tensors("adversary.")
    moments = tuple(f"adversary.{moment}." for moment in MOMENTS)
    return {name: tensor for name, tensor in found.items() if not name.startswith(moments)}


def saved(run, step):
    return inspect(Path(run) / "checkpoints" / f"step-{step:08}")


def assert_same(one, other):
    """Two checkpoints: weights, moments, the adversary, and the counts and scales beside them."""
    torch.testing.assert_close(one.tensors(""), other.tensors(""), rtol=0, atol=0)
    assert one.about["engine"] == other.about["engine"]


@pytest.fixture
def train(tiny_mae, some_digits):
    """Train `demo_adpe` on a few digits in this process, six steps an epoch; returns its result."""

    def run(settings=(), dataset=None, **options):
        return elsewhere.pretrain("demo_adpe", dataset or some_digits, **options, **{**tiny_mae, **dict(settings)})

    return run


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains(mode, train, losses):
    result = train(MODES[mode])
    found = losses(result.run)
    assert len(set(found)) == 6 and all(map(math.isfinite, found))
    assert found[-1] < found[0]


@pytest.mark.parametrize("mode", [mode for mode in MODES if ALONE.items() - MODES[mode].items()])
def test_every_adversary_moves_away_from_where_it_started(mode, train):
    result = train({**MODES[mode], "checkpoint.every_steps": 1})
    first, last = (adversary_of(result.run, step) for step in (5, 6))
    assert last.keys() == first.keys() != set()
    assert {name for name in last if torch.equal(first[name], last[name])} == set()


def test_the_attack_as_released_trains_although_it_does_nothing(train, losses, tmp_path):
    attacked = train({**AS_RELEASED, "run.dir": f"{tmp_path}/attacked"})
    alone = train({**ALONE, **HARD, "run.dir": f"{tmp_path}/alone"})
    assert losses(attacked.run) == pytest.approx(losses(alone.run), abs=1e-5)


@pytest.mark.long
def test_a_run_killed_in_the_middle_of_an_epoch_goes_on_bitwise(tiny_mae, losses, start, wait_for_step, tmp_path):
    """Losses, weights, both optimisers, and the adversary with its moments; two views, two micro-batches."""
    settings = {**tiny_mae, "optim.batch_size": 32, "loader.micro_batch": 16, "checkpoint.every_steps": 5}
    process = start(settings, recipe="demo_adpe")
    wait_for_step(process, settings["run.dir"], 18)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = elsewhere.pretrain("demo_adpe", **settings)
    whole = elsewhere.pretrain("demo_adpe", **{**settings, "run.dir": f"{tmp_path}/whole"})
    assert losses(resumed.run) == losses(whole.run)
    assert_same(saved(resumed.run, resumed.steps), saved(whole.run, whole.steps))


class Stops(torch.utils.data.Dataset):
    """A data set that tells its own process to stop when it is read for the `n`-th time."""

    def __init__(self, dataset, n):
        self.dataset, self.left = dataset, n

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.dataset[i]


@pytest.mark.parametrize("mode", ["embedding absolute", "embedding relative, a vector per bucket", "mae"])
def test_a_run_that_was_told_to_stop_goes_on_bitwise(mode, train, losses, some_digits, tmp_path):
    settings = {**MODES[mode], "optim.epochs": 2}
    stopped = train(settings, Stops(some_digits, 50))
    assert (stopped.signal, stopped.complete) == (signal.SIGTERM, False)
    resumed = train(settings)
    whole = train({**settings, "run.dir": f"{tmp_path}/whole"})
    assert losses(resumed.run) == losses(whole.run)
    assert_same(saved(resumed.run, 12), saved(whole.run, 12))


def run_on_two_ranks(settings):
    """Train `demo_adpe` on two processes forked from this one, so that torch is imported once for all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            elsewhere.pretrain("demo_adpe", **settings)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


AGREEING = ("coordinate relative", "embedding absolute")


@pytest.fixture(scope="module")
def ranks(tiny_mae_anywhere, tmp_path_factory):
    """Settings of the runs that two ranks took and one did not, by mode; the adversary moves far in them."""
    folder = tmp_path_factory.mktemp("ranks")
    runs = {
        mode: {
            **tiny_mae_anywhere, **MODES[mode], "run.dir": f"{folder}/{mode}", "optim.batch_size": 28,
            "checkpoint.every_steps": 50, "method.adversary.base_lr": 0.05,
        }
        for mode in AGREEING
    }  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, json.dumps(list(runs.values()))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return runs


@pytest.mark.long
@pytest.mark.parametrize("mode", AGREEING)
def test_two_ranks_agree_with_one_over_50_steps(mode, ranks, losses, tmp_path):
    """Losses and the adversary, at the same global batch, in float32."""
    two, one = ranks[mode]["run.dir"], f"{tmp_path}/one"
    elsewhere.pretrain("demo_adpe", **{**ranks[mode], "run.dir": one})
    assert losses(one)[:50] == pytest.approx(losses(two)[:50], abs=1e-5)
    expected, found = (adversary_of(run, 50) for run in (one, two))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert expected and all(tensor.abs().max() > 0.05 for tensor in expected.values())


PARTS = ("encoder", "decoder")
FLOAT16 = {"engine.precision": "float16", "checkpoint.every_steps": 1}
OVERFLOWING = {**FLOAT16, "method.normalise_pixels": False, "data.std": [1e-4]}  # errors of 1e4, scaled by 2**16


def test_float16_keeps_the_adversary_in_float32(train, losses):
    result = train(FLOAT16)
    assert all(map(math.isfinite, losses(result.run)))
    state = saved(result.run, 6).tensors("adversary.")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(tensor.any() for tensor in state.values())


def test_float16_saves_one_scaler(train):
    state = saved(train(FLOAT16).run, 6)
    assert set(state.about["engine"]) == {"kind", "applied", "scaler"}
    assert set(state.about["engine"]["scaler"]) == {"value", "good", "skipped"}
    names = {"adversary." + "".join(name) for name in itertools.product(("", "exp_avg.", "exp_avg_sq."), PARTS)}
    assert set(state.tensors("adversary.")) == names


def test_an_overflow_at_the_first_scale_skips_method_and_adversary(train, tiny_mae):
    result = train({**OVERFLOWING, "checkpoint.keep": 9})
    state = saved(result.run, 1)
    scaler = state.about["engine"]["scaler"]
    assert (scaler["value"], scaler["skipped"], state.about["engine"]["applied"]) == (32768.0, 1, 0)
    moments = [state.tensors(f"{prefix}{moment}.") for prefix in ("", "adversary.") for moment in MOMENTS]
    assert all(moments) and not any(tensor.any() for each in moments for tensor in each.values())
    fresh = build_method(load_config("demo_adpe", {**tiny_mae, **OVERFLOWING}))
    expected = {f"method.{name}": tensor for name, tensor in fresh.state_dict().items()}
    torch.testing.assert_close(state.tensors("method."), expected, rtol=0, atol=0)


def test_after_an_overflow_method_and_adversary_go_on_together(train, monkeypatch):
    """Their counts of steps are equal, and less than the run's by those that were skipped."""
    built = []
    monkeypatch.setattr(
        "elsewhere.launch.run.build_engine", lambda *given: built.append(build_engine(*given)) or built[-1]
    )
    result = train({**OVERFLOWING, "optim.epochs": 3})
    about = saved(result.run, 18).about["engine"]
    skipped = about["scaler"]["skipped"]
    moments = [*built[0].optimizer.state.values(), *built[0].adversary.optimizer.state.values()]
    assert 1 < skipped < 18 and {float(each["step"]) for each in moments} == {18.0 - skipped}
    assert about["applied"] == 18 - skipped


def test_every_skipped_step_has_its_row(train):
    result = train({**OVERFLOWING, "optim.epochs": 3})
    rows = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    counts = [0.0, *(row["skipped_steps"] for row in rows if "group" not in row)]
    skipped = [step for step, (before, after) in enumerate(itertools.pairwise(counts)) if after > before]
    assert skipped and [row["step"] for row in rows if row.get("group") == "skipped"] == skipped


if __name__ == "__main__":
    import sklearn.datasets  # noqa: F401 - before the forks, as is all that a run needs

    import elsewhere.launch.run

    for settings in json.loads(sys.argv[1]):
        run_on_two_ranks(settings)
