"""`elsewhere submit slurm`: a batch script that trains on several nodes and, when preempted, queues again."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..config import Config

_GRACE = 120  # seconds that a step and its checkpoint may take at the end of the time; SLURM may add 60
_CPUS_PER_GPU = 8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?", re.ASCII)
# What the script says itself, and the flag to say it with.
_OURS = {
    "nodes": "--nodes", "N": "--nodes", "gpus-per-node": "--gpus-per-node", "gres": "--gpus-per-node",
    "gpus": "--gpus-per-node", "G": "--gpus-per-node", "cpus-per-task": "--cpus", "c": "--cpus", "time": "--time",
    "t": "--time", "partition": "--partition", "p": "--partition", "account": "--account", "A": "--account",
    "qos": "--qos", "q": "--qos", "job-name": "--name", "J": "--name",
}  # fmt: skip
_FIXED = ("ntasks", "n", "ntasks-per-node", "requeue", "no-requeue", "signal", "output", "o", "open-mode", "chdir", "D")
_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")

_HEAD = """\
#!/bin/bash
# Written by `elsewhere submit slurm`.
{options}

set -eo pipefail
{setup}set -u
export PYTHONUNBUFFERED=1

state() {{
  scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* JobState=\\([A-Z_]*\\).*/\\1/p'
}}

# SLURM itself tells the processes of the step to stop: {grace} s before the time is over, and when a job of a higher
# priority comes. Of what reaches all, this shell survives until they are done; what reaches this shell alone it passes
# on. Not to srun, which would answer with SIGKILL to the step.
told=
stop() {{
  told=yes
  if [ "$(state)" = RUNNING ]; then
    scancel --signal=TERM "$SLURM_JOB_ID" || true
  fi
}}
trap stop TERM

# One task per node: it starts the trainers there, and starts them again after a fault.
srun --kill-on-bad-exit=0 --wait=0 --export=ALL{cpus} \\
  {command} &
step=$!
status=0
wait "$step" || status=$?
while [ "$told" ]; do # the signal ended the wait, not the step
  told=
  status=0
  wait "$step" || status=$?
done
trap '' TERM

# 143: told to stop, and the checkpoint is written. A job that is no longer running was cancelled, or SLURM itself puts
# it back.
if [ "$status" -eq 143 ] && [ "$(state)" = RUNNING ]; then
  echo "Told to stop: job $SLURM_JOB_ID goes back into the queue."
  if scontrol requeue "$SLURM_JOB_ID"; then
    exit 0
  fi
fi
exit "$status"
"""


def add_submit_command(commands: Any) -> None:
    """Add `submit` to `commands`, what `add_subparsers` returned."""
    text = "Submit a run to a cluster's queue."
    queues = commands.add_parser("submit", help=text, description=text).add_subparsers(
        dest="queue", required=True, metavar="QUEUE"
    )
    text = "Submit a run to SLURM: a job that resumes after preemption and at the end of its time."
    more = "Every --sbatch is one more option of sbatch, e.g. --sbatch mem=0 --sbatch constraint=h200."
    command = queues.add_parser("slurm", help=text, description=f"{text} {more}")
    command.add_argument("recipe", help="a packaged recipe (see `elsewhere configs`) or a YAML file")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings, e.g. optim.lr=1e-3")
    command.add_argument("--nodes", type=int, required=True, metavar="N", help="machines")
    command.add_argument(
        "--gpus-per-node", default="8", metavar="[TYPE:]N", help="GPUs of each (default: %(default)s; 0: CPU alone)"
    )
    command.add_argument(
        "--cpus", "--cpus-per-task", dest="cpus", type=int, metavar="N",
        help=f"cores of each (default: {_CPUS_PER_GPU} for each GPU)",
    )  # fmt: skip
    command.add_argument("--time", metavar="D-HH:MM:SS", help="limit of one stay on the nodes (default: the queue's)")
    command.add_argument("--partition", metavar="P")
    command.add_argument("--account", metavar="A")
    command.add_argument("--qos", metavar="Q")
    command.add_argument("--name", metavar="J", help="of the job (default: the run folder's)")
    command.add_argument(
        "--restarts", type=int, default=3, metavar="N", help="after a crash within one stay (default: %(default)s)"
    )
    command.add_argument(
        "--setup", metavar="FILE|LINE",
        help="what makes the environment on the nodes: a file to source, or a line such as 'module load cuda' "
        "(default: this environment's Python by its path)",
    )  # fmt: skip
    command.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="one more option of sbatch")
    command.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    command.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="where the script is kept (default: RUN/submit.sbatch)"
    )


def run_submit(arguments: argparse.Namespace) -> int:
    """Run `elsewhere submit`; the exit status. Raises UserError for something to mend."""
    from ..config import load_config

    config = load_config(arguments.recipe, arguments.overrides)
    script = batch_script(arguments, config, Path.cwd())
    if arguments.dry_run:
        print(script, end="")
        return 0
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise UserError(
            "There is no sbatch on PATH: run this on a login node of SLURM, or see the script by --dry-run."
        )
    run = Path(str(config.run.dir))
    path = _write(script, arguments.output or run / "submit.sbatch", run)
    # What a shell within another job or launcher knows of that would be taken for the new job's.
    outside = {name: value for name, value in os.environ.items() if not _of_a_job(name)}
    done = subprocess.run([sbatch, "--parsable", str(path)], capture_output=True, text=True, env=outside)
    said = " ".join(done.stderr.split())
    if done.returncode:
        raise UserError(f"sbatch refused {path}: {said.rstrip('.') or f'status {done.returncode}'}.")
    if said:
        print(said, file=sys.stderr)
    job = done.stdout.strip().split(";")[0]
    print(f"Submitted job {job} by {path}; its log will be {run / f'{_name(arguments, config)}-{job}.log'}.")
    return 0


def batch_script(arguments: argparse.Namespace, config: Config, folder: Path) -> str:
    """The batch script of a submission from `folder`; raises UserError for what contradicts itself."""
    kind, gpus = _gpus(arguments.gpus_per_node)
    cpus = arguments.cpus if arguments.cpus is not None else _CPUS_PER_GPU * gpus or None
    for flag, value, least in (
        ("--nodes", arguments.nodes, 1), ("--cpus", 1 if cpus is None else cpus, 1),
        ("--restarts", arguments.restarts, 0),
    ):  # fmt: skip
        if value < least:
            raise UserError(f"{flag} {value} is too few: give {least} or more.")
    _check_recipe(config, arguments.nodes, gpus)
    _check_time(arguments.time)
    run, name = folder / str(config.run.dir), _name(arguments, config)
    options = [
        ("job-name", name), ("nodes", arguments.nodes), ("ntasks-per-node", 1),
        # Not --gpus-per-node, which some ways of selecting nodes do not have; --gres counts by node, too.
        ("gres", f"gpu:{kind}{gpus}" if gpus else None), ("cpus-per-task", cpus), ("time", arguments.time),
        ("partition", arguments.partition), ("account", arguments.account), ("qos", arguments.qos),
        ("chdir", folder), ("output", f"{str(run).replace('%', '%%')}/%x-%j.log"), ("open-mode", "append"),
        ("requeue", ""), ("signal", f"TERM@{_GRACE}"),
    ]  # fmt: skip
    lines = [_option(key, str(value)) for key, value in options if value is not None]
    lines += [_extra(text) for text in arguments.sbatch]
    from ..config import TASKS

    recipe = Path(arguments.recipe)
    command = [
        "python" if arguments.setup else sys.executable, "-m", "elsewhere.launch",
        TASKS.get(config.method.kind, "pretrain"),
        str(recipe.absolute()) if recipe.is_file() else arguments.recipe, *arguments.overrides,
        # A node without the GPUs that the batch was divided for would otherwise train on its CPU.
        *(["engine.device=cuda"] if gpus and config.engine.device == "auto" else []),
        "--supervise", str(arguments.restarts), "--processes", str(max(gpus, 1)),
    ]  # fmt: skip
    return _HEAD.format(
        options="\n".join(lines), setup=_setup(arguments.setup), grace=_GRACE, command=shlex.join(command),
        cpus=f" --cpus-per-task={cpus}" if cpus else "",
    )  # fmt: skip


def _gpus(text: str) -> tuple[str, int]:
    """`h200:8` is `h200:` and 8."""
    match = re.fullmatch(r"([A-Za-z][A-Za-z0-9._-]*:)?([0-9]{1,4})", text)
    if not match:
        raise UserError(f"--gpus-per-node {text}: give a number, or the cluster's word and a number, e.g. h200:8.")
    return match[1] or "", int(match[2])


def _check_recipe(config: Config, nodes: int, gpus: int) -> None:
    """What would otherwise be found out when the nodes are there."""
    engine, batch, micro = config.engine, config.optim.batch_size, config.loader.micro_batch
    if not config.data.places()[0]:
        raise UserError("Say where the images are: data.path=FOLDER, data.path=cifar10:FOLDER, or data.path=digits.")
    if engine.device == "cpu" and gpus:
        raise UserError(f"engine.device=cpu leaves {gpus} GPUs of every node idle: give --gpus-per-node 0 as well.")
    if engine.device == "cuda" and not gpus:
        raise UserError("engine.device=cuda needs GPUs: give --gpus-per-node, or set engine.device=cpu.")
    ranks, what = nodes * max(gpus, 1), f"{nodes} nodes" + (f" × {gpus} GPUs" if gpus else "")
    if batch % ranks:
        below = batch // ranks * ranks
        near = f"{below} or {below + ranks}" if below else str(ranks)
        raise UserError(f"optim.batch_size={batch} does not divide by {what}: set {near}, or ask for other numbers.")
    if micro and batch // ranks % micro:
        raise UserError(
            f"loader.micro_batch={micro} does not divide the {batch // ranks} images of a rank (optim.batch_size="
            f"{batch} over {what}): set one that does, or leave it out."
        )
    if engine.kind == "deepspeed":
        from ..engine.ds_settings import check_recipe, load_settings

        share, clip = batch // ranks, config.optim.clip_grad
        settings = load_settings(
            engine.deepspeed, batch_size=batch, micro_batch=micro or share, accumulation=share // (micro or share),
            clip_grad=clip, world=ranks, device_type="cuda" if gpus else "cpu",
        )  # fmt: skip
        check_recipe(
            settings, optimizer_kind=config.optim.kind, clip_grad=clip, clip_scope=config.optim.clip_scope,
            precision=engine.precision, compile=engine.compile,
        )  # fmt: skip
    if ranks % engine.replicas:
        raise UserError(f"engine.replicas={engine.replicas} does not divide {what}: set one that does.")


def _check_time(text: str | None) -> None:
    """Refuse a limit that SLURM does not know, and one that leaves no time to train."""
    if text is None or text in ("UNLIMITED", "INFINITE"):
        return
    match = _TIME.fullmatch(text)
    if not match:
        raise UserError(f"--time {text} is none: give D-HH:MM:SS, HH:MM:SS, or minutes.")
    first, second, third = (int(match[key] or 0) for key in ("first", "second", "third"))
    if match["days"]:
        seconds = int(match["days"]) * 86400 + first * 3600 + second * 60 + third
    elif match["third"]:
        seconds = first * 3600 + second * 60 + third
    else:
        seconds = first * 60 + second
    if seconds < 3 * _GRACE + 60:  # else a job would be told to stop before it has trained
        raise UserError(
            f"--time {text} is too short: the last {_GRACE} to {_GRACE + 60} s are for the checkpoint; give 8 minutes "
            "or more."
        )


def _name(arguments: argparse.Namespace, config: Config) -> str:
    if arguments.name is None:
        return re.sub(r"[^A-Za-z0-9._+-]+", "-", Path(str(config.run.dir)).name).strip("-._+")[:100] or "elsewhere"
    if not _NAME.fullmatch(arguments.name):
        raise UserError(f"--name {arguments.name!r}: take letters, digits, dots and dashes, e.g. stop-h16.")
    return arguments.name


def _option(key: str, value: str) -> str:
    if "\n" in value:
        raise UserError(f"The value of {key} has a line break, which a batch script cannot say: {value!r}.")
    return f"#SBATCH --{key}" + (f"={shlex.quote(value)}" if value else "")


def _extra(text: str) -> str:
    """One more option of sbatch, with or without its dashes."""
    text = text.strip()
    name = re.split(r"[=\s]", text.lstrip("-"), maxsplit=1)[0]
    short = re.match(r"-([A-Za-z])", text)  # -N4 is -N 4
    name = short[1] if short else name
    if not name or "\n" in text:
        raise UserError(f"--sbatch {text!r} is no option of sbatch; write one, e.g. --sbatch mem=0.")
    if name in _OURS:
        raise UserError(f"--sbatch {text}: say that by {_OURS[name]}, which the run's own settings are checked with.")
    if name in _FIXED:
        raise UserError(f"--sbatch {text}: the script needs its own {name}; write it by --dry-run and change it there.")
    return f"#SBATCH {text if text.startswith('-') else f'--{text}'}"


def _setup(text: str | None) -> str:
    """Before `set -u`, which environments' own scripts seldom bear."""
    if not text:
        return ""
    path = Path(text).expanduser()
    if not path.is_file() and " " not in text and ("/" in text or text.endswith(".sh")):
        raise UserError(f"--setup {text}: there is no such file; give one, or a line for the shell.")
    return (f"source {shlex.quote(str(path.absolute()))}" if path.is_file() else text) + "\n"


def _of_a_job(name: str) -> bool:
    if name in ("SLURM_CONF", "SLURM_CLUSTERS"):
        return False
    return name.startswith(("SLURM_", "SLURMD_", "SRUN_")) or name in _OF_A_LAUNCHER


def _write(script: str, path: Path, run: Path) -> Path:
    """Keep the script at `path`, or beside it under a numbered name where another one is; the folders are made."""
    wanted, number = path, 1
    try:
        run.mkdir(parents=True, exist_ok=True)  # where SLURM opens the log, before anything of ours runs
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                with open(path, "x", encoding="utf-8") as file:
                    file.write(script)
                return path
            except FileExistsError:
                if path.is_file() and path.read_text(encoding="utf-8", errors="replace") == script:
                    return path
                number += 1
                path = wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
    except OSError as error:
        raise UserError(f"The script cannot be written to {path} ({error.strerror}): give another by -o.") from error
