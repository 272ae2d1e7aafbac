"""Machines under torchrun and the deepspeed launcher: what they say at the start, and how a failure ends all."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elsewhere.tests.cluster import Cluster, available

SMALL = {
    "data.path": "digits", "model.width": 24, "model.depth": 1, "model.heads": 3, "method.predictor.width": 12,
    "method.predictor.depth": 1, "method.predictor.heads": 3, "optim.epochs": 1, "optim.warmup_epochs": 0,
    "optim.batch_size": 64, "loader.workers": 0, "probe.before": False, "probe.after": False,
    "monitor.tensorboard": False, "monitor.pictures_every": 0, "monitor.log_every": 1, "engine.device": "cpu",
}  # fmt: skip
needs_namespaces = pytest.mark.skipif(available() is not None, reason=available() or "")
BESIDE = str(Path(sys.executable).parent)


@pytest.fixture(scope="module")
def two():
    with Cluster(2) as nodes:
        yield nodes


def torchrun(node, port=29500):
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node),
        "--nproc-per-node", "1", "--master-addr", "n0", "--master-port", str(port),
    ]  # fmt: skip


def arguments(folder, **settings):
    values = {**SMALL, "run.dir": str(folder / "run"), **settings}
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def launch(two, commands, folder, seconds=120, env=({}, {})):
    """What each machine printed, their exit statuses, and the seconds that it took."""
    logs = [folder / f"n{node}.log" for node in range(2)]
    usual = {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1", "PATH": f"{BESIDE}:{os.environ['PATH']}"}
    begun = time.monotonic()
    started = [two.start(n, commands[n], {**usual, **env[n]}, folder, logs[n]) for n in range(2)]
    for process in started:
        process.wait(seconds)
    return [log.read_text() for log in logs], [process.returncode for process in started], time.monotonic() - begun


def said(text):
    return [line for line in text.splitlines() if line.startswith("elsewhere: ")]


def pretrain(folder, **settings):
    return ["-m", "elsewhere.launch", "pretrain", "demo", *arguments(folder, **settings)]


@pytest.mark.long
@needs_namespaces
def test_both_launchers_start_the_same_run_with_one_banner(two, tmp_path, losses):
    for name in ("torchrun", "deepspeed"):
        (tmp_path / name).mkdir()
    found, statuses, _ = launch(
        two, [[*torchrun(n), *pretrain(tmp_path / "torchrun")] for n in range(2)], tmp_path / "torchrun"
    )  # fmt: skip
    assert statuses == [0, 0], found
    assert "n0: 1 × CPU" in found[0] and "n1: 1 × CPU" in found[0] and found[0].count("versions ") == 1
    assert "versions " not in found[1]
    hostfile = tmp_path / "hosts"
    hostfile.write_text("n0 slots=1\nn1 slots=1\n")
    deepspeed = [
        [
            f"{BESIDE}/deepspeed", "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(n),
            "--master_addr", "n0", "--master_port", "29501", "--module", "elsewhere.launch",
            *pretrain(tmp_path / "deepspeed")[2:],
        ]
        for n in range(2)
    ]  # fmt: skip
    found, statuses, _ = launch(two, deepspeed, tmp_path / "deepspeed", 300)
    assert statuses == [0, 0], found
    assert losses(tmp_path / "torchrun" / "run") == losses(tmp_path / "deepspeed" / "run")


@pytest.mark.long
@needs_namespaces
def test_different_recipes_are_refused_with_the_setting(two, tmp_path):
    commands = [[*torchrun(n), *pretrain(tmp_path, **{"optim.lr": 1e-3 * (n + 1)})] for n in range(2)]
    found, statuses, _ = launch(two, commands, tmp_path)
    assert 0 not in statuses
    for text in found:
        assert said(text) == [
            "elsewhere: Two machines were given different recipes: optim.lr=0.001 on n0 (rank 0) and 0.002 on n1 "
            "(rank 1); start the same command on all of them."
        ]


@pytest.mark.long
@needs_namespaces
def test_different_versions_are_refused_by_name(two, tmp_path):
    other = tmp_path / "site" / "pillow-1.2.3.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: pillow\nVersion: 1.2.3\n")
    commands = [[*torchrun(n), *pretrain(tmp_path)] for n in range(2)]
    found, statuses, _ = launch(two, commands, tmp_path, env=({}, {"PYTHONPATH": str(other.parent)}))
    assert 0 not in statuses and "n1 has pillow 1.2.3 and n0 has" in said(found[0])[0]


@pytest.mark.long
@needs_namespaces
def test_a_folder_that_one_machine_does_not_see_is_refused(two, tmp_path):
    (tmp_path / "apart").mkdir()
    two.tmpfs(tmp_path / "apart", node=1)
    commands = [[*torchrun(n), *pretrain(tmp_path / "apart")] for n in range(2)]
    found, statuses, _ = launch(two, commands, tmp_path)
    assert 0 not in statuses and "n1 does not see what rank 0 writes to run.dir=" in said(found[0])[0]


@pytest.mark.long
@needs_namespaces
def test_a_slip_on_one_machine_is_told_on_all(two, tmp_path):
    commands = [[*torchrun(n), *pretrain(tmp_path)] for n in range(2)]
    commands[1].append("optim.lrr=1")
    found, statuses, seconds = launch(two, commands, tmp_path)
    assert 0 not in statuses and seconds < 60
    for text in found:
        assert "rank 1 on n1 failed starting: There is no setting optim.lrr" in said(text)[0]


SCRIPT = """
import os, sys, time
import torch
import elsewhere
import elsewhere.launch.monitor
import elsewhere.launch.run
from elsewhere.launch.nodes.guard import RankFailed

class Digits(torch.utils.data.Dataset):
    taken = 0
    def __len__(self):
        return 1024
    def __getitem__(self, i):
        Digits.taken += 1
        if os.environ["RANK"] == "1" and Digits.taken > 5 * 32:
            {fault}
        return torch.full((1, 8, 8), i / 1024), 0

class Monitor(elsewhere.launch.monitor.Monitor):
    def record(self, *values):
        super().record(*values)
        if self.world.rank == 1 and self.step == 5:
            {bug}

elsewhere.launch.run.Monitor = Monitor
settings = dict(item.split("=", 1) for item in sys.argv[1:])
import yaml
settings = {{key: yaml.safe_load(value) for key, value in settings.items()}}
try:
    elsewhere.pretrain("demo", dataset=Digits(), **settings)
except RankFailed as error:
    sys.exit(error.status)
except Exception:
    sys.exit(1)  # it was said
"""


def script(tmp_path, fault="pass", bug="pass", **settings):
    """Commands of a run in which rank 1 meets `fault` in its images, or `bug` after its step 4."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(fault=fault, bug=bug))
    return [[*torchrun(n), str(path), *arguments(tmp_path, **settings)] for n in range(2)]


@pytest.mark.long
@needs_namespaces
def test_one_failing_rank_ends_all_with_its_own_error_first(two, tmp_path):
    found, statuses, _ = launch(two, script(tmp_path, bug="1 // 0"), tmp_path)
    assert 0 not in statuses
    sentence = "rank 1 on n1 failed at step 4, after it: ZeroDivisionError: integer division or modulo by zero"
    for text in found:
        assert said(text)[0] == f"elsewhere: {sentence}."
    before, _, after = found[1].partition(sentence)
    assert "Traceback" not in before and "ZeroDivisionError" in after  # its traceback follows
    assert "Traceback" not in found[0].partition("elastic")[0]  # torchrun adds one of its own
    assert len(said(found[0])) == len(said(found[1])) == 1


@pytest.mark.long
@needs_namespaces
def test_an_unreadable_image_of_one_rank_is_told_on_all(two, tmp_path):
    found, statuses, _ = launch(two, script(tmp_path, fault="raise ValueError('no image')"), tmp_path)
    assert 0 not in statuses
    for text in found:
        assert len(said(text)) == 1 and "rank 1 on n1 failed at step 4, waiting for data: An image" in said(text)[0]


@pytest.mark.long
@needs_namespaces
def test_who_does_not_come_to_a_collective_is_named(two, tmp_path):
    commands = script(tmp_path, fault="time.sleep(3600)", **{"engine.wait_minutes": 0.25})
    found, statuses, _ = launch(two, commands, tmp_path)
    assert 0 not in statuses
    for text in found:
        assert "rank 1 on n1 did not come to collective" in said(text)[0]
        assert "where rank 0 waits (at step 4, waiting for data)" in said(text)[0]


def alone(folder, rank, port, **settings):
    """One of two processes, by itself: what it says, its status and its seconds."""
    env = {
        **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, *pretrain(folder, **settings)]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=100)
    return said(done.stderr), done.returncode, time.monotonic() - begun


def test_a_port_in_use_is_named(tmp_path):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        text, status, _ = alone(tmp_path, 0, port, **{"engine.wait_minutes": 0.05})
    assert status == 2 and len(text) == 1 and f"Port {port} of {socket.gethostname()} is in use" in text[0]


@pytest.mark.long
def test_a_first_machine_that_does_not_answer_is_named(tmp_path):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    text, status, seconds = alone(tmp_path, 1, port, **{"engine.wait_minutes": 0.05})
    assert status == 2 and len(text) == 1 and f"does not reach 127.0.0.1:{port} within 3 s" in text[0]
    assert seconds < 60


@pytest.mark.long
def test_a_rank_that_never_comes_is_named(tmp_path):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    text, status, seconds = alone(tmp_path, 0, port, **{"engine.wait_minutes": 0.05})
    assert status == 1 and len(text) == 1 and "rank 1 did not come to the start within 3 s" in text[0]
    assert seconds < 60
