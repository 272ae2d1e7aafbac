"""Which process this is, by each launcher's environment."""

import subprocess
import sys

import pytest
import torch

from elsewhere.launch.errors import UserError
from elsewhere.launch.nodes.place import find_place
from elsewhere.launch.world import pick_device

# As the launchers were seen to set them: process 3 of 2 machines with 2 processes each.
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "MASTER_ADDR": "n0",
    "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    "MASTER_ADDR": "n0", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.mark.parametrize("environ", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_the_launchers_agree(environ):
    place = find_place(environ)
    assert (place.rank, place.size, place.local_rank, place.local_size, place.node) == (3, 4, 1, 2, 1)
    assert (place.master, place.port) == ("n0", 29500)


def test_torchruns_own_process_keeps_the_store_and_each_restart_its_own_names():
    assert find_place(TORCHRUN).hosted and find_place(TORCHRUN).life == "2"
    assert not find_place(DEEPSPEED).hosted


def test_alone():
    assert find_place({}).size == 1 and find_place({"RANK": "0", "WORLD_SIZE": "1"}).master is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"RANK": "four"}, "RANK=four"),
        ({"RANK": "4"}, "contradicts itself"),
        ({"LOCAL_RANK": "2"}, "contradicts itself"),
        ({"MASTER_ADDR": ""}, "no MASTER_ADDR"),
        ({"MASTER_PORT": ""}, "no MASTER_PORT"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(change, expected):
    with pytest.raises(UserError) as refused:
        find_place({**TORCHRUN, **change})
    assert expected in str(refused.value)


@pytest.fixture
def gpus(monkeypatch):
    """A machine that says it has so many; none of them is used."""

    def show(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return show


def test_more_processes_than_gpus_are_refused_on_all_of_the_machine(gpus):
    gpus(4)
    assert pick_device("auto", 3, 4) == torch.device("cuda", 3)
    for local_rank in range(8):
        with pytest.raises(UserError, match="8 processes are started on a machine that shows 4 GPUs"):
            pick_device("auto", local_rank, 8)


def test_a_task_of_srun_may_see_its_own_gpu_alone(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert pick_device("auto", 5, 8) == torch.device("cuda", 0)


@pytest.mark.slow
def test_too_few_open_files_are_refused_instead_of_a_run_that_waits_for_ever(tmp_path):
    command = f"ulimit -n 40; exec {sys.executable} -m elsewhere.launch pretrain demo run.dir={tmp_path / 'run'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "A process may open only 40 files at once here, and a run needs 64 or more" in done.stderr
