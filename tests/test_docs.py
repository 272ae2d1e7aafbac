"""README and docs: every link leads somewhere, every command parses, every setting exists, and the examples run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from elsewhere.launch.cli import _parse
from elsewhere.launch.config import load_config, recipe_names

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^ *```.*?^ *```$", re.M | re.S)
LAUNCHERS = r"(?:.*-m elsewhere\.launch|.*--module elsewhere\.launch|(?:.*&& )?elsewhere) "


def page_id(path):
    return str(path.relative_to(ROOT))


def anchors(path):
    """The anchors of a page's headings, as GitHub and Python-Markdown make them."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    found = set()
    for title in re.findall(r"^#+ (.*)$", text, re.M):
        plain = re.sub(r"[`*]|\[|\]\(.*?\)", "", title).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


def links(path):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text(encoding="utf-8")))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", link)]


def commands():
    """Every `elsewhere …` of a fenced or indented block, continued lines joined, without prompt and comment."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"[ \t]*\\\n[ \t]*", " ", text)
        inside = False
        for line in text.splitlines():
            if line.lstrip().startswith("```"):
                inside = not inside
                continue
            line_ = line.strip().removeprefix("$ ")
            if (inside or line.startswith("    ")) and re.match(LAUNCHERS + "[a-z]", line_):
                yield path, re.sub(LAUNCHERS, "", line_, count=1)


def arguments(command):
    """Its words up to a comment, pipe or redirection; None where something is left out."""
    try:
        words = shlex.split(re.sub(r"\$\w+|\$\(.*?\)", "1", command), comments=True)
    except ValueError:
        return None
    for i, word in enumerate(words):
        if word in ("|", "||", "&&", ";", ">", "2>&1", "&"):
            words = words[:i]
            break
    return None if any(mark in word for word in words for mark in ("…", "...")) else words


ALL = list(dict.fromkeys((page_id(path), command) for path, command in commands()))


def test_commands_are_found():
    assert len(ALL) > 80


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_lead_somewhere(path):
    wrong = []
    for link in links(path):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


@pytest.mark.parametrize(("page", "command"), ALL)
def test_a_command_parses_and_its_settings_exist(page, command, capsys):
    words = arguments(command)
    if words is None or {"RECIPE", "COMMAND"} & set(words) or "key=value" in command:
        pytest.skip("a command with something left out")
    try:
        parsed = _parse(words)
    except SystemExit as end:
        assert end.code == 0, capsys.readouterr().err
        return
    recipe = getattr(parsed, "recipe", None)
    names = [recipe] if recipe else [word for word in getattr(parsed, "recipes", ()) if "=" not in word]
    overrides = getattr(parsed, "overrides", None) or [word for word in getattr(parsed, "recipes", ()) if "=" in word]
    for name in names:
        if name in recipe_names():
            load_config(name, overrides)  # raises for what is not a setting


@pytest.mark.slow
@pytest.mark.parametrize("title", ["A method", "A data set"])
def test_examples_of_extending_run_as_they_stand(title, tmp_path):
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text.split(f"## {title}\n")[1], re.S)[1]
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Finished:" in done.stdout
