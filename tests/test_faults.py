"""Machines that are killed, cut off, frozen or full: the run comes back or says why not, and no sample is lost.

As a program, `python3 tests/test_faults.py KILLS`, it prints the log that docs/benchmarks/faults.md keeps.
"""

import json
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import pytest

from elsewhere.launch.checkpoint import inspect
from elsewhere.tests.cluster import Cluster, available

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(available() is not None, reason=available() or ""),
]

SMALL = {
    "data.path": "digits", "model.width": 24, "model.depth": 1, "model.heads": 3, "method.predictor.width": 12,
    "method.predictor.depth": 1, "method.predictor.heads": 3, "optim.epochs": 10, "optim.warmup_epochs": 0,
    "optim.batch_size": 64, "loader.workers": 0, "probe.before": False, "probe.after": False,
    "monitor.tensorboard": False, "monitor.pictures_every": 0, "monitor.log_every": 1, "engine.device": "cpu",
    "checkpoint.every_steps": 10, "engine.silence_seconds": 25,
}  # fmt: skip


class Run:
    """A supervised run on the nodes of a cluster, each machine's output in a file."""

    def __init__(self, nodes: Cluster, folder: Path, *flags: str, folder_seen: Path | None = None, **settings):
        self.nodes, self.folder, self.flags = nodes, folder, flags
        self.seen = folder_seen or folder / "run"  # where this process finds what the machines write
        self.settings = {**SMALL, **settings, "run.dir": str(folder / "run")}
        self.processes = {node: self.start(node) for node in range(nodes.nodes)}

    def start(self, node: int):
        overrides = [f"{key}={json.dumps(value)}" for key, value in self.settings.items()]
        where = ["--nodes", self.nodes.nodes, "--node-rank", node, "--master", "n0"]
        command = [sys.executable, "-m", "elsewhere.launch", "pretrain", "demo", *overrides, *where, *self.flags]
        env = {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        return self.nodes.start(node, [str(word) for word in command], env, self.folder, self.log(node))

    def again(self, node: int) -> None:
        self.processes[node] = self.start(node)

    def log(self, node: int) -> Path:
        return self.folder / f"n{node}.log"

    def said(self, node: int) -> list[str]:
        """What the command itself said on a machine, but for whom it waited, which depends on the load."""
        lines = self.log(node).read_text().splitlines() if self.log(node).exists() else []
        lines = [line.removeprefix("elsewhere: ") for line in lines if line.startswith("elsewhere: ")]
        return [line for line in lines if not line.startswith(("Waiting for", "No answer yet"))]

    @property
    def steps(self) -> int:
        path = self.seen / "metrics.jsonl"
        return path.read_text().count('"loss"') if path.exists() else 0

    def until(self, true, seconds: float, what: str) -> float:
        """Seconds until `true()` holds."""
        begun = time.monotonic()
        while not true():
            logs = "\n".join(f"n{n}: {self.log(n).read_text()[-2000:]}" for n in self.processes)
            assert time.monotonic() - begun < seconds, f"not within {seconds} s: {what}\n{logs}"
            time.sleep(0.05)
        return time.monotonic() - begun

    def reaches(self, step: int, seconds: float = 90) -> float:
        return self.until(lambda: self.steps > step, seconds, f"step {step}")

    def ends(self, seconds: float = 180) -> list[int]:
        """The exit statuses of all machines."""
        self.until(lambda: all(p.poll() is not None for p in self.processes.values()), seconds, "the end")
        return [process.returncode for process in self.processes.values()]

    def checkpoints(self) -> list[int]:
        """The steps of the complete checkpoints, all of which must be whole."""
        return [inspect(path).step for path in sorted((self.seen / "checkpoints").glob("step-*"))]


@pytest.fixture(scope="module")
def two():
    with Cluster(2) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def uninterrupted(two, tmp_path_factory):
    """The losses of the run on two machines to which nothing happens."""
    run = Run(two, tmp_path_factory.mktemp("whole"), "--supervise", "0")
    assert run.ends() == [0, 0], run.said(0)
    return losses_of(run)


def losses_of(run: Run) -> list[float]:
    rows = [json.loads(line) for line in (run.seen / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "group" not in row]
    assert [row["step"] for row in rows] == list(range(len(rows))), "a step is missing or there twice"
    return [row["loss"] for row in rows]


def test_a_killed_machine_comes_back(two, uninterrupted, tmp_path):
    run = Run(two, tmp_path, "--supervise", "3")
    run.reaches(30)
    two.kill(1)
    before = run.steps
    run.again(1)
    assert run.reaches(before) < 60
    assert run.ends() == [0, 0] and losses_of(run) == uninterrupted
    assert "n1" in run.said(0)[0]  # of its trainer or of the machine, whichever is noticed first


def test_the_first_machine_is_killed_and_comes_back(two, uninterrupted, tmp_path):
    run = Run(two, tmp_path, "--supervise", "3")
    run.reaches(30)
    two.kill(0)
    before = run.steps
    run.again(0)
    assert run.reaches(before) < 60
    assert run.ends() == [0, 0] and losses_of(run) == uninterrupted


def test_a_killed_machine_that_does_not_come_back_ends_the_run_with_the_cause(two, tmp_path):
    run = Run(two, tmp_path, "--supervise", "3", "--wait", "15")
    run.reaches(30)
    two.kill(1)
    assert run.until(lambda: run.processes[0].poll() is not None, 60, "the end of n0") < 60
    assert run.processes[0].returncode == 1
    assert re.search("n1 did not come back within 15 s, after: .*n1 (left|ended)", run.said(0)[-1])
    assert run.checkpoints()


def test_a_machine_that_is_cut_off_comes_back(two, uninterrupted, tmp_path):
    run = Run(two, tmp_path, "--supervise", "3")
    run.reaches(30)
    two.cut(1)
    begun, before = time.monotonic(), run.steps
    time.sleep(30)
    two.join(1)
    run.reaches(before + 1)
    assert time.monotonic() - begun < 60
    assert run.ends() == [0, 0] and losses_of(run) == uninterrupted
    assert "n1 was not heard of for 25 s" in run.said(0)[0]


@pytest.mark.parametrize("node", [0, 1])
def test_a_machine_cut_off_for_15_seconds_goes_on(node, two, uninterrupted, tmp_path):
    run = Run(two, tmp_path, "--supervise", "0")
    run.reaches(30)
    two.cut(node)
    time.sleep(15)
    two.join(node)
    assert run.ends() == [0, 0] and losses_of(run) == uninterrupted
    assert run.said(0) == run.said(1) == []


def test_a_machine_that_stays_cut_off_ends_the_run_on_both_sides(two, tmp_path):
    run = Run(two, tmp_path, "--supervise", "3", "--wait", "10")
    run.reaches(30)
    two.cut(1)
    begun = time.monotonic()
    try:
        assert run.ends(75) == [1, 2]
        # The one side needs its silence and the wait, the other hears of nothing in between.
        assert time.monotonic() - begun < 75
    finally:
        two.join(1)
    assert "n1 did not come back within 10 s" in run.said(0)[-1]
    assert "no answer from n0" in run.said(1)[-1]
    assert run.checkpoints()


def test_a_machine_that_waits_says_for_whom(two, tmp_path):
    run = Run(two, tmp_path, "--supervise", "0", "--wait", "20")
    run.processes[1].kill()
    assert run.ends(60)[0] == 1
    assert "elsewhere: Waiting for machine 1, 20 s at most.\n" in run.log(0).read_text()
    assert "machine 1 did not come within 20 s" in run.said(0)[-1]


def test_a_machine_frozen_for_20_seconds_goes_on(two, uninterrupted, tmp_path):
    run = Run(two, tmp_path, "--supervise", "0")
    run.reaches(30)
    two.freeze(1)
    time.sleep(20)
    two.thaw(1)
    assert run.ends() == [0, 0] and losses_of(run) == uninterrupted
    assert run.said(0) == run.said(1) == []


def test_the_first_machine_frozen_for_20_seconds_goes_on(two, uninterrupted, tmp_path):
    run = Run(two, tmp_path, "--supervise", "0")
    run.reaches(30)
    two.freeze(0)
    time.sleep(20)
    two.thaw(0)
    assert run.ends() == [0, 0] and losses_of(run) == uninterrupted


def test_a_full_disk_ends_the_run_and_keeps_its_checkpoints(two, uninterrupted, tmp_path):
    (tmp_path / "run").mkdir()
    two.tmpfs(tmp_path / "run", "2m")
    run = Run(two, tmp_path, "--supervise", "1", folder_seen=two.seen(tmp_path / "run"))
    run.reaches(30)
    kept = run.checkpoints()
    full = run.seen / "ballast"
    with full.open("wb") as file, pytest.raises(OSError):
        file.write(bytes(4 << 20))
    assert run.ends() == [2, 2]
    assert "could not be written" in run.said(0)[-1] and "make room" in run.said(0)[-1]
    assert kept and max(run.checkpoints()) >= max(kept)
    full.unlink()
    for node in (0, 1):
        run.again(node)
    assert run.ends() == [0, 0] and losses_of(run) == uninterrupted


def kill_at_random(run: Run, nodes: Cluster, kills: int, seed: int, note=print) -> None:
    """Kill processes of the run at random moments, and start a machine's command anew where that was killed, too."""
    draw = random.Random(seed)
    for number in range(kills):
        run.reaches(run.steps + 1)
        time.sleep(draw.uniform(0, 3))
        node, whole = draw.randrange(nodes.nodes), draw.random() < 0.5
        begun = time.monotonic()
        if whole:
            nodes.kill(node)
            run.again(node)
        else:  # one trainer, and nothing else
            others = sorted(nodes.processes(node))[1:]  # without the supervisor
            trainers = [pid for pid in others if b"pretrain" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            if trainers:
                os.kill(trainers[-1], 9)
        time.sleep(1)  # a step may have been under way
        before = run.steps
        run.reaches(before)
        note(
            f"kill {number + 1}: {'all of' if whole else 'the trainer of'} n{node} at step {before}, "
            f"further after {time.monotonic() - begun:.1f} s"
        )


def test_five_random_kills_change_nothing(two, tmp_path):
    longer = {"optim.epochs": 40}  # so that it is not over before
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = Run(two, tmp_path / "whole", "--supervise", "0", **longer)
    assert whole.ends() == [0, 0]
    run = Run(two, tmp_path / "killed", "--supervise", "20", **longer)
    kill_at_random(run, two, 5, seed=6)
    assert run.ends() == [0, 0] and losses_of(run) == losses_of(whole)


def main(kills: int) -> None:
    """Compare a run of some minutes with one that is killed again and again."""
    settings = {"optim.epochs": 4 * kills}
    with tempfile.TemporaryDirectory() as folder, Cluster(2) as nodes:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        for path in (whole, killed):
            path.mkdir()
        undisturbed = Run(nodes, whole, "--supervise", "0", **settings)
        assert undisturbed.ends(3600) == [0, 0]
        expected = losses_of(undisturbed)
        print(f"undisturbed: {len(expected)} steps on two machines, ddp", flush=True)
        run = Run(nodes, killed, "--supervise", str(10 * kills), **settings)
        kill_at_random(run, nodes, kills, seed=50, note=lambda text: print(text, flush=True))
        assert run.ends(3600) == [0, 0]
        found = losses_of(run)
        print(f"{len(found)} steps, each once; losses bitwise the same: {found == expected}")
        print(f"complete checkpoints at the end: {run.checkpoints()}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
