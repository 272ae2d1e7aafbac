"""`elsewhere bench step`: cases of recipes and settings, their figures, and what it refuses."""

import contextlib
import gzip
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elsewhere.launch.bench_step import _Case, variants
from elsewhere.launch.bench_step_table import case_names
from elsewhere.launch.cli import main


def test_every_recipe_meets_every_combination_of_values():
    cases = variants(["one", "two"], ["seed=1"], ["a=1,2", "b=x,y"])
    combinations = [["seed=1", a, b] for a in ("a=1", "a=2") for b in ("b=x", "b=y")]
    assert cases == [(recipe, combination) for recipe in ("one", "two") for combination in combinations]


def test_recipes_alone_are_cases_with_their_settings():
    assert variants(["one", "two"], ["seed=1"], []) == [("one", ["seed=1"]), ("two", ["seed=1"])]


@pytest.fixture
def refused(capsys, monkeypatch):
    """The sentence that `elsewhere bench step` ends with, status 2, before it starts a process."""
    monkeypatch.setattr("elsewhere.launch.bench_step.multiprocessing.get_context", lambda _: pytest.fail("started"))

    def run(*arguments):
        assert main(["bench", "step", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("elsewhere: ") and err.count("\n") == 1
        return err.removeprefix("elsewhere: ").strip()

    return run


@pytest.mark.parametrize("arguments", [[], ["optim.lr=1"], ["--vary", "compile=true,false"]], ids=str)
def test_no_recipe(refused, arguments):
    assert refused(*arguments) == "Name a recipe to measure, e.g. elsewhere bench step cifar10_maeplus_rpe."


@pytest.mark.parametrize("vary", ["model.relative.terms", "model.relative.terms=k", "=k,qk"])
def test_a_vary_that_compares_nothing(refused, vary):
    assert refused("demo_adpe", "--vary", vary) == (
        f"--vary {vary} compares nothing; write key=a,b, e.g. --vary model.relative.terms=none,k."
    )


def test_a_recipe_behind_vary_is_one(refused):
    assert refused("--vary", "compile=true,false", "demo_adp").startswith("There is no recipe or file called demo_adp;")


def test_an_engine_that_is_not_there(refused):
    assert refused("demo", "--vary", "engine=ddp,zero22").startswith(
        "There is no DeepSpeed setting engine.deepspeed=zero22; did you mean zero2?"
    )


def test_an_interrupt_of_the_terminal_ends_without_a_traceback():
    """Ctrl-C reaches the measured processes as well, which have not yet imported what would catch it."""
    command = [sys.executable, "-m", "elsewhere.launch", "bench", "step", "demo", "--rounds", "1000"]
    bench = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # What a shell starts in the background ignores interrupts, and so would all that these tests start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not (children := Path(f"/proc/{bench.pid}/task/{bench.pid}/children").read_text().split()):
        assert bench.poll() is None, bench.communicate()[1]
        time.sleep(0.01)
    time.sleep(0.3)  # it imports
    os.killpg(bench.pid, signal.SIGINT)
    err = bench.communicate(timeout=60)[1]
    assert bench.returncode == 130 and "Traceback" not in err
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a measured process outlives the bench"
        time.sleep(0.05)


def test_an_unknown_recipe(refused):
    assert refused("demo", "demo_adp") == "There is no recipe or file called demo_adp; did you mean demo_adpe?"


def test_a_value_that_is_not_possible(refused):
    assert refused("demo_adpe", "--vary", "model.relative.terms=k,z").startswith("model.relative.terms=z is not")


@pytest.mark.parametrize("arguments", [["demo", "--batch", "0"], ["demo", "--steps", "x"]], ids=str)
def test_a_wrong_command_ends_with_its_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "step", *arguments])
    assert end.value.code == 2 and "`elsewhere bench step --help`" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [False, True], ids=["while it is built", "while it waits"])
@pytest.mark.parametrize(
    ("kill", "said"),
    [(True, "signal 9, likely for want of memory; lower --batch."), (False, "status 0; what it printed says why.")],
)
def test_a_measured_process_that_ends_early_is_said(asked, kill, said):
    case = object.__new__(_Case)
    case.failure = None
    case._pipe, theirs = multiprocessing.Pipe()
    theirs.close()
    case._process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60 * kill,))
    case._process.start()
    if kill:
        case._process.kill()
    assert (case.ask("turn", 1) if asked else case.answer()) is None
    assert case.failure == f"The measured process ended early with {said}"


def test_short_names_are_settings():
    cases = variants(["demo"], [], ["compile=true,false", "checkpointing=none,full"])
    assert cases[1][1] == ["engine.compile=true", "engine.activation_checkpointing=full"]
    engines = variants(["demo"], [], ["engine=fsdp,zero2"])
    assert engines == [
        ("demo", ["engine.kind=fsdp"]), ("demo", ["engine.kind=deepspeed", "engine.deepspeed=zero2"])
    ]  # fmt: skip


def test_a_row_is_called_by_what_the_others_have_not():
    cases = variants(["demo"], ["seed=1"], ["checkpointing=none,full", "engine=ddp,zero3"])
    names, shared = case_names([{"recipe": recipe, "overrides": overrides} for recipe, overrides in cases])
    assert shared == ["seed=1"]
    assert names[0] == "demo checkpointing=none engine=ddp" and names[3] == "demo checkpointing=full engine=zero3"


def test_several_processes(refused, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2"),
                        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29400")):  # fmt: skip
        monkeypatch.setenv(name, value)
    assert "`elsewhere bench scaling RECIPE --ranks 1,2,4`" in refused("demo")


def test_data_that_a_recipe_has_not(refused):
    assert refused("stop_vit_b16", "--data") == (
        "--data without a path takes the recipe's own, which has none: write --data FOLDER."
    )


def test_a_trace_of_several_cases(refused):
    assert refused("demo", "demo_adpe", "--profile").startswith("--profile traces one case and these are 2")


@pytest.mark.parametrize("name, said", [("old.json.gz", "is there already"), ("trace.txt", "FILE.json.gz"),
                                        ("nowhere/trace.json", "its folder is not there")])  # fmt: skip
def test_a_trace_that_cannot_be_written(name, said, refused, tmp_path):
    (tmp_path / "old.json.gz").touch()
    assert said in refused("demo", "--profile", str(tmp_path / name))


SMALL = [
    "model.width=24", "model.depth=1", "model.heads=2", "method.decoder.width=16", "method.decoder.depth=1",
    "method.decoder.heads=2", "engine.device=cpu", "monitor.tensorboard=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The result of one recipe with kernels that are here and those that are not, and what was printed."""
    path, printed = tmp_path_factory.mktemp("bench") / "steps.json", io.StringIO()
    options = ["--batch", "4", "--steps", "1", "--rounds", "1", "--json", str(path)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.delenv("TRITON_INTERPRET", raising=False)  # or a CPU would have them
        vary = ["--vary", "kernels=reference,triton"]
        assert main(["bench", "step", "demo_adpe", *SMALL, *vary, *options]) == 0
    return json.loads(path.read_text()), printed.getvalue()


@pytest.mark.slow
def test_a_row_names_its_case(measured):
    row = measured[0]["rows"][0]
    case = row["recipe"], row["overrides"], row["batch"], row["precision"], row["engine"]
    assert case == ("demo_adpe", [*SMALL, "kernels=reference"], 4, "float32", "ddp")


@pytest.mark.slow
def test_a_row_has_its_rate_and_memory(measured):
    row = measured[0]["rows"][0]
    assert 0 < row["least"] == row["images_per_second"] == row["most"]  # of one turn
    assert row["peak_bytes"] > 0


@pytest.mark.slow
def test_utilisation_is_the_operations_of_a_second_of_those_of_a_matrix_product(measured):
    row = measured[0]["rows"][0]
    reached = row["images_per_second"] * row["flops_per_image"] / row["matrix_rate"]
    assert row["mfu"] == pytest.approx(reached)


@pytest.mark.slow
def test_a_row_has_the_parts_that_its_method_has(measured):
    parts = measured[0]["rows"][0]["parts"]
    assert list(parts) == ["data wait", "forward", "backward", "optimiser", "adversary", "logging", "other"]
    assert min(parts.values()) > 0


@pytest.mark.slow
def test_a_variant_that_cannot_be_built_says_why_and_ends_no_other(measured):
    first, second = measured[0]["rows"]
    assert first["failure"] is None
    assert second["failure"].startswith("kernels=triton needs") and "images_per_second" not in second
    line = next(line for line in measured[1].splitlines() if line.startswith("demo_adpe kernels=triton "))
    assert line.endswith(f"not measured: {second['failure']}")


@pytest.mark.slow
def test_batches_in_memory_are_said_to_be_none_to_wait_for(measured):
    assert "batches: random ones in memory" in measured[1] and measured[1].count("in memory") == 2


@pytest.mark.long
def test_a_recipe_is_measured_on_its_own_data_and_traced(tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("trace.json.gz", "steps.json")]
    sizes = ["model.width=24", "model.depth=2", "model.heads=2", "engine.device=cpu", "loader.workers=1"]
    options = ["--batch", "4", "--steps", "1", "--rounds", "1", "--profile", paths[0], "--json", paths[1]]
    # A setting behind a --data without a path is a setting.
    assert main(["bench", "step", "demo", *options, "--data", *sizes]) == 0
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "steps.json").read_text())
    assert result["real_data"] and result["rows"][0]["parts"]["data wait"] > 0
    assert "batches: of the loader" in printed and "in memory" not in printed and "https://ui.perfetto.dev" in printed
    assert json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]


@pytest.mark.slow
def test_the_result_says_where_and_when_it_was_measured(measured):
    result, _ = measured
    assert {"hardware", "processor", "threads", "torch", "python", "date", "load"} <= result.keys()
    assert (result["steps"], result["rounds"]) == (1, 1)


def test_lists_are_varied_whole():
    cases = variants(["demo"], [], ["data.crop_scale=[0.2,1.0],[0.3,1.0]"])
    assert [overrides for _, overrides in cases] == [["data.crop_scale=[0.2,1.0]"], ["data.crop_scale=[0.3,1.0]"]]


def test_a_result_that_cannot_be_written_is_refused_before_measuring(refused, tmp_path):
    assert "is not there or not writable" in refused("demo", "--json", str(tmp_path / "nowhere" / "x.json"))
