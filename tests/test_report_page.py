"""A report as a browser shows it: every figure and picture is there, with a size, and answers the pointer."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from elsewhere.launch.report.page import page
from elsewhere.launch.report.panels import sections
from elsewhere.launch.report.read import read_run
from elsewhere.tests.report_runs import steps, train_both, write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here; apt-get install --no-install-recommends chromium"),
]

# Run in the page when all is loaded; what it finds is read from the DOM that the browser prints.
_LOOK = """
<script>
addEventListener("error", (event) => { (window.wrong ||= []).push(event.message); });
addEventListener("load", () => {
  const size = (part) => { const box = part.getBoundingClientRect(); return [box.width, box.height]; };
  const found = {
    plots: [...document.querySelectorAll("svg.plot")].map((svg) => ({
      title: svg.closest("figure").querySelector("h3").textContent, size: size(svg),
      lines: [...svg.querySelectorAll("path.line")].map((line) => line.getTotalLength()),
      runs: [...svg.querySelectorAll("g.run")].map((group) => getComputedStyle(group.querySelector(".line")).stroke),
    })),
    pictures: [...document.querySelectorAll(".pictures img")].map((img) => [img.naturalWidth, ...size(img)]),
    wide: document.documentElement.scrollWidth <= innerWidth,
  };
  const loss = document.querySelector("svg.plot"), box = loss.getBoundingClientRect();
  const end = { clientX: box.right - 1, clientY: box.top + box.height / 2, bubbles: true };
  loss.dispatchEvent(new PointerEvent("pointermove", end));
  found.tip = [...document.querySelectorAll(".tip tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
  document.querySelector("nav button").click();
  found.hidden = [...loss.querySelectorAll("g.run")].map((group) => size(group)[0] === 0);
  found.fetched = performance.getEntriesByType("resource").map((one) => one.name).filter((n) => !n.startsWith("data:"));
  found.wrong = window.wrong || [];
  const told = document.createElement("output");
  told.id = "found";
  told.textContent = JSON.stringify(found);
  document.body.append(told);
});
</script></head>"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two real runs, and one with more steps than a line has points, written by hand."""
    folder = tmp_path_factory.mktemp("runs")
    many = write_run(folder / "many", steps(0, 300, loss=lambda s: 1 / (1 + s) + 0.1, lr=1e-3))
    return [read_run(path, path.name) for path in (*train_both(folder), many)]


@pytest.fixture(scope="module")
def shown(runs, tmp_path_factory):
    """What the browser found in the page."""
    assert BROWSER is not None
    folder = tmp_path_factory.mktemp("page")
    (folder / "page.html").write_text(page(runs).replace("</head>", _LOOK, 1), encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         "--window-size=1280,900", "--dump-dom", (folder / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    told = re.search(r'<output id="found">(.*?)</output>', done.stdout, re.DOTALL)
    assert told, done.stderr[-2000:]
    return json.loads(unescape(told[1]))


def test_every_figure_has_a_size_and_its_lines(shown, runs):
    expected = [
        (panel.title, sum(panel.key in run.curves for run in runs)) for _, panels in sections(runs) for panel in panels
    ]
    found = [(plot["title"].split(",")[0], len(plot["lines"])) for plot in shown["plots"]]
    assert found == [(title.split(",")[0], lines) for title, lines in expected]
    assert len(found) > 20
    for plot in shown["plots"]:
        assert min(plot["size"]) > 100 and min(plot["lines"]) > 5, plot


def test_runs_have_colours_of_their_own(shown):
    loss = shown["plots"][0]["runs"]
    assert len(set(loss)) == 3 and "none" not in loss


def test_every_picture_is_shown(shown, runs):
    expected = sum(len(found) for run in runs for found in run.pictures.values())
    assert len(shown["pictures"]) == expected > 6
    assert all(min(picture) > 10 for picture in shown["pictures"])


def test_the_pointer_tells_the_values_of_each_run(shown, runs):
    names, at, values = zip(*shown["tip"], strict=True)
    assert list(names) == [run.name for run in runs] and at[0] == at[1] == "12"
    assert float(values[0]) == pytest.approx(runs[0].curves["loss"].y[-1], rel=1e-3)
    assert values[2].startswith("0.1")


def test_a_click_hides_a_run(shown):
    assert shown["hidden"] == [True, False, False]


def test_nothing_is_fetched_and_nothing_fails(shown):
    assert shown["fetched"] == [] and shown["wrong"] == []


def test_the_page_is_not_wider_than_its_window(shown):
    assert shown["wide"]
