"""`elsewhere bench all`: its page, what it refuses, and the pictures that it makes up."""

import json
from datetime import date

import numpy as np
import pytest
from PIL import Image

from elsewhere.launch.bench_all import SECTIONS, _sections, machine, make_photos, slug
from elsewhere.launch.cli import main


@pytest.mark.parametrize(
    "name, expected",
    [("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel_xeon_platinum_8481c"),
     ("AMD EPYC 7763 64-Core Processor", "amd_epyc_7763_64_core"),
     ("NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3"), ("", "machine")],
)  # fmt: skip
def test_a_machine_gives_a_file_its_name(name, expected):
    assert slug(name) == expected


def broken_photo(folder):
    (folder / "photos" / "a").mkdir(parents=True)
    (folder / "photos" / "a" / "1.jpg").write_text("no photo")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder with the page of a quick run of two sections, one of which fails, and its JSON."""
    folder = tmp_path_factory.mktemp("pages")
    broken_photo(folder)
    arguments = ["--quick", "--only", "masks,data", "--data", str(folder / "photos"), "-o", str(folder)]
    assert main(["bench", "all", *arguments, "--json", str(folder / "all.json")]) == 0
    return folder


@pytest.fixture
def page(written):
    return (written / f"{slug(machine())}_{date.today().isoformat()}.md").read_text(encoding="utf-8")


def test_a_page_says_where_when_and_with_what_it_was_measured(page):
    assert page.startswith(f"# {machine()}, {date.today().isoformat()}\n")
    assert "| load average |" in page and "| torch |" in page and "| Python |" in page


def test_a_page_holds_what_a_section_prints(page):
    table = page.partition("## Mask samplers")[2].partition("```text")[2].partition("```")[0]
    assert "images/s" in table and "recommended" in table


def test_a_section_that_fails_says_why_and_ends_no_other(page, written):
    assert "Not measured:" in page.partition("## Readers")[2] and "None of the 1 images" in page
    assert {"masks"} == json.loads((written / "all.json").read_text()).keys() & set(SECTIONS)


@pytest.fixture
def refused(capsys, monkeypatch):
    """The sentence that `elsewhere bench all` ends with, status 2, before anything is measured."""
    monkeypatch.setattr("elsewhere.launch.bench_all._sections", lambda *_: pytest.fail("measured"))

    def run(*arguments):
        assert main(["bench", "all", *arguments]) == 2
        return capsys.readouterr().err.removeprefix("elsewhere: ").strip()

    return run


def test_a_page_is_not_written_over(refused, tmp_path):
    (tmp_path / "old.md").write_text("old")
    path = tmp_path / "old.md"
    assert refused("-o", str(path)) == (
        f"-o {path} is there already and is not overwritten: choose another name, or pass --force."
    )


def test_a_page_is_written_over_by_force(tmp_path):
    (tmp_path / "old.md").write_text("old")
    assert main(["bench", "all", "--quick", "--only", "masks", "--force", "-o", str(tmp_path / "old.md")]) == 0
    assert "Mask samplers" in (tmp_path / "old.md").read_text(encoding="utf-8")


def test_a_folder_that_is_not_there(refused, tmp_path):
    assert "its folder is not there or not writable" in refused("-o", str(tmp_path / "nowhere" / "page.md"))


def test_data_that_are_not_there(refused, tmp_path):
    assert "nowhere" in refused("--data", str(tmp_path / "nowhere"), "-o", str(tmp_path))


def test_an_unknown_section(refused, tmp_path):
    assert refused("--only", "steps", "-o", str(tmp_path)) == (
        "--only steps is not known; choose some of masks, kernels, data, step, engines."
    )


def test_nothing_measured_is_an_error_and_writes_no_page(capsys, tmp_path):
    broken_photo(tmp_path)
    arguments = ["--quick", "--only", "data", "--data", str(tmp_path / "photos"), "-o", str(tmp_path / "page.md")]
    assert main(["bench", "all", *arguments]) == 2
    assert "Nothing could be measured" in capsys.readouterr().err and not (tmp_path / "page.md").exists()


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", SECTIONS)
def test_the_command_of_a_section_is_one_of_ours(quick, name, tmp_path):
    from elsewhere.launch.cli import _parse

    command = _sections(quick, None, str(tmp_path))[name].command
    assert _parse(command.split()[1:]).part == name


def test_pictures_are_photos_of_two_classes_and_always_the_same(tmp_path):
    for folder in ("one", "other"):
        make_photos(tmp_path / folder, 2)
    for place in ("class0/0000.jpg", "class1/0001.jpg"):
        one, other = ((tmp_path / folder / place).read_bytes() for folder in ("one", "other"))
        assert one == other
        image = Image.open(tmp_path / "one" / place)
        assert image.size == (500, 375) and np.asarray(image).std() > 20


@pytest.mark.long
def test_every_section_can_be_measured(tmp_path):
    assert main(["bench", "all", "--quick", "-o", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page.count("\n## ") == len(SECTIONS) and "Not measured" not in page
