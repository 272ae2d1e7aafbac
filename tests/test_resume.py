"""A run that was interrupted goes on as if nothing had happened: the losses are bitwise those of one that was not."""

import signal
import time

import psutil
import pytest

from elsewhere.launch.config import load_config
from elsewhere.launch.errors import UserError
from elsewhere.launch.pretrain import pretrain


def train(settings, **options):
    return pretrain(load_config("demo", settings), **options)


@pytest.fixture
def uninterrupted(tiny, losses, tmp_path):
    settings = {**tiny, "run.dir": str(tmp_path / "uninterrupted"), "optim.epochs": 2}
    train(settings)
    return losses(settings["run.dir"])


@pytest.mark.long
def test_killed_mid_epoch_twice_with_other_workers(tiny, uninterrupted, losses, start, wait_for_step):
    settings = {**tiny, "optim.epochs": 2, "checkpoint.every_steps": 5}
    for workers, step in ((0, 18), (1, 60)):
        process = start({**settings, "loader.workers": workers})
        wait_for_step(process, settings["run.dir"], step)
        process.kill()
        process.wait()
    output, _ = (process := start({**settings, "loader.workers": 2})).communicate()
    assert process.returncode == 0, output
    assert losses(settings["run.dir"]) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(number, tiny, uninterrupted, losses, start, wait_for_step):
    settings = {**tiny, "optim.epochs": 2, "checkpoint.every_minutes": 0, "loader.workers": 1}
    process = start(settings)
    wait_for_step(process, settings["run.dir"], 10)
    for _ in range(3):  # with its echoes, as SLURM and launchers send them
        process.send_signal(number)
        time.sleep(0.01)
    output, _ = process.communicate()
    assert process.returncode == 128 + number, output
    assert "continues from there" in output
    result = train(settings)
    assert result.complete
    assert losses(settings["run.dir"]) == uninterrupted


@pytest.mark.slow
def test_a_killed_loader_worker_ends_the_run_in_one_sentence(tiny, start, wait_for_step):
    settings = {**tiny, "optim.epochs": 200, "loader.workers": 2}
    process = start(settings)
    wait_for_step(process, settings["run.dir"], 10)
    command = psutil.Process(process.pid).cmdline()
    workers = [child for child in psutil.Process(process.pid).children() if child.cmdline() == command]
    assert len(workers) == 2
    workers[0].kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert "elsewhere: A loader worker died" in output
    assert "Traceback" not in output


def test_another_start_of_a_complete_run_changes_nothing(tiny, losses, tmp_path):
    train(tiny)
    before = losses(tiny["run.dir"])
    result = train(tiny)
    assert result.complete
    assert losses(tiny["run.dir"]) == before


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tiny, losses, tmp_path, capsys):
    whole = {**tiny, "run.dir": str(tmp_path / "whole")}
    train(whole)
    settings = {**tiny, "checkpoint.every_steps": 20}
    train(settings)
    newest = tmp_path / "run" / "checkpoints" / "step-00000044" / "__0_0.distcp"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    train(settings)
    assert "step-00000044 is damaged: the checksum of __0_0.distcp is wrong" in capsys.readouterr().out.replace(
        "\n", " "
    )
    assert losses(settings["run.dir"]) == losses(whole["run.dir"])
    assert (tmp_path / "run" / "checkpoints" / "damaged-step-00000044").is_dir(), "a damaged checkpoint is set aside"


def test_all_checkpoints_damaged_stops_without_overwriting(tiny, losses, tmp_path):
    train({**tiny, "checkpoint.every_steps": 20})
    folders = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    for folder in folders:
        (folder / "__0_0.distcp").write_bytes(b"")
    rows = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"None of the 2 checkpoints .* can be used"):
        train(tiny)
    assert sorted((tmp_path / "run" / "checkpoints").glob("step-*")) == folders
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == rows


def test_a_changed_result_setting_is_refused_and_listed(tiny):
    train(tiny)
    changed = {**tiny, "optim.lr": 0.5, "mask.target_blocks": 2}
    with pytest.raises(UserError, match=r"mask.target_blocks: 4 -> 2; optim.lr: 0.001 -> 0.5.*--allow-config-change"):
        train(changed)
    assert train(changed, allow_config_change=True).complete


@pytest.mark.parametrize(
    "changed",
    [{"loader.micro_batch": 8}, {"loader.prefetch": 5}, {"engine.precision": "bfloat16"}, {"checkpoint.keep": 9}],
)
def test_settings_that_do_not_change_the_result_never_refuse(changed, tiny):
    train(tiny)
    assert train({**tiny, **changed}).complete


def test_a_changed_precision_is_announced(tiny, capsys):
    train(tiny)
    train({**tiny, "engine.precision": "bfloat16"})
    assert "precision: float32 -> bfloat16" in capsys.readouterr().out


def test_fresh_refuses_to_overwrite(tiny):
    assert train(tiny, fresh=True).complete
    with pytest.raises(UserError, match=r"--fresh: .* holds a run already"):
        train(tiny, fresh=True)


def test_more_images_than_at_the_start_are_refused(tiny):
    import torch

    def images(count):
        return torch.utils.data.TensorDataset(torch.zeros(count, 1, 8, 8), torch.arange(count))

    train(tiny, dataset=images(64))
    with pytest.raises(UserError, match="images to train: 64 -> 96"):
        train(tiny, dataset=images(96))


def test_two_processes_cannot_share_a_run(tiny, start, wait_for_step):
    settings = {**tiny, "optim.epochs": 50}
    process = start(settings)
    wait_for_step(process, settings["run.dir"], 1)
    with pytest.raises(UserError, match="Another process trains in"):
        train(tiny)


@pytest.mark.slow
def test_a_run_killed_with_its_workers_alive_can_be_started_at_once(tiny, start, wait_for_step):
    """Loader workers notice the death of their trainer after seconds; they must not hold the run's folder."""
    import psutil

    process = start({**tiny, "optim.epochs": 50, "loader.workers": 1})
    wait_for_step(process, tiny["run.dir"], 1)
    workers = psutil.Process(process.pid).children(recursive=True)
    for worker in workers:
        worker.suspend()  # so that it cannot notice
    process.kill()
    process.wait()
    try:
        assert workers
        assert train({**tiny, "optim.epochs": 1}, allow_config_change=True).complete
    finally:
        for worker in workers:
            worker.kill()
