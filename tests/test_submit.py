"""`elsewhere submit slurm`: what it refuses, what it writes, and what its script does when the step ends.

Programs that stand in for SLURM's are on PATH here: the script has run under the real one (docs/multi-node.md), which
no test can install.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from elsewhere.launch.errors import UserError
from elsewhere.launch.nodes.submit import add_submit_command, run_submit

# What the stand-ins for srun, scontrol, scancel and sbatch do: they note how they were called in $CALLS; srun waits for
# the file `end` and returns the status in it.
STAND_IN = """#!{python}
import json, os, pathlib, sys, time
folder = pathlib.Path(__file__).parent
name = pathlib.Path(sys.argv[0]).name
with open(folder / "calls", "a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if name == "srun":
    while not (folder / "end").exists():
        time.sleep(0.02)
    sys.exit(int((folder / "end").read_text()))
if name == "scontrol" and "show" in sys.argv:
    print(f"JobId=7 JobName=x UserId=JobState(0) Priority=1 JobState={{os.environ['STATE']}} Reason=None")
if name == "scontrol" and "requeue" in sys.argv:
    sys.exit(int(os.environ.get("REQUEUE", "0")))
if name == "sbatch":
    (folder / "environ").write_text(json.dumps(dict(os.environ)))
    print(os.environ.get("SAYS", ""), file=sys.stderr)
    print("7;cluster")
    sys.exit(1 if os.environ.get("SAYS") else 0)
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for SLURM's programs in front of PATH; the folder that they note their calls in."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "program").write_text(STAND_IN.format(python=sys.executable))
    (folder / "program").chmod(0o755)
    for name in ("srun", "scontrol", "scancel", "sbatch"):
        (folder / name).symlink_to("program")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def calls(folder, name=None) -> list[list[str]]:
    path = folder / "calls"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [call for call in found if name in (None, call[0])]


@pytest.fixture
def submit(tmp_path, monkeypatch, capsys):
    """Run `elsewhere submit slurm demo` in a folder with a blank and a quote; returns what it printed."""
    (tmp_path / "a run's 5%").mkdir()
    monkeypatch.chdir(tmp_path / "a run's 5%")

    def run(*arguments, recipe="demo"):
        parser = argparse.ArgumentParser()
        add_submit_command(parser.add_subparsers(dest="command"))
        overrides = [word for word in arguments if re.match(r"[a-z]+\.[a-z_]+=", word)]
        flags = [word for word in arguments if word not in overrides]
        if "--nodes" not in flags:
            flags += ["--nodes", "2"]
        status = run_submit(parser.parse_args(["submit", "slurm", recipe, *overrides, *flags]))
        assert status == 0
        return capsys.readouterr().out

    return run


def options(script) -> dict[str, str]:
    """The #SBATCH lines, quotes taken away as a shell would."""
    found = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH "):
            (word,) = shlex.split(line.removeprefix("#SBATCH "))
            key, _, value = word.partition("=")
            found[key] = value
    return found


def command(script) -> list[str]:
    """The words of the command that srun starts."""
    return shlex.split(next(line for line in script.splitlines() if line.startswith("  ") and line.endswith(" &"))[:-1])


def test_the_options_of_the_job(submit, tmp_path):
    script = submit(
        "--nodes", "4", "--gpus-per-node", "h200:8", "--cpus", "96", "--time", "2-00:00:00", "--partition", "train",
        "--account", "us", "--qos", "high", "--name", "stop-h16", "--sbatch", "mem=0", "--sbatch=--exclusive",
        "--dry-run",
    )  # fmt: skip
    folder = tmp_path / "a run's 5%"
    assert options(script) == {
        "--job-name": "stop-h16", "--nodes": "4", "--ntasks-per-node": "1", "--gres": "gpu:h200:8",
        "--cpus-per-task": "96", "--time": "2-00:00:00", "--partition": "train", "--account": "us", "--qos": "high",
        "--chdir": str(folder), "--output": str(folder).replace("%", "%%") + "/runs/demo/%x-%j.log",
        "--open-mode": "append", "--requeue": "", "--signal": "TERM@120", "--mem": "0", "--exclusive": "",
    }  # fmt: skip


def test_options_that_are_not_given_are_left_to_the_cluster(submit):
    script = submit("--gpus-per-node", "0", "--dry-run")
    left = {"--gres", "--cpus-per-task", "--time", "--partition", "--account", "--qos"}
    assert not left & set(options(script)) and "--cpus-per-task" not in script


def test_a_gpu_brings_eight_cores(submit):
    script = submit("--gpus-per-node", "4", "--dry-run")
    assert options(script)["--cpus-per-task"] == "32" and "srun" in script and " --cpus-per-task=32 \\" in script


def test_the_command_is_this_environment_s_python_with_absolute_paths(submit, tmp_path):
    recipe = tmp_path / "a run's 5%" / "mine & yours.yaml"
    recipe.write_text("base: demo\n")
    found = command(submit("data.path=/d a/t'a", "--restarts", "9", "--dry-run", recipe=recipe.name))
    assert found == [
        sys.executable, "-m", "elsewhere.launch", "pretrain", str(recipe), "data.path=/d a/t'a", "engine.device=cuda",
        "--supervise", "9", "--processes", "8",
    ]  # fmt: skip


def test_without_gpus_the_device_is_left_as_it_is(submit):
    found = command(submit("--gpus-per-node", "0", "--dry-run"))
    assert not any("engine.device" in word for word in found) and found[-2:] == ["--processes", "1"]


def test_an_environment_of_one_s_own_brings_its_python(submit):
    script = submit("--setup", "module load cuda && source venv/bin/activate", "--dry-run")
    assert command(script)[0] == "python" and "\nmodule load cuda && source venv/bin/activate\nset -u\n" in script


def test_a_file_of_set_up_is_sourced_by_its_path(submit, tmp_path):
    path = tmp_path / "a run's 5%" / "set up.sh"
    path.write_text("")
    assert f"\nsource {shlex.quote(str(path))}\n" in submit("--setup", path.name, "--dry-run")


@pytest.mark.parametrize(
    "flags", [(), ("--gpus-per-node", "0"), ("--setup", "true"), ("--sbatch", "comment='a b'"), ("--name", "a+b")]
)
def test_the_script_is_valid_bash(submit, flags):
    checked = subprocess.run(["bash", "-n"], input=submit(*flags, "--dry-run"), capture_output=True, text=True)
    assert checked.returncode == 0 and not checked.stderr


def test_a_dry_run_needs_no_slurm_and_writes_nothing(submit, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    submit("--dry-run", "-o", "there/mine.sbatch")
    assert not list((tmp_path / "a run's 5%").iterdir())


def test_the_script_is_kept_in_the_run_and_submitted(submit, slurm, tmp_path):
    printed, script = submit("run.dir=mine", "--name", "n"), tmp_path / "a run's 5%" / "mine" / "submit.sbatch"
    assert script.read_text() == submit("run.dir=mine", "--name", "n", "--dry-run")
    assert calls(slurm) == [["sbatch", "--parsable", "mine/submit.sbatch"]]
    assert printed == "Submitted job 7 by mine/submit.sbatch; its log will be mine/n-7.log.\n"


def test_another_script_is_not_overwritten_and_the_same_is_not_doubled(submit, slurm, tmp_path):
    run = tmp_path / "a run's 5%" / "runs" / "demo"
    first = submit("--nodes", "2") and (run / "submit.sbatch").read_text()
    for nodes, expected in (("4", "submit-2.sbatch"), ("2", "submit.sbatch"), ("4", "submit-2.sbatch")):
        assert f"by runs/demo/{expected};" in submit("--nodes", nodes)
    assert (run / "submit.sbatch").read_text() == first
    assert sorted(path.name for path in run.iterdir()) == ["submit-2.sbatch", "submit.sbatch"]


def test_the_script_may_be_kept_elsewhere(submit, slurm, tmp_path):
    submit("-o", "jobs/mine.sbatch")
    assert (tmp_path / "a run's 5%" / "jobs" / "mine.sbatch").exists()
    assert (tmp_path / "a run's 5%" / "runs" / "demo").is_dir()  # SLURM opens the log there


def test_another_job_s_variables_are_not_submitted(submit, slurm, monkeypatch):
    for name in ("SLURM_STEP_NODELIST", "SLURM_MEM_PER_CPU", "SLURMD_NODENAME", "RANK", "SLURM_CONF", "OTHER"):
        monkeypatch.setenv(name, "x")
    submit()
    kept = json.loads((slurm / "environ").read_text())
    there = {name for name in kept if name.startswith("SLURM") or name in ("RANK", "OTHER")}
    assert there == {"SLURM_CONF", "OTHER"}


def refused(submit, *arguments, **more) -> str:
    with pytest.raises(UserError) as caught:
        submit(*arguments, **more)
    text = str(caught.value)
    assert text[-1] in ".?" and ". " not in text.replace("e.g. ", "") and "\n" not in text, f"not one sentence: {text}"
    return text


REFUSED = {
    "a misspelt setting": (("optim.batchsize=64",), "optim.batchsize"),
    "a batch that does not divide": (("--nodes", "3"), "optim.batch_size=64 does not divide by 3 nodes × 8 GPUs"),
    "a batch below the ranks": (("--nodes", "16"), "does not divide by 16 nodes × 8 GPUs: set 128, or"),
    "a batch that nodes do not divide": (("--nodes", "3", "--gpus-per-node", "0"), "divide by 3 nodes: set 63 or 66"),
    "a micro-batch that does not divide": (("loader.micro_batch=3",), "loader.micro_batch=3 does not divide the 4"),
    "copies that do not divide": (("engine.kind=fsdp", "engine.replicas=3"), "engine.replicas=3 does not divide"),
    "no images": (("data.path=null",), "Say where the images are"),
    "GPUs for a CPU": (("engine.device=cpu",), "engine.device=cpu leaves 8 GPUs of every node idle"),
    "no GPUs for CUDA": (("engine.device=cuda", "--gpus-per-node", "0"), "engine.device=cuda needs GPUs"),
    "no nodes": (("--nodes", "0"), "--nodes 0 is too few"),
    "fewer than no GPUs": (("--gpus-per-node=-1",), "--gpus-per-node -1: give a number"),
    "GPUs without a number": (("--gpus-per-node", "h200"), "--gpus-per-node h200: give a number"),
    "no cores": (("--cpus", "0"), "--cpus 0 is too few"),
    "fewer than no restarts": (("--restarts", "-1"), "--restarts -1 is too few"),
    "a time that is none": (("--time", "two days"), "--time two days is none"),
    "a time of too many parts": (("--time", "1:2:3:4"), "--time 1:2:3:4 is none"),
    "a short time": (("--time", "5"), "--time 5 is too short"),
    "a short time in seconds": (("--time", "5:00"), "--time 5:00 is too short"),
    "a name of two words": (("--name", "my run"), "--name 'my run'"),
    "a name with a place": (("--name", "a/b"), "--name 'a/b'"),
    "nodes by another way": (("--sbatch=--nodes=8",), "--sbatch --nodes=8: say that by --nodes"),
    "nodes by a letter": (("--sbatch=-N8",), "--sbatch -N8: say that by --nodes"),
    "GPUs by another way": (("--sbatch", "gres=gpu:4"), "say that by --gpus-per-node"),
    "another signal": (("--sbatch", "signal=USR1@60"), "the script needs its own signal"),
    "two lines": (("--sbatch", "mem=0\n#SBATCH --nodes=8"), "is no option of sbatch"),
    "nothing": (("--sbatch=",), "is no option of sbatch"),
    "an account of two lines": (("--account", "a\nrm"), "has a line break"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_it_is_queued(case, submit, slurm, tmp_path):
    arguments, expected = REFUSED[case]
    assert expected in refused(submit, *arguments)
    assert not calls(slurm) and not list((tmp_path / "a run's 5%").iterdir())


@pytest.mark.parametrize("time", ["8", "480", "8:00", "1:00:00", "1-0", "1-00:00", "2-12:30:00", "UNLIMITED"])
def test_every_way_to_write_a_time_is_taken(submit, time):
    assert options(submit("--time", time, "--dry-run"))["--time"] == time


def test_a_recipe_that_is_not_there_is_refused(submit):
    assert "nowhere.yaml" in refused(submit, recipe="nowhere.yaml")


def test_without_slurm_a_sentence_says_where_to_go(submit, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no sbatch on PATH" in refused(submit)
    assert not list((tmp_path / "a run's 5%").iterdir())


def test_what_sbatch_refuses_is_passed_on(submit, slurm, monkeypatch):
    monkeypatch.setenv("SAYS", "sbatch: error: invalid partition specified: trian")
    expected = "sbatch refused runs/demo/submit.sbatch: sbatch: error: invalid partition specified: trian."
    assert refused(submit) == expected


def test_a_folder_that_cannot_be_written_is_told(submit, slurm, tmp_path):
    (tmp_path / "a run's 5%" / "runs").write_text("")
    assert "cannot be written to runs/demo/submit.sbatch" in refused(submit)


@pytest.fixture
def job(submit, slurm, tmp_path):
    """Start the script as SLURM's batch shell would be, in a `state`, with srun under way; its process."""
    started = []

    def start(state="RUNNING", flags=(), **environ) -> subprocess.Popen:
        path = tmp_path / "script"
        path.write_text(submit(*flags, "--dry-run"))
        shell = subprocess.Popen(
            ["bash", str(path)], env={**os.environ, "SLURM_JOB_ID": "7", "STATE": state, **environ},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append(shell)
        return shell

    yield start
    (slurm / "end").write_text("9")
    for shell in started:
        shell.kill()
        shell.communicate()


def until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def end(slurm, status) -> None:
    aside = slurm / "aside"
    aside.write_text(str(status))
    aside.rename(slurm / "end")


REQUEUE = ["scontrol", "requeue", "7"]


def test_srun_gets_the_command_word_by_word(job, slurm, submit):
    flags = ("data.path=/d a/t'a $HOME", "--cpus", "5")
    end(slurm, 0)
    assert job(flags=flags).wait(20) == 0
    ((_, *found),) = calls(slurm, "srun")
    assert found == [
        "--kill-on-bad-exit=0", "--wait=0", "--export=ALL", "--cpus-per-task=5", sys.executable, "-m",
        "elsewhere.launch", "pretrain", "demo", "data.path=/d a/t'a $HOME", "engine.device=cuda", "--supervise", "3",
        "--processes", "8",
    ]  # fmt: skip


@pytest.mark.parametrize("status", [0, 1, 2, 3, 137])
def test_a_run_that_ends_by_itself_is_not_queued_again(job, slurm, status):
    end(slurm, status)
    assert job().wait(20) == status and REQUEUE not in calls(slurm)


def test_a_run_that_was_told_to_stop_is_queued_again(job, slurm):
    end(slurm, 143)
    assert job().wait(20) == 0 and calls(slurm).count(REQUEUE) == 1


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING"])
def test_a_job_that_was_cancelled_or_is_queued_again_already_is_left_alone(job, slurm, state):
    end(slurm, 143)
    assert job(state).wait(20) == 143 and REQUEUE not in calls(slurm)


def test_a_job_that_cannot_be_queued_again_says_that_it_was_stopped(job, slurm):
    end(slurm, 143)
    assert job(REQUEUE="1").wait(20) == 143


@pytest.mark.parametrize("status", [0, 1, 143])
def test_a_signal_to_the_shell_alone_reaches_the_step_and_the_shell_waits(job, slurm, status):
    shell = job()
    until(lambda: calls(slurm, "srun"))
    shell.send_signal(signal.SIGTERM)
    until(lambda: calls(slurm, "scancel"))
    assert calls(slurm, "scancel") == [["scancel", "--signal=TERM", "7"]]
    assert shell.poll() is None
    end(slurm, status)
    assert shell.wait(20) == (0 if status == 143 else status)
    assert (REQUEUE in calls(slurm)) == (status == 143)


def test_a_signal_that_reached_the_step_as_well_is_not_sent_twice(job, slurm):
    """As in `scancel JOB`, and in preemption without a grace time: the job is completing."""
    shell = job("COMPLETING")
    until(lambda: calls(slurm, "srun"))
    shell.send_signal(signal.SIGTERM)
    until(lambda: calls(slurm, "scontrol"))
    end(slurm, 143)
    assert shell.wait(20) == 143 and not calls(slurm, "scancel")


def test_a_set_up_that_fails_starts_nothing(job, slurm):
    assert job(flags=("--setup", "false")).wait(20) == 1 and not calls(slurm)


def test_a_set_up_with_unset_variables_is_borne(job, slurm):
    end(slurm, 0)
    assert job(flags=("--setup", 'echo "$NOT_SET_ANYWHERE"')).wait(20) == 0
