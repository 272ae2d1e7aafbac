"""Weights & Biases beside TensorBoard: the real package in its offline mode, read back from the file it writes."""

import json
import struct
import sys
import time
from pathlib import Path

import pytest

import elsewhere
from elsewhere.launch.errors import UserError
from elsewhere.launch.sinks import Wandb


def records(path: Path):
    """The records of a .wandb file: LevelDB's log, after seven bytes of wandb's own."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no record's head fits in the rest of the block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def rows_of(kept) -> list[dict]:
    """What was logged, a dictionary for each call."""
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in one.history.item}
        for one in kept
        if one.HasField("history")
    ]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """wandb without a network or an account; gives the runs that it wrote, oldest first."""
    pytest.importorskip("wandb", reason="wandb is not installed: python3 -m pip install wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in {"WANDB_MODE": "offline", "WANDB_CONFIG_DIR": str(tmp_path / "settings")}.items():
        monkeypatch.setenv(name, value)

    def written(run: Path, lives: int = 1):
        end = time.monotonic() + 30  # wandb's own process may still be writing the last of it
        while True:
            paths = sorted(run.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
            found = [[Record.FromString(one) for one in records(path)] for path in paths]
            if len(found) == lives and all(any(one.HasField("exit") for one in kept) for kept in found):
                return [(next(one.run for one in kept if one.HasField("run")), rows_of(kept)) for kept in found]
            assert time.monotonic() < end, f"{len(found)} of {lives} runs were written to their end"
            time.sleep(0.1)

    return written


@pytest.fixture
def train(tiny_mae, some_digits):
    """Six steps of AdPE, logged to Weights & Biases."""

    def run(change=False, **settings):
        more = {"monitor.wandb": "trials", "monitor.adversary_every": 3, "monitor.log_every": 2, **settings}
        return elsewhere.pretrain("demo_adpe", some_digits, allow_config_change=change, **{**tiny_mae, **more}).run

    return run


def test_numbers_and_pictures_are_those_of_tensorboard(train, offline):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(**{"monitor.tensorboard": True})
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    board.Reload()
    about, rows = offline(folder)[0]
    assert about.project == "trials" and about.display_name == "run"
    for tag in board.Tags()["scalars"]:
        expected = {event.step: event.value for event in board.Scalars(tag)}
        assert {row["step"]: row[tag] for row in rows if tag in row} == pytest.approx(expected, rel=1e-6), tag
    assert "adversary/loss_gain" in board.Tags()["scalars"]
    for tag in board.Tags()["images"]:
        expected = [(event.step, event.width, event.height) for event in board.Images(tag)]
        found = [(row["step"], *(row[f"{tag}.{side}"] for side in ("width", "height"))) if f"{tag}.width" in row
                 else (row["step"], row[tag]["width"], row[tag]["height"])
                 for row in rows if tag in row or f"{tag}.width" in row]  # fmt: skip
        assert found == expected


def test_a_run_that_goes_on_is_the_same_one(train, offline):
    folder = train(**{"optim.steps": 4})
    train(change=True, **{"optim.steps": 6})
    lives = offline(folder, 2)
    assert len({about.run_id for about, _ in lives}) == 1
    logged = [[row["step"] for row in rows if "train/loss" in row] for _, rows in lives]
    assert logged == [[1, 3], [5]]


def test_the_configuration_is_logged(train, offline):
    about, _ = offline(train())[0]
    found = {one.key: json.loads(one.value_json) for one in about.config.update}
    assert found["method"]["adversary"]["mode"] == "coordinate" and found["optim"]["batch_size"] == 16


def test_nothing_is_written_where_it_is_off(train):
    folder = train(**{"monitor.wandb": False})
    assert not (folder / "wandb").exists() and not (folder / "wandb_id.txt").exists()


def test_without_an_account_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: python3 -m pip install wandb")
    wandb.teardown()  # it keeps the mode that it first met
    for name, value in {"WANDB_MODE": "online", "WANDB_API_KEY": "", "NETRC": str(tmp_path / "netrc")}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"\(No API key configured\): run `wandb login`, or set WANDB_MODE=offline"):
        Wandb(tmp_path, True, None, {})
    wandb.teardown()


def test_a_missing_package_is_one_sentence_before_training(train, tmp_path, monkeypatch):
    """Of a process that finds no wandb, as where it is not installed."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="python3 -m pip install wandb"):
        train()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
