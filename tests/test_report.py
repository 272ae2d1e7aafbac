"""`elsewhere report`: what is read of a run, how it is thinned, what the page holds and what is refused."""

import itertools
import json
import math
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from elsewhere.launch.cli import main
from elsewhere.launch.report.figure import Axis, short, thin
from elsewhere.launch.report.page import page
from elsewhere.launch.report.panels import is_log, sections
from elsewhere.launch.report.read import Curve, find_runs, read_pictures, read_run, short_names
from elsewhere.launch.report.summary import table
from elsewhere.tests.report_runs import steps, train_both, write_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two real runs."""
    return train_both(tmp_path_factory.mktemp("runs"))


def curve(y):
    return Curve(np.arange(1, len(y) + 1), np.asarray(y, dtype=float))


def test_of_steps_taken_twice_the_last_count(tmp_path):
    rows = [*steps(0, 8, loss=1.0), *steps(5, 7, loss=2.0)]
    run = read_run(write_run(tmp_path / "run", rows), "run")
    assert run.curves["loss"].y.tolist() == [1.0] * 5 + [2.0] * 2 and run.steps == 7 and run.resumed == [5]


def test_a_start_withdraws_what_an_earlier_life_noted_later(tmp_path):
    probes = [{"step": step, "group": "probe", "knn": step / 10} for step in (-1, 3, 7)]
    start = {"step": 4, "group": "start", "steps": 20, "hardware": "1 × CPU"}
    run = read_run(write_run(tmp_path / "run", [*probes, *steps(0, 8, loss=1.0), start, *steps(5, 6, loss=1.0)]), "run")
    assert run.curves["probe/knn"].x.tolist() == [0, 4] and run.steps == 6 and run.resumed == [5]


def test_a_torn_last_line_is_left_out_in_silence(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps(0, 3, loss=1.0), '{"step": 3, "lo'), "run")
    assert run.steps == 3 and run.unreadable == 0


def test_lines_that_cannot_be_read_are_counted(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps(0, 3, loss=1.0), 'oh no\n[1]\n{"loss": 1}\n'), "run")
    assert run.steps == 3 and run.unreadable == 3
    assert "3 unreadable lines" in table([run])[1][0][-1]


def test_spreads_belong_to_their_figure(tmp_path):
    rows = [
        {
            "step": 4,
            "group": "probe",
            "knn": 0.5,
            "knn_std": 0.1,
            "top1": 0.3,
            "top1_interval": [0.25, 0.4],
            "top5": None,
        }
    ]
    run = read_run(write_run(tmp_path / "run", rows), "run")
    assert set(run.curves) == {"probe/knn", "probe/top1"}
    assert (run.curves["probe/knn"].low.item(), run.curves["probe/knn"].high.item()) == (0.4, 0.6)
    assert (run.curves["probe/top1"].low.item(), run.curves["probe/top1"].high.item()) == (0.25, 0.4)


@pytest.fixture
def event_files(tmp_path):
    """The event files of two lives of a run, the second from step 25 on."""
    from torch.utils.tensorboard import SummaryWriter

    for life, (first, drawn) in enumerate(((0, (10, 20, 30, 35)), (25, (30, 40)))):
        writer = SummaryWriter(str(tmp_path / "tensorboard"), purge_step=first, filename_suffix=f".{life}")
        for step in drawn:
            for tag in ("masks", "adversary"):
                size = 40 if tag == "masks" else 4  # small ones are easily taken for numbers
                writer.add_image(tag, torch.full((3, size, size), 50 * life + step, dtype=torch.uint8), step)
            writer.add_scalar("train/loss", 0.5, step)
        writer.close()
    return tmp_path / "tensorboard"


def test_pictures_are_those_of_tensorboards_own_reader(event_files):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    known = EventAccumulator(str(event_files), size_guidance={"images": 0})
    known.Reload()
    expected = {
        tag: {image.step: image.encoded_image_string for image in known.Images(tag)} for tag in known.Tags()["images"]
    }
    assert read_pictures(event_files) == expected and set(expected["masks"]) == {10, 20, 30, 40}


def test_an_event_file_cut_short_gives_what_is_before(event_files):
    last = max(event_files.iterdir())
    last.write_bytes(last.read_bytes()[:-100])  # the last picture of the adversary, and a number
    found = read_pictures(event_files)
    assert (set(found["masks"]), set(found["adversary"])) == ({10, 20, 30, 40}, {10, 20, 30})


def test_thinning_keeps_means_and_extremes():
    """Against plain loops, with gaps; a spike of one step in 10,000 stays visible."""
    y = np.random.default_rng(0).normal(size=10_007)
    y[500:800], y[7_777] = np.nan, 1e3
    line = thin(curve(y), 100)
    edges = [round(i * len(y) / 100) for i in range(101)]
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        known = [value for value in y[a:b].tolist() if math.isfinite(value)]
        found = (line.y[i], line.low[i], line.high[i])
        expected = (sum(known) / len(known), min(known), max(known)) if known else (math.nan,) * 3
        assert found == pytest.approx(expected, nan_ok=True)
    assert line.high[np.isfinite(line.high)].max() == 1e3


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        (0, 134, False),
        (2e-6, 8.1e-4, False),
        (-3, 250, False),
        (0.19, 2.7, True),
        (1e-7, 1e2, True),
        (0.21, 0.24, True),
    ],
)
def test_ticks_are_round_and_within(low, high, log):
    ticks = Axis(low, high, 0, 100, log).ticks()
    assert 2 <= len(ticks) <= 8 and all(low <= tick <= high for tick in ticks)
    assert all(len(f"{tick:e}".rstrip("0").split("e")[0].rstrip("0")) <= 4 for tick in ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.26349, "0.2635"), (1.5e-4, "1.5e-4"), (12345.6, "12,346"), (4e9, "4e9"), (math.nan, "not finite")],
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_logarithmic_where_values_span_a_decade():
    assert is_log("auto", [np.array([0.1, 2.0])]) and not is_log("auto", [np.array([1.0, 2.0])])
    assert not is_log("auto", [np.array([0.0, 2.0])]) and not is_log("linear", [np.array([0.1, 2.0])])


def test_every_number_of_a_run_has_a_figure(trained):
    runs = [read_run(folder, folder.name) for folder in trained]
    shown = {panel.key for _, panels in sections(runs) for panel in panels}
    assert shown | {"skipped_images"} == {key for run in runs for key in run.curves}
    assert {"adversary/loss_gain", "collapse/rank_me", "probe/linear", "loss_scale", "gradient_norm", "images_per_s",
            "adversary_encoder_norm"} <= shown  # fmt: skip


def test_a_run_says_where_it_started(trained):
    run = read_run(trained[1], "adpe")
    assert "float16" in run.starts[0]["precision"] and run.starts[0]["steps"] == run.steps
    assert "× CPU" in run.starts[0]["hardware"]


class Outside(HTMLParser):
    """What a page would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [(tag, name, value[:60]) for name, value in attrs if name in ("src", "href", "srcset", "data")
                       and not (value or "").startswith(("data:", "#"))]  # fmt: skip


def test_a_page_fetches_nothing(trained):
    text = page([read_run(folder, folder.name) for folder in trained])
    outside = Outside()
    outside.feed(text)
    assert outside.found == [] and not re.search(r"url\(|@import|fetch\(|import\(|http-equiv=\"refresh", text)
    assert "default-src 'none'" in text and not re.search(r"https?:", text)


def test_names_and_settings_do_not_become_markup(tmp_path):
    name = "</script><b>&amp;"
    folder = write_run(tmp_path / "run", steps(0, 3, loss=1.0))
    (folder / "config.yaml").write_text("about: <img src=x>\n")
    text = page([read_run(folder, name)])
    assert "<b>&amp;" not in text and "<img" not in text and text.count("</script>") == 3


def test_absent_sections_are_said(tmp_path):
    text = page([read_run(write_run(tmp_path / "run", steps(0, 3, loss=1.0)), "run")])
    for words in ("There is no adversary", "Nothing was measured on held-out", "no loss scale", "no config.yaml",
                  "none in the event files", "The metrics do not say where"):  # fmt: skip
        assert words in text
    assert text.count('<svg id="plot') == 1


def test_a_run_that_diverged_says_where(tmp_path):
    rows = steps(0, 30, loss=lambda step: math.nan if step > 20 else 1.0)
    run = read_run(write_run(tmp_path / "run", rows), "run")
    assert "loss not finite at step 21" in table([run])[1][0]
    assert "NaN" not in page([run]) and "nan" not in re.findall(r"<svg.*?</svg>", page([run]))[0]


def test_final_numbers_are_those_of_the_rows(tmp_path):
    rows = steps(0, 50, loss=lambda step: float(step), images_per_s=lambda step: step + 100.0)
    rows += [{"step": at, "group": "probe", "knn": value} for at, value in ((-1, 0.25), (49, 0.5))]
    titles, cells = table([read_run(write_run(tmp_path / "run", rows), "run")])
    found = dict(zip(titles, cells[0], strict=True))
    assert found["steps"] == "50" and found["final loss"] == "47" and found["k-NN accuracy, %"] == "25 → 50"
    assert found["images/s, median"] == "124" and "effective rank" not in found


def test_settings_that_differ_come_first(trained):
    text = page([read_run(folder, folder.name) for folder in trained])
    shown = text[text.index("settings differ") :].split("</table>")[0]
    assert "method.kind" in shown and "optim.batch_size" not in shown


def test_epochs_are_an_axis(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps(0, 40, loss=1.0)), "run")
    assert '"x":[0.0,4.0,' in page([run], "epoch") and '"x":[0.0,40.0,' in page([run], "step")


def test_a_folder_of_runs_stands_for_each(tmp_path):
    for name in ("lr=1e-4", "lr=1e-3"):
        write_run(tmp_path / "sweep" / name, steps(0, 3, loss=1.0))
    found = find_runs([tmp_path / "sweep", tmp_path / "sweep" / "lr=1e-4"])
    assert [path.name for path in found] == ["lr=1e-3", "lr=1e-4"]


def test_names_are_as_long_as_it_takes(tmp_path):
    assert short_names([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]


@pytest.fixture
def report(tmp_path, capsys, monkeypatch):
    """`elsewhere report` in `tmp_path`: exit status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main(["report", *map(str, arguments)])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def test_the_command_writes_page_and_figure(report, trained, tmp_path):
    pytest.importorskip("matplotlib")
    status, said = report(*trained, "--png", "small.png", "--names", "a,b", "--pictures", 1)
    assert status == 0 and "a 12 steps, b 12 steps" in said
    assert (tmp_path / "report.html").read_text().count("<img ") == 3  # masks, reconstruction, adversary
    with Image.open("small.png") as picture:
        picture.load()
        assert picture.width > 3 * picture.height and len(picture.convert("RGB").getcolors(1 << 20) or ()) > 50


def test_without_matplotlib_one_sentence_says_what_to_install(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_run(tmp_path / "run", steps(0, 3, loss=1.0))
    status, said = report("run", "--png", "small.png")
    assert status == 2 and "python3 -m pip install matplotlib" in said and not (tmp_path / "report.html").exists()


def test_evaluations_of_a_run_are_told(report, tmp_path):
    folder = write_run(tmp_path / "run", steps(0, 3, loss=1.0))
    best = [{"setting": "k = 20", "top1": 0.4321, "interval": [0.41, 0.45]}]
    (folder / "results.json").write_text(
        json.dumps({"evaluations": [{"probe": "knn", "best": best, "encoder": "the teacher", "figures": best}]})
    )
    assert report("run")[0] == 0
    text = (tmp_path / "report.html").read_text()
    assert "43.21" in text and "41.00 to 45.00" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "There is no run in nowhere"),
        (["empty"], "empty holds no metrics.jsonl"),
        (["begun"], "holds no step yet"),
        (
            ["run", "-o", "there.html"],
            "there.html is there already and is not overwritten: choose another name, or pass --force",
        ),
        (["run", "-o", "empty"], "empty is a folder; name a file"),
        (["run", "-o", "no/page.html"], "its folder is not there"),
        (["run", "--names", "a,b"], "2 names for 1 runs"),
        (["run", "short", "--names", "a,a"], "--names calls two runs a"),
        (["run", "--png", "figure.jpg"], "does not end in .png"),
        (["short", "--over", "epoch"], "short has no two steps yet"),
    ],
)
def test_what_is_wrong_is_one_sentence(report, tmp_path, arguments, words):
    write_run(tmp_path / "run", steps(0, 3, loss=1.0))
    write_run(tmp_path / "short", steps(0, 1, loss=1.0))
    write_run(tmp_path / "begun", [], '{"step": 0')
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.html").write_text("mine")
    status, said = report(*arguments)
    assert status == 2 and said.startswith("elsewhere: ") and words in said and said.count("\n") == 1
    assert not (tmp_path / "report.html").exists() and (tmp_path / "there.html").read_text() == "mine"


def test_results_that_cannot_be_read_are_left_out_with_a_line(report, tmp_path):
    (write_run(tmp_path / "run", steps(0, 3, loss=1.0)) / "results.json").write_text("[")
    status, said = report("run")
    assert status == 0 and "results.json holds no results that can be read" in said


def test_force_writes_over(report, tmp_path):
    write_run(tmp_path / "run", steps(0, 3, loss=1.0))
    (tmp_path / "report.html").write_text("old")
    assert report("run", "--force")[0] == 0 and "old" not in (tmp_path / "report.html").read_text()[:9]
