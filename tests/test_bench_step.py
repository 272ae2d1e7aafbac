"""`elsewhere bench step`: cases of recipes and settings, their figures, and what it refuses."""

import json
import multiprocessing

import pytest

from elsewhere.launch.bench_step import _ask, variants
from elsewhere.launch.cli import main
from elsewhere.launch.errors import UserError


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


def test_settings_without_a_recipe(refused):
    assert refused("optim.lr=1") == "Name a recipe to measure, e.g. elsewhere bench step cifar10_maeplus_rpe."


@pytest.mark.parametrize("vary", ["model.relative.terms", "model.relative.terms=k", "=k,qk"])
def test_a_vary_that_compares_nothing(refused, vary):
    assert refused("demo_adpe", "--vary", vary) == (
        f"--vary {vary} compares nothing; write key=a,b, e.g. --vary model.relative.terms=none,k."
    )


def test_an_unknown_recipe(refused):
    assert refused("demo", "demo_adp") == "There is no recipe or file called demo_adp; did you mean demo_adpe?"


def test_a_value_that_is_not_possible(refused):
    assert refused("demo_adpe", "--vary", "model.relative.terms=k,z").startswith("model.relative.terms=z is not")


@pytest.mark.parametrize("arguments", [[], ["demo", "--batch", "0"], ["demo", "--steps", "x"]], ids=str)
def test_a_wrong_command_ends_with_its_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "step", *arguments])
    assert end.value.code == 2 and "`elsewhere bench step --help`" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [None, 1], ids=["while it is built", "while it waits"])
def test_a_measured_process_that_ends_early_is_said(steps):
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(UserError, match=r"ended early, likely for want of memory; lower --batch"):
        _ask(ours, steps)


SMALL = [
    "model.width=24", "model.depth=1", "model.heads=2", "method.decoder.width=16", "method.decoder.depth=1",
    "method.decoder.heads=2", "engine.device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What the command wrote about one recipe in two forms, a turn of one step each."""
    path = tmp_path_factory.mktemp("bench") / "steps.json"
    vary = ["--vary", "model.relative.lookup=interpolated,published"]
    options = ["--batch", "4", "--steps", "1", "--rounds", "1", "--json", str(path)]
    assert main(["bench", "step", "demo_adpe", *SMALL, *vary, *options]) == 0
    return json.loads(path.read_text())


@pytest.mark.slow
def test_a_row_names_its_case(measured):
    for row, lookup in zip(measured["rows"], ("interpolated", "published"), strict=True):
        case = row["recipe"], row["overrides"], row["batch"], row["precision"]
        assert case == ("demo_adpe", [*SMALL, f"model.relative.lookup={lookup}"], 4, "float32")


@pytest.mark.slow
def test_a_row_has_its_rate_and_memory(measured):
    for row in measured["rows"]:
        assert 0 < row["least"] == row["images_per_second"] == row["most"]  # of one turn
        assert row["peak_bytes"] > 0


@pytest.mark.slow
def test_the_result_says_where_and_when_it_was_measured(measured):
    assert {"hardware", "torch", "python", "date"} <= measured.keys()
    assert (measured["steps"], measured["rounds"]) == (1, 1)


def test_lists_are_varied_whole():
    cases = variants(["demo"], [], ["data.crop_scale=[0.2,1.0],[0.3,1.0]"])
    assert [overrides for _, overrides in cases] == [["data.crop_scale=[0.2,1.0]"], ["data.crop_scale=[0.3,1.0]"]]


def test_a_result_that_cannot_be_written_is_refused_before_measuring(refused, tmp_path):
    assert "is not there or not writable" in refused("demo", "--json", str(tmp_path / "nowhere" / "x.json"))
