"""FSDP2 in one process, which divides nothing but goes all its ways; more ranks are in test_parity."""

import pytest

from elsewhere.launch.config import load_config
from elsewhere.launch.pretrain import pretrain

FSDP = {"engine.kind": "fsdp", "engine.device": "cpu"}


@pytest.fixture
def train(tiny, losses, tmp_path, some_digits):
    """Losses of a run of six steps under its own name."""

    def run(name, settings, recipe="demo"):
        settings = {**settings, "optim.batch_size": 16, "run.dir": str(tmp_path / name)}
        result = pretrain(load_config(recipe, settings), some_digits, val_dataset=settings.pop("val", None))
        return result, losses(tmp_path / name)

    return run


def test_looking_on_changes_nothing(train, tiny):
    """Pictures and the collapse watch ask the divided weights between steps."""
    watched = {"monitor.pictures_every": 1, "monitor.collapse_every": 1}
    _, plain = train("plain", tiny)
    _, looked = train("looked", {**tiny, **FSDP, **watched})
    assert max(abs(a - b) for a, b in zip(plain, looked, strict=True)) <= 1e-6


def test_measuring_an_adversary_changes_nothing(train, tiny_mae):
    _, plain = train("plain", tiny_mae, "demo_adpe")
    watched = {"monitor.adversary_every": 1, "monitor.pictures_every": 1}
    _, looked = train("looked", {**tiny_mae, **FSDP, **watched}, "demo_adpe")
    assert max(abs(a - b) for a, b in zip(plain, looked, strict=True)) <= 1e-6


@pytest.mark.long
def test_the_probe_is_that_of_ddp(tiny, tmp_path):
    """Before training, where the weights are the same bit by bit."""
    probes = []
    for name, engine in (("ddp", {}), ("fsdp", FSDP)):
        settings = {**tiny, **engine, "probe.before": True, "optim.epochs": 1, "run.dir": str(tmp_path / name)}
        probes.append(pretrain(load_config("demo", settings)).before)
    assert probes[0] == probes[1] and probes[0]["train_images"] > 1000
